"""The C++ kernels are built and cached; where that fails, plain PyTorch serves and one sentence says why."""

import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ops
from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build
from tests.helpers.cpu_kernels import ISAS, LIBRARY, REFERENCE, assert_same, quantize

ROOT = Path(__file__).parents[2]


def in_process(code: str, **env: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output(process: "subprocess.Popen[str]") -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


USE = "import torch, dsmini.numerics as n; n.quantize_tiles(torch.ones(2, 3), (1, 128), 'ue8m0', 'e4m3', 1e-4);"
BUILD = "from dsmini_kernels.cpu import build; print(build.library().path)"


def test_many_processes_build_at_once(tmp_path: Path) -> None:
    """Check that one library is left and nothing else; nobody takes the remains of a killed build for a library."""
    cache = str(tmp_path)
    folder = tmp_path / "dsmini" / "kernels"
    killed = in_process(BUILD, XDG_CACHE_HOME=cache)
    for _ in range(600):
        if folder.exists() and list(folder.glob("building-*/*")):
            break
        threading.Event().wait(0.02)
    killed.kill()
    killed.communicate()
    assert not list(folder.glob("*.so"))
    paths = {output(process).strip() for process in [in_process(BUILD, XDG_CACHE_HOME=cache) for _ in range(2)]}
    assert len(paths) == 1 and [str(p) for p in folder.glob("*.so")] == list(paths)


def test_second_process_waits_for_the_first(tmp_path: Path) -> None:
    """Check that the sources are compiled once: a compiler notes each, and makes a copy of the library."""
    folder, compiles = tmp_path / "dsmini" / "kernels", tmp_path / "compiles"
    give = compiler_that_gives(LIBRARY.path, tmp_path, f"sleep 1; echo >> {compiles}")
    started = [in_process(BUILD, XDG_CACHE_HOME=str(tmp_path), CXX=give) for _ in range(3)]
    paths = {output(process).strip() for process in started}
    assert [str(p) for p in folder.iterdir()] == list(paths)
    assert compiles.read_text().count("\n") == len(build.SOURCES) + 1, "they are compiled and linked once"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> Path:
    """Make a cache that holds a copy of the library."""
    folder = tmp_path / "dsmini" / "kernels"
    folder.mkdir(parents=True)
    (folder / LIBRARY.path.name).write_bytes(LIBRARY.path.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder


def test_cache_is_used_and_damaged_files_are_rebuilt(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def rebuild(_compiler: Any, _flags: Any, folder: Path, key: str, trial: bool) -> Path:
        path = folder / LIBRARY.path.name
        assert path.name.startswith(key) and not path.exists()
        path.write_bytes(LIBRARY.path.read_bytes())
        builds.append(path)
        return path

    monkeypatch.setattr(build, "_build", rebuild)
    path = build.find_or_build(LIBRARY.isa)
    assert path.parent == own_cache and not builds
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.unlink()
        path.write_bytes(damaged)
        assert build.find_or_build(LIBRARY.isa).read_bytes() == whole
    assert len(builds) == 3
    monkeypatch.setattr(build, "HEADERS", build.HEADERS[:2])
    key = build._key(build.find_compiler(), build.FLAGS)
    assert not path.name.startswith(key), "sources are part of the key"
    assert key != build._key(build.find_compiler(), (*build.FLAGS, "-g")), "flags are part of the key"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "", "PATH": "/nowhere"}, "there is no C++ compiler"),
        ({"CXX": "/no/such/compiler -x"}, "CXX=/no/such/compiler is not a program"),
    ],
)
def test_missing_compiler_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, fresh_door: None, environment: dict[str, str], reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    assert reason in (cpu.why_not() or "")
    x = torch.randn(3, 130)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [quantize(x) for _ in range(3)]
    assert len(caught) == 1 and reason in str(caught[0].message), "it is reported once"
    assert_same(got[0][0], REFERENCE["quantize"](x, (1, 128), "ue8m0", "e4m3", 1e-4)[0])
    with ops.use("cpu"), pytest.raises(ValueError, match="cannot run quantize"):
        quantize(x)


@pytest.mark.parametrize("cxx", ["true", 'g++ "x'])
def test_compiler_that_makes_nothing_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None, cxx: str
) -> None:
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert re.match(r".* does not work here: it cannot be loaded: |CXX=.* is not a command: ", cpu.why_not() or "")
    with pytest.warns(UserWarning, match="plain PyTorch runs instead"):
        quantize(torch.randn(3, 130))


def test_library_that_does_not_load_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None
) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"junk")
    monkeypatch.setattr(build, "find_or_build", lambda _: path)
    assert (cpu.why_not() or "").startswith("the compiled library cannot be loaded: ")


def test_error_of_the_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> None:
    failing = tmp_path / "cxx"
    failing.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "in a.h"\necho "a.h:1: error: it is late"; exit 1\n'
    )
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu.why_not() == f"{failing} failed: a.h:1: error: it is late"
    assert not list((tmp_path / "dsmini" / "kernels").iterdir())


def compiler_that_gives(library: Path, folder: Path, also: str = "") -> str:
    """Return a $CXX that makes a copy of the library, whatever the source, after other commands."""
    script = folder / "cxx"
    lines = ("#!/bin/sh", '[ "$1" = --version ] && exit 0', also, "for last; do :; done", f'cp {library} "$last"')
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    return str(script)


def test_built_library_is_private_under_any_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None
) -> None:
    monkeypatch.setenv("CXX", compiler_that_gives(LIBRARY.path, tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0)
    try:
        path = build.find_or_build(LIBRARY.isa)
    finally:
        os.umask(before)
    assert path.parent == tmp_path / "dsmini" / "kernels"
    assert {p.stat().st_mode & 0o777 for p in (path, path.parent, path.parent.parent)} == {0o700}


OTHERS = " ".join(f"long dsmini_{name}() {{ return 0; }}" for name in build.ENTRIES if name != "tiles")
BROKEN = {
    "trap at a call": ("long dsmini_tiles() { __builtin_trap(); } " + OTHERS, "SIG"),
    "trap at load": ("__attribute__((constructor)) void f() { __builtin_trap(); }", "it ends a process by SIG"),
    "no such function": ("int f;", "it cannot be loaded: "),
    "wrong values": ("long dsmini_tiles() { return 0; } " + OTHERS, "wrong values"),
    "no end": ("long dsmini_tiles() { for (;;); } " + OTHERS, "did not end within 1 s"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=list(BROKEN))
def test_new_library_is_tried_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None, source: str, reason: str
) -> None:
    (tmp_path / "broken.cpp").write_text(f'extern "C" {{ {source} }}')
    broken = tmp_path / "broken.so"
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", "-o", broken, tmp_path / "broken.cpp"], check=True)
    monkeypatch.setenv("CXX", compiler_that_gives(broken, tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    if reason.startswith("did not end"):
        monkeypatch.setattr(build, "TRIAL_SECONDS", 1.0)
    x = torch.randn(3, 130)
    with pytest.warns(UserWarning, match=f"plain PyTorch runs instead: .*{reason}") as caught:
        got = [quantize(x) for _ in range(2)]
    assert len(caught) == 1
    assert_same(got[1][0], REFERENCE["quantize"](x, (1, 128), "ue8m0", "e4m3", 1e-4)[0])
    assert not list((tmp_path / "dsmini" / "kernels").iterdir())


@pytest.mark.parametrize("first_line", ["", '[ "$1" = --version ] && exit 0'], ids=["version", "compile"])
def test_compiler_that_prints_without_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None, first_line: str
) -> None:
    script = tmp_path / "cxx"
    script.write_text(f"#!/bin/sh\n{first_line}\necho $$ >> {tmp_path}/printers\nexec yes\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "VERSION_SECONDS", 2.0)
    monkeypatch.setattr(build, "BUILD_SECONDS", 2.0)
    assert re.fullmatch(r".*/cxx( --version)? failed: it prints more than 1,000,000 bytes", cpu.why_not() or "")
    assert not [process for process in (tmp_path / "printers").read_text().split() if is_running(process)]


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("first_line", ["", '[ "$1" = --version ] && exit 0'], ids=["version", "compile"])
def test_compiler_that_hangs_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None, first_line: str
) -> None:
    script = tmp_path / "cxx"
    script.write_text(f"#!/bin/sh\n{first_line}\nsleep 1000 &\necho $! >> {tmp_path}/sleepers\nwait\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "VERSION_SECONDS", 2.0)
    monkeypatch.setattr(build, "BUILD_SECONDS", 2.0)
    assert re.fullmatch(r".*/cxx( --version)? did not end within 2 s", cpu.why_not() or "")
    for process in (tmp_path / "sleepers").read_text().split():
        for _ in range(1000):
            if not is_running(process):
                break
            threading.Event().wait(0.02)
        assert not is_running(process)


def test_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> None:
    for name in ISAS:
        monkeypatch.setenv(build.ISA_VARIABLE, name)
        build.library.cache_clear()
        assert build.library().isa == name and name in cpu.describe()
    monkeypatch.setenv(build.ISA_VARIABLE, "sse9")
    build.library.cache_clear()
    with pytest.raises(ValueError, match="DSMINI_CPU_ISA='sse9' is unknown"):
        cpu.why_not()
    monkeypatch.setattr(build, "isas_here", lambda: ["portable"])
    monkeypatch.setenv(build.ISA_VARIABLE, "avx2")
    with pytest.raises(ValueError, match="DSMINI_CPU_ISA='avx2' asks for instructions that this CPU lacks"):
        cpu.why_not()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
def test_only_one_openmp_is_loaded() -> None:
    code = (
        USE
        + "torch.set_num_threads(2); x = torch.randn(1024, 512); x @ x.T;"
        + "n.round_tiles(x, (1, 128), 'ue8m0', 'e4m3', 1e-4, torch.bfloat16);"
        + "print(open('/proc/self/maps').read())"
    )
    mapped = {line.split("/")[-1] for line in output(in_process(code)).splitlines() if ".so" in line}
    assert LIBRARY.path.name in mapped
    assert sum(any(name in path for name in ("gomp", "iomp", "libomp")) for path in mapped) == 1, mapped


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_default_dtype_and_device_do_not_change_results(default: torch.dtype) -> None:
    x = torch.randn(40, 512)
    want = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            got = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)
            values = round_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4, torch.float32)
            back = dequantize_tiles(*got, (1, 128))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got[1].dtype == torch.float32 and torch.equal(got[1], want[1])
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(values, back)
