"""Compile the C++ once, and load it.

The library lies in ${XDG_CACHE_HOME:-~/.cache}/dsmini/kernels as <key>-<sha256 of the file>.so. The key hashes what it
was made of: sources, flags, compiler, machine. It is built in a folder beside, then moved into its place, so that
processes may build at the same time and a killed build leaves nothing that counts. A file whose content does not hash
to its name is damaged, and built anew.

No OpenMP is linked: two runtimes in a process spin on the same cores. The library calls the runtime that torch has
loaded, through the address of its `GOMP_parallel`, which libgomp and LLVM's libomp on Linux have; elsewhere it runs in
one thread.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("tiles.h", "lanes.h", "magnitudes.h", "rows.h", "tiles.cpp", "library.cpp")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
ISA_FLAGS = {
    "portable": ("-DWORK=work_portable", "-DBYTES=16"),
    "avx2": ("-DWORK=work_avx2", "-DBYTES=32", "-mavx2", "-mf16c"),
    "avx512": ("-DWORK=work_avx512", "-DBYTES=64", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c"),
}
ISA_NUMBERS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}
ISA_VARIABLE = "DSMINI_CPU_ISA"


class BuildError(Exception):
    """There is no compiler, or it failed; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class Library:
    path: Path
    isa: int
    """What calls ask for, by ISA_NUMBERS: never best, but the best that is here."""
    isa_name: str
    parallel: int
    """Address of GOMP_parallel, or 0."""
    tiles: "ctypes._NamedFuncPointer"


@functools.cache
def library() -> Library:
    """The compiled library, from the cache or built now.

    Raises: BuildError, and ValueError if DSMINI_CPU_ISA asks for what is unknown or not here.
    """
    try:
        path = find_or_build()
        loaded = ctypes.CDLL(str(path))
        loaded.dsmini_isa.argtypes, loaded.dsmini_isa.restype = [ctypes.c_int64], ctypes.c_int64
        loaded.dsmini_tiles.argtypes, loaded.dsmini_tiles.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64
    except (OSError, AttributeError) as error:  # a compiler that made no library, a folder from which none may be run
        raise BuildError(f"the compiled library cannot be loaded: {error}") from None
    wanted = os.environ.get(ISA_VARIABLE) or "best"
    if wanted not in ISA_NUMBERS:
        raise ValueError(f"{ISA_VARIABLE}={wanted!r} is unknown; use avx512, avx2 or portable")
    isa = loaded.dsmini_isa(ISA_NUMBERS[wanted])
    if isa == 0:
        raise ValueError(f"{ISA_VARIABLE}={wanted!r} asks for instructions that this CPU lacks; unset it")
    name = next(n for n, number in ISA_NUMBERS.items() if number == isa)
    return Library(path=path, isa=isa, isa_name=name, parallel=_gomp_parallel(), tiles=loaded.dsmini_tiles)


def find_or_build(sanitize: bool = False) -> Path:
    """The library's path; with `sanitize` that of one that ends the process at the first wrong access.

    Raises: BuildError.
    """
    if sys.byteorder != "little" or sys.maxsize < 2**32 or os.name != "posix":
        raise BuildError(f"the C++ is written for little-endian 64-bit POSIX systems, not {platform.platform()}")
    compiler = find_compiler()
    flags = FLAGS + (SANITIZE if sanitize else ())
    key = _key(compiler, flags)
    folder = cache_folder()
    if (path := _find(folder, key)) is None:
        path = _build(compiler, flags, folder, key)
    return path


def find_compiler() -> tuple[str, ...]:
    """$CXX, or else c++, g++ or clang++ on the PATH, as a command.

    Raises: BuildError.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']!r} is no command: {error}") from None
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX={named[0]} is no program; set it to a C++17 compiler")
        return tuple(named)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    raise BuildError("there is no C++ compiler: no CXX, and no c++, g++ or clang++ on the PATH")


def cache_folder() -> Path:
    """Where libraries are kept: the user's cache, or where that cannot be written, a private temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "dsmini" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError:
        return _temporary_folder()


def _temporary_folder() -> Path:
    # Its name can be guessed: whatever is there and is not ours alone could hold anyone's code.
    folder = Path(tempfile.gettempdir()) / f"dsmini-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="dsmini-kernels-"))
    except OSError as error:
        raise BuildError(f"no folder for the compiled library can be written: {error}") from None


def _key(compiler: tuple[str, ...], flags: tuple[str, ...]) -> str:
    version = _run([*compiler, "--version"])
    if version.returncode != 0:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {_first_error(version)}")
    parts = [repr((compiler, flags, _isas())), version.stdout, platform.machine(), _cpu_flags()]
    hashed = hashlib.sha256()
    for part in [*(p.encode() for p in parts), *((HERE / name).read_bytes() for name in SOURCES)]:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()[:24]


def _isas() -> dict[str, tuple[str, ...]]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {name: flags for name, flags in ISA_FLAGS.items() if x86 or name == "portable"}


def _cpu_flags() -> str:
    # A home directory may be shared by unlike machines.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _find(folder: Path, key: str) -> Path | None:
    for path in sorted(folder.glob(f"{key}-*.so")):
        try:
            if path.name == _name(key, path):
                return path
            path.unlink()
        except OSError:
            continue
    return None


def _name(key: str, path: Path) -> str:
    return f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"


def _build(compiler: tuple[str, ...], flags: tuple[str, ...], folder: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
        jobs = {name: [*more, str(HERE / "tiles.cpp")] for name, more in _isas().items()}
        jobs["library"] = [str(HERE / "library.cpp")]
        commands = [[*compiler, *flags, "-c", *more, "-o", f"{scratch}/{name}.o"] for name, more in jobs.items()]
        running = [_start(command) for command in commands]
        for done in [_finish(process) for process in running]:
            if done.returncode != 0:
                raise BuildError(f"{shlex.join(compiler)} failed: {_first_error(done)}")
        objects = [f"{scratch}/{name}.o" for name in jobs]
        linked = _run([*compiler, *flags, "-shared", *objects, "-o", f"{scratch}/library.so"])
        if linked.returncode != 0:
            raise BuildError(f"{shlex.join(compiler)} failed to link: {_first_error(linked)}")
        built = Path(scratch) / "library.so"
        path = folder / _name(key, built)
        os.replace(built, path)  # not forced to the disk: the name holds the content's hash, so a torn file is found
    return path


def _start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _finish(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    output, _ = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return _finish(_start(command))
    except OSError as error:
        return subprocess.CompletedProcess(command, -1, str(error))


def _first_error(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else f"status {done.returncode}")


def _gomp_parallel() -> int:
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except AttributeError:
        return 0
