"""Compile the C++ once, and load it.

There are five libraries, so that nothing waits for kernels that it does not need: each is built when an entry of it is
first wanted, in one run of the compiler with those that the process expects to want (`Library.expect`). All have one
instruction set: the best of this CPU, or the one that DSMINI_CPU_ISA names.

A library is stored in ${XDG_CACHE_HOME:-~/.cache}/dsmini/kernels as <key>-<sha256 of the file>.so, if only this user
can write there (folder.py). The key hashes sources, flags and machine, and then the compiler; where there is none, that
of any compiler serves. The library is built in a folder next to its place, tried in a process of its own (trial.py),
then moved. A killed build leaves nothing that counts. Processes that want the same library wait for the one that builds
it, where the folder has locks; elsewhere each builds its own. A file whose content does not hash to its name is
damaged, and built again.

No OpenMP is linked: two runtimes in a process spin on the same cores. The library calls the runtime that torch has
loaded, through the address of its `GOMP_parallel`. libgomp has it, and LLVM's libomp on Linux. Elsewhere kernels of
tiles run in one thread. Products of many rows run on it too. Decoding steps have threads of their own (team.h), which
wait for nobody.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dsmini_kernels.cpu.folder import (
    UntrustedFolderError,
    alone_in,
    can_write,
    is_private_file,
    shared_temporary,
    user_cache,
)

HERE = Path(__file__).parent
ROUNDING = ("-O2", "-ffp-contract=off")
"""Flags of kernels whose bits are defined: no multiplication and addition may become one operation."""
PRODUCTS = ("-O2", "-ffp-contract=fast")  # as fast as -O3, in 0.6 of the time (docs/log.md)
TRIAL = ("-O0",)
"""Flags of trials, which run once."""
ROUNDED = ("scratch.cpp", "team.cpp", "library.cpp", "tiles.cpp", "blocks.cpp")
"""Sources with the flags of ROUNDING. All others but trials have those of PRODUCTS."""
LARGE = ("products.cpp", "compressed_attention.cpp")
"""Sources that take long to compile. All others of a library with the flags of PRODUCTS are one unit."""
SHARED = ("scratch.cpp", "team.cpp")
SOURCES = {
    "rounding": (*SHARED, "trial_of_rounding.cpp", "library.cpp", "tiles.cpp"),
    "prompts": (*SHARED, "trial_of_prompts.cpp", "panels.cpp", "experts.cpp", "heads_attention.cpp"),
    "training": (*SHARED, "trial_of_training.cpp", "panels.cpp", "trained_experts.cpp", "trained_norm.cpp", "muon.cpp"),
    "decoding": (
        *(*SHARED, "trial_of_decoding.cpp", "blocks.cpp", "panels.cpp", "attend.cpp", "linear.cpp", "norms.cpp"),
        *("experts.cpp", "feed_forward.cpp", "stream_step.cpp", "attention.cpp", "grouped_attention.cpp", *LARGE),
    ),
    "sparse attention": (
        *(*SHARED, "trial_of_sparse_attention.cpp", "panels.cpp", "attend.cpp"),
        *("entry_attention.cpp", "topk_attention.cpp", "topk_keys.cpp", "streams.cpp"),
    ),
}
"""Sources of each library. Headers are all *.h, and a name that is not exported stands for one thing in a library."""
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
ISAS = {
    "portable": ("-DBYTES=16",),
    "avx2": ("-DBYTES=32", "-mavx2", "-mf16c", "-mfma"),
    "avx512": ("-DBYTES=64", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c", "-mfma"),
}
"""Instruction sets and their flags. A CPU that has one has those before it."""
ISA_VARIABLE = "DSMINI_CPU_ISA"
FUNCTIONS = {
    "rounding": ("tiles",),
    "prompts": ("heads_attention", "experts"),
    "training": ("trained_experts", "trained_norm", "muon"),
    "decoding": (
        *("linear", "norms", "attention", "grouped_attention", "compressed_attention", "feed_forward", "stream_step"),
        *("blocks", "experts"),
    ),
    "sparse attention": ("topk_keys", "topk_attention", "entry_attention", "streams", "sinkhorn"),
}
"""Functions of each library. Each takes its struct of calls.h, but `blocks`, which takes the calls of many steps.

Two have `experts`, so that neither decoding nor training waits for the other's library.
"""
ENTRY = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)
"""A function of a library: takes a packed call and its bytes, returns 0 or an error (calls.py)."""
BORROW = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
BETWEEN_NOTES = 10.0
"""Seconds between two lines about a build on the standard error."""
VERSION_SECONDS, BUILD_SECONDS, TRIAL_SECONDS = 20.0, 300.0, 60.0
"""Time limits in seconds: for a compiler to say its version, for each step of a build, and for a library's trial."""


class BuildError(Exception):
    """A missing or failing compiler; the message is one sentence."""


Done = subprocess.CompletedProcess[str]
Unit = tuple[str, ...]


class Library:
    """The compiled functions for an instruction set, of ISAS.

    `paths` has the libraries that are in use, `entries` their functions by name.
    """

    def __init__(self, isa: str) -> None:
        self.isa, self.paths = isa, dict[str, Path]()
        self.parallel = _gomp_parallel()
        """Address of GOMP_parallel, or 0."""
        self.entries, self._failed = dict[str, Any](), dict[str, BuildError]()
        self.expected = list[str]()
        """Libraries that the process expects to want, the first one first."""

    def expect(self, names: Iterable[str]) -> None:
        """Build the libraries of these functions in one run of the compiler, when the first of them is wanted."""
        self.expected += map(self._part_of, names)

    def entry(self, name: str) -> Any:
        """Return a function of FUNCTIONS. The first that is wanted of a library loads it, or builds it.

        Raises: BuildError.
        """
        if name not in self.entries:
            self._load(self._part_of(name))
        return self.entries[name]

    def _part_of(self, function: str) -> str:
        """Return the library of a function: of two that have it, one that is loaded or expected."""
        parts = [part for part, names in FUNCTIONS.items() if function in names]
        return next((part for part in (*self.paths, *self.expected) if part in parts), parts[0])

    def _load(self, part: str) -> None:
        if part in self._failed:  # to compile takes seconds
            raise self._failed[part]
        try:
            path = find_or_build(self.isa, part, others={*self.expected} - {part})
            loaded = ctypes.CDLL(str(path))
            self.entries |= {name: ENTRY((f"dsmini_{name}", loaded)) for name in FUNCTIONS[part]}
            BORROW(("dsmini_borrow", loaded))(self.parallel or None)
            self.paths[part] = path
        except (BuildError, OSError, AttributeError) as error:
            cannot = f"the compiled library cannot be loaded: {error}"  # from a folder from which no code may be run
            self._failed[part] = error if isinstance(error, BuildError) else BuildError(cannot)
            raise self._failed[part] from None


@functools.cache
def library() -> Library:
    """Return the compiled functions for this CPU, or for the instruction set that is named.

    Raises: ValueError if DSMINI_CPU_ISA is unknown or names instructions that this CPU lacks.
    """
    named = os.environ.get(ISA_VARIABLE)
    if named and named not in ISAS:
        raise ValueError(f"{ISA_VARIABLE}={named!r} is unknown; use avx512, avx2 or portable")
    if named and named not in isas_here():
        raise ValueError(f"{ISA_VARIABLE}={named!r} asks for instructions that this CPU lacks; unset it")
    return Library(named or isas_here()[-1])


def isas_here() -> list[str]:
    """Return the instruction sets that this CPU has, the best last."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["portable"]
    has = {"portable": True, "avx2": torch.cpu._is_avx2_supported(), "avx512": torch.cpu._is_avx512_supported()}
    return list(itertools.takewhile(has.__getitem__, ISAS))


def find_or_build(isa: str, part: str, sanitize: bool = False, others: Collection[str] = ()) -> Path:
    """Return the path of a library, of SOURCES, for an instruction set, built now if it is not in a cache.

    A cache that others can change is not used, and a warning says so; one that cannot be written is read all the same.

    Args:
        sanitize: build a library that ends the process at the first wrong access.
        others: libraries that are built in the same run of the compiler, if this one is and they are not in that cache.
            They fail alone, when they are wanted.

    Raises: BuildError.
    """
    if sys.byteorder != "little" or sys.maxsize < 2**32 or os.name != "posix":
        raise BuildError(f"the C++ is written for little-endian 64-bit POSIX systems, not {platform.platform()}")
    flags = (*FLAGS, *ISAS[isa], *(SANITIZE if sanitize else ()))
    compiler, refused = find_compiler(), list[str]()
    version = f"-{_version_of(compiler)}" if compiler else ""
    key = _key(flags, part) + version
    for folder in _folders(refused):
        path = _find(folder, key)
        if path is None and compiler and can_write(folder):
            with alone_in(folder, BUILD_SECONDS):
                path = _find(folder, key)
                wanted = {name: _key(flags, name) + version for name in others if path is None}
                together = {part: key} | {name: at for name, at in wanted.items() if _find(folder, at) is None}
                path = path or _build(compiler, flags, folder, together, trial=not sanitize)[part]
        if path is not None:
            if refused:
                fix = "let XDG_CACHE_HOME be a folder that you alone can write to, or take that right from others"
                stored = f"dsmini's compiled kernels are stored in {folder}, because {'; '.join(refused)}"
                warnings.warn(f"{stored}; {fix} (chmod go-w)", stacklevel=2)
            return path
    if not compiler:
        raise BuildError("there is no C++ compiler: no CXX, and no c++, g++ or clang++ on the PATH")
    raise BuildError(f"no folder for the compiled library can be written{''.join(f'; {why}' for why in refused)}")


def _folders(refused: list[str]) -> Iterator[Path]:
    """Yield folders that only this user can change; append to `refused` why others are not used."""
    for private_folder in (user_cache, shared_temporary):
        try:
            yield private_folder()
        except UntrustedFolderError as error:
            refused.append(str(error))
        except OSError:  # it cannot be made
            continue


def find_compiler() -> tuple[str, ...]:
    """Return the compiler as a command: $CXX, or else c++, g++ or clang++ on the PATH; empty if there is none.

    Raises: BuildError for a CXX that cannot be run.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']!r} is not a command: {error}") from None
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX={named[0]} is not a program; set it to a C++17 compiler")
        return tuple(named)
    return next(((path,) for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), ())


def _version_of(compiler: tuple[str, ...]) -> str:
    (version,) = _run(f"{shlex.join(compiler)} --version", [[*compiler, "--version"]], VERSION_SECONDS)
    if version.returncode != 0:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {_first_error(version)}")
    return hashlib.sha256(repr((compiler, version.stdout)).encode()).hexdigest()[:8]


def _key(flags: tuple[str, ...], part: str) -> str:
    parts = [repr((flags, [(unit, _flags_of(unit[0])) for unit in _units(part)])), platform.machine(), _cpu_flags()]
    files = [*sorted(HERE.glob("*.h")), *(HERE / name for name in SOURCES[part])]
    hashed = hashlib.sha256()
    for piece in [*(p.encode() for p in parts), *(file.read_bytes() for file in files)]:
        hashed.update(len(piece).to_bytes(8, "little") + piece)
    return hashed.hexdigest()[:24]


def _flags_of(source: str) -> tuple[str, ...]:
    if source.startswith("trial_of_"):
        return TRIAL
    return ROUNDING if source in ROUNDED else PRODUCTS


def _cpu_flags() -> str:
    # machines with different CPUs may share a home directory
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _find(folder: Path, key: str) -> Path | None:
    for path in sorted(folder.glob(f"{key}-*.so")):
        try:
            content = _read_library(path)
            if content is not None and path.name.endswith(_name("", content)):
                return path
            path.unlink()
        except OSError:
            continue
    return None


def _read_library(path: Path) -> bytes | None:
    """Return the content of a file that only this user can change; None for any other."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        return file.read() if is_private_file(os.fstat(descriptor)) else None


def _name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _build(
    compiler: tuple[str, ...], flags: tuple[str, ...], folder: Path, keys: dict[str, str], trial: bool
) -> dict[str, Path]:
    """Build libraries, the first of which must succeed; return their paths.

    Args:
        keys: of each library, by its name.
    """
    parts, (first, *others) = " and ".join(keys), keys
    seconds = 3 + 3 * len(keys)
    _note(f"compiling the kernels for {parts} in C++, once on this machine: about {seconds} s of two free cores")
    began, built = time.monotonic(), dict[str, Path]()
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as scratch:
        try:
            _compile(compiler, flags, {unit for part in keys for unit in _units(part)}, scratch)
        except BuildError:
            if not others:
                raise
            return _build(compiler, flags, folder, {first: keys[first]}, trial)
        for part, key in keys.items():
            try:
                made = _link(compiler, flags, part, scratch, trial)
            except BuildError:
                if part == first:
                    raise
                continue
            built[part] = folder / _name(key, made.read_bytes())
            os.replace(made, built[part])  # not forced to the disk: the name holds the content's hash
    _note(f"compiled the kernels for {parts} in {time.monotonic() - began:.0f} s")
    return built


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], units: Iterable[Unit], scratch: str) -> None:
    compiles = list[list[str]]()
    for unit in units:
        text = _object(scratch, unit).with_suffix(".cpp")
        text.write_bytes(b"".join(b'#include "%s"\n' % os.fsencode(HERE / source) for source in unit))  # in any locale
        compiles.append([*compiler, "-c", *_flags_of(unit[0]), *flags, str(text), "-o", str(_object(scratch, unit))])
    for done in _run(shlex.join(compiler), compiles, BUILD_SECONDS):
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(compiler)} failed: {_first_error(done)}")


def _units(part: str) -> list[Unit]:
    """Return the sources of a library that are compiled as one: their headers are then read once, not by each."""
    together = tuple(source for source in SOURCES[part] if _flags_of(source) == PRODUCTS and source not in LARGE)
    return [*((source,) for source in SOURCES[part] if source not in together), *filter(None, [together])]


def _object(scratch: str, unit: Unit) -> Path:
    return Path(scratch) / f"{'_'.join(Path(source).stem for source in unit)}.o"


def _link(compiler: tuple[str, ...], flags: tuple[str, ...], part: str, scratch: str, trial: bool) -> Path:
    """Link a library of compiled sources, and try it."""
    built = Path(scratch) / f"{part}.so"
    objects = [str(_object(scratch, unit)) for unit in _units(part)]
    (linked,) = _run(shlex.join(compiler), [[*compiler, *flags, "-shared", *objects, "-o", str(built)]], BUILD_SECONDS)
    if linked.returncode != 0:
        raise BuildError(f"{shlex.join(compiler)} failed to link: {_first_error(linked)}")
    if trial:
        _try(built, compiler)
    built.chmod(0o700)  # whatever the umask: nobody else may write into it
    return built


def _try(library: Path, compiler: tuple[str, ...]) -> None:
    """Run the library in a process of its own, which it may end."""
    command = [sys.executable, "-I", str(HERE / "trial.py"), str(library)]
    (done,) = _run(f"the trial of the library that {shlex.join(compiler)} makes", [command], TRIAL_SECONDS)
    if done.returncode == 0:
        return
    why = _lines(done)[-1]
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        why = f"it ends a process by {name}" + (", as code for another CPU does" if name == "SIGILL" else "")
    raise BuildError(f"the library that {shlex.join(compiler)} makes does not work here: {why}; use another CXX")


def _run(what: str, commands: Sequence[list[str]], seconds: float) -> list[Done]:
    """Run commands at the same time; return how each ended, with its output and errors as one text.

    After the time limit, and when this process is interrupted, all of them are killed with what they started.
    """
    deadline, running = time.monotonic() + seconds, list[subprocess.Popen[Any]]()
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        try:
            for command, output in zip(commands, outputs, strict=True):
                how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                # a group of its own: a script that is killed alone leaves the compiler that it started
                running.append(subprocess.Popen(command, process_group=0, **how))
            for process in running:
                while process.poll() is None:
                    left = deadline - time.monotonic()
                    try:
                        process.wait(max(0.0, min(left, BETWEEN_NOTES)))
                    except subprocess.TimeoutExpired:
                        if left <= BETWEEN_NOTES:
                            raise
                        done = sum(other.poll() is not None for other in running)
                        _note(f"{what}: {done} of {len(running)} have ended")
        except BaseException as error:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"{what} did not end within {seconds:.0f} s") from None
            if isinstance(error, OSError):  # the program cannot be run
                return [Done(command, -1, str(error)) for command in commands]
            raise
        texts = [(output.seek(0), output.read())[1].decode(errors="replace") for output in outputs]
    return [Done(process.args, process.returncode, text) for process, text in zip(running, texts, strict=True)]


def _note(words: str) -> None:
    """Print a line on the standard error: to compile takes seconds, and minutes on a busy machine."""
    print(f"dsmini: {words}", file=sys.stderr, flush=True)


def _first_error(done: Done) -> str:
    lines = _lines(done)
    return next((line for line in lines if "error" in line.lower()), lines[0])


def _lines(done: Done) -> list[str]:
    """Return the lines that a program printed, or its exit status if there are none."""
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] or [f"status {done.returncode}"]


def _gomp_parallel() -> int:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch has loaded, or 0."""
    for library in (None, *_runtimes_of_torch()):  # on Arm no symbol of the runtime is global
        with contextlib.suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(library, mode=ctypes.DEFAULT_MODE if library is None else os.RTLD_NOLOAD)
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


def _runtimes_of_torch() -> list[str]:
    """Return the paths of the OpenMP runtimes that torch's wheel brings."""
    torch_here = Path(torch.__file__).parent
    folders = (torch_here / "lib", torch_here.with_name("torch.libs"))
    names = ("libgomp*.so*", "libomp*.so*", "libiomp*.so*")
    return [str(path) for folder in folders for name in names for path in sorted(folder.glob(name))]
