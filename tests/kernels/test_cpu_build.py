"""The C++ kernels are built and cached; where that fails, plain PyTorch serves and one sentence says why."""

import dataclasses
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsmini import ops
from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build, processes
from tests.helpers.commands import ROOT
from tests.kernels.conftest import assert_same, quantize

SUCCEEDS = '[ "$1" = --version ] && exit 0'
BUILD = "from dsmini_kernels.cpu import build; print(build.library().path)"
USE = "import torch, dsmini.numerics as n; n.quantize_tiles(torch.ones(2, 3), (1, 128), 'ue8m0', 'e4m3', 1e-4);"


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
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait for what must come, also on a machine that is busy with something else."""
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come in 200 s")


@pytest.fixture
def cache(private_folder: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> Path:
    """Return the folder of an empty cache, which is not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(private_folder))
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    return private_folder / "dsmini" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that lets $CXX be a script of these lines."""

    def write(*lines: str) -> Path:
        script = tmp_path / "cxx"
        script.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return script

    return write


def gives(library: Path, also: str = "") -> tuple[str, ...]:
    """Return the lines of a compiler that makes a copy of the library, whatever the source, after other commands."""
    return SUCCEEDS, "for last; do :; done", also, f'cp {library} "$last"'


def assert_plain_code_serves(reason: str) -> None:
    """Check that plain PyTorch quantizes, and that one warning gives the reason."""
    x = torch.randn(3, 130)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [quantize(x)[0] for _ in range(3)]
    assert len(caught) == 1, "it is reported once"
    words = str(caught[0].message)
    assert "plain PyTorch runs instead: " in words and reason in words
    with ops.use("reference"):
        assert_same(got[2], quantize(x)[0])


def test_library_is_built_for_this_cpu_and_links_no_openmp() -> None:
    """A second runtime would spin on the cores of torch's. The library borrows that one, by an address.

    The other tests are skipped without a library. So this one fails where there is a compiler.
    """
    reason = cpu.why_not()
    if reason is not None and re.match(r"there is no C\+\+ compiler|the C\+\+ is written for", reason):
        pytest.skip(reason)
    assert reason is None
    library = build.library()
    assert library.isa == (os.environ.get(build.ISA_VARIABLE) or build.isas_here()[-1])
    assert re.fullmatch(r"[0-9a-f]{24}-[0-9a-f]{32}\.so", library.path.name)
    content = library.path.read_bytes()
    assert not any(name in content for name in (b"gomp", b"iomp", b"libomp"))


def test_cache_is_used_and_damaged_files_are_rebuilt(
    library: build.Library, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    whole = library.path.read_bytes()
    (cache / library.path.name).write_bytes(whole)
    builds: list[Path] = []

    def rebuild(_compiler: Any, _flags: Any, folder: Path, key: str, trial: bool) -> Path:
        path = folder / library.path.name
        assert path.name.startswith(key) and not path.exists()
        path.write_bytes(whole)
        builds.append(path)
        return path

    monkeypatch.setattr(build, "_build", rebuild)
    path = build.find_or_build(library.isa)
    assert path.parent == cache and not builds
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.unlink()
        path.write_bytes(damaged)
        assert build.find_or_build(library.isa).read_bytes() == whole
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
        ({"CXX": 'g++ "x'}, " is not a command: "),
    ],
)
def test_missing_compiler_is_reported_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert reason in (cpu.why_not() or "")
    assert_plain_code_serves(reason)
    with ops.use("cpu"), pytest.raises(ValueError, match="cannot run quantize"):
        quantize(torch.randn(3, 130))


def test_error_of_the_compiler_is_quoted(cache: Path, compiler: Callable[..., Path]) -> None:
    failing = compiler(SUCCEEDS, 'echo "in a.h"', 'echo "a.h:1: error: it is late"; exit 1')
    assert cpu.why_not() == f"{failing} failed: a.h:1: error: it is late"
    assert not list(cache.iterdir())


def test_environment_chooses_the_instruction_set(
    library: build.Library, monkeypatch: pytest.MonkeyPatch, fresh_door: None
) -> None:
    monkeypatch.setattr(build, "load", lambda isa: dataclasses.replace(library, isa=isa))
    monkeypatch.setattr(build, "isas_here", lambda: ["portable", "avx2"])
    for name, want in ((None, "avx2"), ("", "avx2"), ("avx2", "avx2"), ("portable", "portable")):
        if name is None:
            monkeypatch.delenv(build.ISA_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(build.ISA_VARIABLE, name)
        build.library.cache_clear()
        assert build.library().isa == want and want in cpu.describe()
    for name, reason in (("sse9", "is unknown"), ("avx512", "asks for instructions that this CPU lacks")):
        monkeypatch.setenv(build.ISA_VARIABLE, name)
        build.library.cache_clear()
        with pytest.raises(ValueError, match=f"DSMINI_CPU_ISA='{name}' {reason}"):
            cpu.why_not()


@pytest.mark.usefixtures("library")
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


@pytest.mark.slow
def test_processes_that_want_a_library_at_once_compile_it_once(
    library: build.Library, tmp_path: Path, cache: Path, compiler: Callable[..., Path]
) -> None:
    """The others wait for the one that builds. Nobody takes the remains of a killed build for a library."""
    notes, go = tmp_path / "compiles", tmp_path / "go"
    notes.touch()
    waits = f'echo "$(dirname "$last")" >> {notes}; while [ ! -e {go} ]; do sleep 0.1; done'
    compiler(*gives(library.path, waits))

    def folders() -> Counter[str]:
        return Counter(notes.read_text().split())

    killed = in_process(BUILD)
    wait_for(lambda: sum(folders().values()) == len(build.SOURCES))
    killed.kill()
    killed.communicate()
    (left,) = folders()
    ready = [tmp_path / f"ready {i}" for i in range(3)]  # all have loaded torch, and want the library
    others = [in_process(BUILD.replace("; ", f"; open({str(path)!r}, 'w'); ", 1)) for path in ready]
    wait_for(lambda: len(folders()) > 1 and all(path.exists() for path in ready))
    assert not list(cache.glob("*.so"))
    go.touch()
    (path,) = {Path(output(process).strip()) for process in others}
    assert {p.name for p in cache.iterdir()} == {Path(left).name, path.name}
    del (found := folders())[left]
    assert list(found.values()) == [len(build.SOURCES) + 1], "one process compiled each source once, and linked"


@pytest.mark.slow
def test_built_library_is_private_under_any_umask(
    library: build.Library, cache: Path, compiler: Callable[..., Path]
) -> None:
    compiler(*gives(library.path))
    before = os.umask(0)
    try:
        path = build.find_or_build(library.isa)
    finally:
        os.umask(before)
    assert path.parent == cache
    assert {p.stat().st_mode & 0o777 for p in (path, path.parent, path.parent.parent)} == {0o700}


OTHERS = " ".join(f"long dsmini_{name}() {{ return 0; }}" for name in build.ENTRIES if name != "tiles")
BROKEN = {
    "trap at a call": ("long dsmini_tiles() { __builtin_trap(); } " + OTHERS, "SIG"),
    "trap at load": ("__attribute__((constructor)) void f() { __builtin_trap(); }", "it ends a process by SIG"),
    "no such function": ("int f;", "it cannot be loaded: "),
    "wrong values": ("long dsmini_tiles() { return 0; } " + OTHERS, "wrong values"),
    "no end": ("long dsmini_tiles() { for (;;); } " + OTHERS, "did not end within 1 s"),
    "no file": (None, "does not work here: it cannot be loaded: "),
}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=list(BROKEN))
def test_new_library_is_tried_in_another_process(
    library: build.Library,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: Callable[..., Path],
    source: str | None,
    reason: str,
) -> None:
    broken = tmp_path / "broken.so"
    if source is not None:
        (tmp_path / "broken.cpp").write_text(f'extern "C" {{ {source} }}')
        subprocess.run([*build.find_compiler(), "-shared", "-fPIC", "-o", broken, tmp_path / "broken.cpp"], check=True)
    compiler(*(gives(broken) if source else ("exit 0",)))
    if reason.startswith("did not end"):
        monkeypatch.setattr(build, "TRIAL_SECONDS", 1.0)
    assert_plain_code_serves(reason)
    assert not list(cache.iterdir())


@pytest.mark.slow
def test_library_that_does_not_load_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"junk")
    monkeypatch.setattr(build, "find_or_build", lambda _: tmp_path / "x.so")
    assert (cpu.why_not() or "").startswith("the compiled library cannot be loaded: ")


ENDLESS = {"prints": "exec yes", "hangs": "sleep 1000 & echo $! >> {0}; echo it hangs; wait"}


@pytest.mark.slow
@pytest.mark.parametrize("when", ["version", "compile"])
@pytest.mark.parametrize("does", ENDLESS)
def test_compiler_without_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: Callable[..., Path], does: str, when: str
) -> None:
    """With what it has started, until when the clock stands still."""
    started = tmp_path / "started"
    compiler(*([SUCCEEDS] if when == "compile" else []), f"echo $$ >> {started}", ENDLESS[does].format(started))

    def clock() -> float:
        return 1e9 if does == "hangs" and started.exists() and started.read_text().count("\n") > 1 else 0.0

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=clock))
    reason = "did not end within [0-9]+ s" if does == "hangs" else "failed: it prints more than 1,000,000 bytes"
    assert re.fullmatch(rf".*/cxx( --version)? {reason}", cpu.why_not() or "")
    wait_for(lambda: not any(map(is_running, started.read_text().split())))


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
def test_only_one_openmp_is_loaded(library: build.Library) -> None:
    code = (
        USE
        + "torch.set_num_threads(2); x = torch.randn(1024, 512); x @ x.T;"
        + "n.round_tiles(x, (1, 128), 'ue8m0', 'e4m3', 1e-4, torch.bfloat16);"
        + "print(open('/proc/self/maps').read())"
    )
    mapped = {line.split("/")[-1] for line in output(in_process(code)).splitlines() if ".so" in line}
    assert library.path.name in mapped
    assert sum(any(name in path for name in ("gomp", "iomp", "libomp")) for path in mapped) == 1, mapped
