"""The C++ kernels are built and cached where nobody else can change them; where that fails, plain PyTorch serves."""

import ctypes
import itertools
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ops
from dsmini.nn.layers import linear
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build, folder
from tests.helpers.commands import ROOT
from tests.kernels.conftest import assert_same, quantize

SUCCEEDS = '[ "$1" = --version ] && exit 0'
STRANGER = 12345


def in_process(code: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait for what must come, also on a machine that is busy with something else."""
    for _ in range(10_000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not come in 200 s")


@pytest.fixture
def cache(private_folder: Path, monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> Path:
    """Return the folder of an empty cache, which is not made yet, next to one for temporary files."""
    (private_folder / "tmp").mkdir(mode=0o700)
    monkeypatch.setattr(folder.tempfile, "gettempdir", lambda: str(private_folder / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(private_folder / "cache"))
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    return private_folder / "cache" / "dsmini" / "kernels"


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
    assert "plain PyTorch runs instead: " in words and re.search(reason, words)
    with ops.use("reference"):
        assert_same(got[2], quantize(x)[0])
    with ops.use("cpu"), pytest.raises(ValueError, match="cannot run quantize"):
        quantize(x)


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
    assert re.fullmatch(r"[0-9a-f]{24}-[0-9a-f]{8}-[0-9a-f]{32}\.so", library.paths["rounding"].name)
    for name in itertools.chain(*build.FUNCTIONS.values()):
        assert library.entry(name)
    for path in library.paths.values():
        assert not any(name in path.read_bytes() for name in (b"gomp", b"iomp", b"libomp"))


@pytest.mark.parametrize("system", ["", "-U__linux__"], ids=["here", "elsewhere"])
def test_threads_of_an_idle_team_sleep(system: str, tmp_path: Path) -> None:
    """Elsewhere than on Linux too, where they cannot wait for a change and look again and again."""
    main = tmp_path / "main.cpp"
    main.write_text("""#include "team.h"
        #include <stdio.h>
        #include <time.h>
        int main() {
          { Team team(2); team.each(4, [](int64_t, int64_t) {}); }
          const timespec idle{0, 500000000};
          nanosleep(&idle, nullptr);
          printf("%f", double(clock()) / CLOCKS_PER_SEC);
        }""")
    compiler, program = build.find_compiler() or pytest.skip("there is no C++ compiler"), str(tmp_path / "team")
    flags = ("-std=c++17", f"-I{build.HERE}", "-pthread", *filter(None, [system]))
    subprocess.run([*compiler, *flags, str(main), str(build.HERE / "team.cpp"), "-o", program], check=True)
    assert float(subprocess.check_output([program])) < 0.02


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "", "PATH": "/nowhere"}, r"there is no C\+\+ compiler"),
        ({"CXX": "/no/such/compiler -x"}, "CXX=/no/such/compiler is not a program"),
        ({"CXX": 'g++ "x'}, " is not a command: "),
    ],
)
def test_missing_compiler_is_reported_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_plain_code_serves(reason)


def test_error_of_the_compiler_is_quoted_after_a_note(
    cache: Path, compiler: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    failing = compiler(SUCCEEDS, 'echo "in a.h"', 'echo "a.h:1: error: it is late"; exit 1')
    assert cpu.why_not() == f"{failing} failed: a.h:1: error: it is late"
    assert "dsmini: compiling the kernels for rounding in C++, once on this machine" in capfd.readouterr().err
    assert not list(cache.iterdir())


def test_kernels_whose_library_cannot_be_built_are_plain(
    library: build.Library, monkeypatch: pytest.MonkeyPatch, fresh_door: None
) -> None:
    """The library for prompts is there, that for decoding is not: the disk is full, or the compiler was killed."""

    def fail(isa: str, part: str, others: object = ()) -> Path:
        tried.append(part)
        raise build.BuildError("it is late")

    tried: list[str] = []
    x, w = torch.randn(2, 8), torch.randn(3, 8).bfloat16()
    assert cpu.why_not() is None
    monkeypatch.setattr(build, "find_or_build", fail)
    with torch.no_grad(), pytest.warns(UserWarning, match="linear is out, plain PyTorch runs instead: it is late"):
        assert torch.equal(linear(x, w), x @ w.float().T)
    refused = pytest.raises(ValueError, match="cannot run linear: it is late")
    with ops.use("cpu"), pytest.warns(UserWarning, match="it is late"), refused:
        linear(x, w)
    assert tried == ["decoding"], "a library that cannot be built is tried once"


def test_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch, fresh_door: None) -> None:
    monkeypatch.setattr(build, "isas_here", lambda: ["portable", "avx2"])
    for name, want in (("", "avx2"), ("avx2", "avx2"), ("portable", "portable")):
        monkeypatch.setenv(build.ISA_VARIABLE, name)
        build.library.cache_clear()
        assert build.library().isa == want and want in cpu.describe()
    for name, reason in (("sse9", "is unknown"), ("avx512", "asks for instructions that this CPU lacks")):
        monkeypatch.setenv(build.ISA_VARIABLE, name)
        build.library.cache_clear()
        with pytest.raises(ValueError, match=f"DSMINI_CPU_ISA='{name}' {reason}"):
            cpu.why_not()


# --- the cache


def test_cache_is_used_and_damaged_or_planted_files_are_not(
    library: build.Library, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True, mode=0o700)
    loaded = library.paths["rounding"]
    whole, path = loaded.read_bytes(), cache / loaded.name
    path.write_bytes(whole)
    path.chmod(0o700)
    builds: list[Path] = []

    def rebuild(_compiler: Any, _flags: Any, folder: Path, keys: dict[str, str], trial: bool) -> dict[str, Path]:
        assert path.name.startswith(f"{keys['rounding']}-") and folder == cache
        builds.append(path)
        return {"rounding": path}

    monkeypatch.setattr(build, "_build", rebuild)
    assert build.find_or_build(library.isa, "rounding") == path and not builds
    planted: list[Callable[[], object]] = [
        *(lambda damaged=damaged: path.write_bytes(damaged) for damaged in (whole[:99], whole[:-1] + b"?")),
        lambda: (path.write_bytes(whole), path.chmod(0o770)),
        lambda: path.symlink_to(loaded),
        lambda: os.mkfifo(path),
        path.mkdir,
    ]
    for number, plant in enumerate(planted, 1):
        path.unlink(missing_ok=True)
        plant()
        build.find_or_build(library.isa, "rounding")
        assert len(builds) == number
    path.rmdir()
    path.write_bytes(whole)
    monkeypatch.setattr(build, "can_write", lambda _: False)
    assert build.find_or_build(library.isa, "rounding") == path and len(builds) == len(planted), (
        "it is read all the same"
    )
    key = build._key(build.FLAGS, "rounding")
    assert key != build._key((*build.FLAGS, "-g"), "rounding"), "flags are part of the key"
    assert key != build._key(build.FLAGS, "decoding"), "sources are part of the key"
    monkeypatch.setattr(build, "find_compiler", tuple)
    assert build.find_or_build(library.isa, "rounding") == path, "where there is no compiler, that of any serves"


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.lchown(path, STRANGER, -1)


def link_to(path: Path, target: str) -> None:
    path.rename(path.with_name("away"))
    path.symlink_to(target)


UNTRUSTED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "world-writable cache": ("../..", lambda path: path.chmod(0o777), "others can write to"),
    "group-writable parent": ("../../..", lambda path: path.chmod(0o770), "others can write to"),
    "group-writable kernels": (".", lambda path: path.chmod(0o775), "others can write to"),
    "sticky kernels": (".", lambda path: path.chmod(0o1777), "others can write to"),
    "link to a writable folder": (".", lambda path: link_to(path, "../open"), "others can write to .*/open "),
    "another user's cache": ("../..", give_away, f"belongs to user {STRANGER}"),
    "another user's kernels": (".", give_away, f"belongs to user {STRANGER}"),
}


@pytest.mark.parametrize("name", UNTRUSTED)
def test_cache_that_others_can_change_is_not_used(
    cache: Path, private_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A private folder for temporary files serves instead, and a warning says so."""
    place, change, reason = UNTRUSTED[name]
    folder.user_cache()
    (private_folder / "cache" / "open").mkdir()
    (private_folder / "cache" / "open").chmod(0o777)
    change((cache / place).resolve())
    with pytest.raises(folder.UntrustedFolderError, match=reason):
        folder.user_cache()
    if place == "../../..":  # temporary files lie there too
        with pytest.raises(build.BuildError, match=r"no folder .* can be written; others can write to"):
            build.find_or_build("portable", "rounding")
        return
    monkeypatch.setattr(build, "_build", lambda _c, _f, place, keys, **__: dict.fromkeys(keys, place))
    with pytest.warns(UserWarning, match=f"compiled kernels are stored in .*, because .*{reason}.* \\(chmod go-w"):
        used = build.find_or_build("portable", "rounding")
    assert used == private_folder / "tmp" / f"dsmini-kernels-{os.geteuid()}"
    used.chmod(0o777)
    with pytest.raises(folder.UntrustedFolderError):
        folder.shared_temporary()


def test_runtime_of_torch_is_found_where_no_symbol_of_it_is_global(monkeypatch: pytest.MonkeyPatch) -> None:
    want, load = build._gomp_parallel(), ctypes.CDLL
    if not want or not build._runtimes_of_torch():
        pytest.skip("this torch brings no libgomp")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *how, **more: load(name, *how, **more) if name else object())
    assert build._gomp_parallel() == want
    monkeypatch.setattr(build, "_runtimes_of_torch", lambda: ["/nowhere/libgomp.so"])
    assert build._gomp_parallel() == 0


def test_folder_with_a_name_of_any_bytes_is_compiled(
    cache: Path, compiler: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name may be no text in the locale."""
    place = tmp_path / os.fsdecode(b"\xe9")
    try:
        place.symlink_to(build.HERE)
    except OSError:
        pytest.skip("names are UTF-8 here")
    monkeypatch.setattr(build, "HERE", place)
    compiler(SUCCEEDS, "exit 1")
    with pytest.raises(build.BuildError, match="cxx failed"):
        build.find_or_build("portable", "rounding")


def test_user_without_home_gets_the_temporary_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", str)
    monkeypatch.chdir(cache.parents[2])
    assert [*build._folders(refused := [])] == [folder.shared_temporary()] and refused == []
    assert not Path("~").exists()


def test_own_folders_are_private_under_any_umask_and_behind_links(cache: Path, private_folder: Path) -> None:
    before = os.umask(0)
    try:
        made = folder.user_cache()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (made, *list(made.parents)[:2])} == {0o700}
    (private_folder / "cache").chmod(0o1777)  # as /tmp: what lies in it can be moved by its owner alone
    made.chmod(0o755)
    assert folder.user_cache() == cache and cache.stat().st_mode & 0o777 == 0o700
    link_to(private_folder / "cache", "away")
    assert folder.user_cache() == private_folder / "away" / "dsmini" / "kernels"


EXPECTED = """
from dsmini_kernels.cpu import build
library = build.library()
library.expect(["linear", "tiles"])
assert library.entry("tiles") and library.paths.keys() == {"rounding"}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("broken", "built"), [("", 2), ("*tiles.cpp* | *_linear_*", 0), ("*_linear_*", 1)])
def test_expected_libraries_are_made_in_one_run_of_the_compiler(
    library: build.Library, tmp_path: Path, cache: Path, compiler: Callable[..., Path], broken: str, built: int
) -> None:
    """One that cannot be built stops no other, and fails when it is wanted."""
    notes, copy = tmp_path / "compiles", gives(library.paths["rounding"])
    fails = f'case "$*" in {broken}) exit 1 ;; esac' if broken else ""
    compiler(*copy[:2], f'echo "$(dirname "$last")" >> {notes}', fails, copy[3])
    process = in_process(EXPECTED)
    said = process.communicate()[0]
    made = Counter(notes.read_text().split())
    once = len({*build._units("rounding"), *build._units("decoding")}) + 2
    if not built:
        assert process.returncode == 1 and "cxx failed" in said
    else:
        assert process.returncode == 0 and len([*cache.glob("*.so")]) == built, said
        assert built == 1 or [*made.values()] == [once], "each unit was compiled once"


@pytest.mark.slow
def test_processes_that_want_a_library_at_once_compile_it_once(
    library: build.Library, tmp_path: Path, cache: Path, compiler: Callable[..., Path]
) -> None:
    """The others wait for the one that builds. Nobody takes the remains of a killed build for a library."""
    notes, go = tmp_path / "compiles", tmp_path / "go"
    notes.touch()
    waits = f'echo "$(dirname "$last")" >> {notes}; while [ ! -e {go} ]; do sleep 0.1; done'
    compiler(*gives(library.paths["rounding"], waits))
    find = f"print(build.find_or_build({library.isa!r}, 'rounding'))"
    code = "import torch; from dsmini_kernels.cpu import build; open({!r}, 'w'); " + find

    def folders() -> Counter[str]:
        return Counter(notes.read_text().split())

    ready = [tmp_path / f"ready {i}" for i in range(3)]  # all have loaded torch, and want the library
    killed = in_process(code.format(str(ready[0])))
    wait_for(lambda: sum(folders().values()) >= 1)
    killed.kill()
    killed.communicate()
    (left,) = folders()
    others = [in_process(code.format(str(path))) for path in ready]
    wait_for(lambda: len(folders()) > 1 and all(path.exists() for path in ready))
    assert not list(cache.glob("*.so"))
    go.touch()
    (path,) = {Path(process.communicate()[0].splitlines()[-1]) for process in others}
    assert {p.name for p in cache.iterdir()} == {Path(left).name, path.name}
    assert path.stat().st_mode & 0o777 == 0o700
    del (found := folders())[left]
    assert list(found.values()) == [len(build._units("rounding")) + 1], (
        "one process compiled each unit once, and linked"
    )


BROKEN = {
    "trap at a call": ("const char* dsmini_try() { __builtin_trap(); }", "it ends a process by SIG"),
    "no such function": ("int f;", "it cannot be loaded: "),
    "wrong values": ('const char* dsmini_try() { return "tiles"; }', "a call failed: tiles"),
    "no end": ("const char* dsmini_try() { for (;;); }", "did not end within 1 s"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_new_library_is_tried_in_another_process(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[..., Path], name: str
) -> None:
    source, reason = BROKEN[name]
    broken = tmp_path / "broken.so"
    (tmp_path / "broken.cpp").write_text(f'extern "C" {{ {source} }}')
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", "-o", broken, tmp_path / "broken.cpp"], check=True)
    compiler(*gives(broken))
    if reason.startswith("did not end"):
        monkeypatch.setattr(build, "TRIAL_SECONDS", 1.0)
    assert_plain_code_serves(reason)
    assert not list(cache.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["version", "compile"])
def test_compiler_without_end_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: Callable[..., Path], when: str
) -> None:
    started = tmp_path / "started"
    compiler(*([SUCCEEDS] * (when == "compile")), f"echo $$ >> {started}; sleep 1000 & echo $! >> {started}; wait")
    monkeypatch.setattr(build, "VERSION_SECONDS", 2.0)
    monkeypatch.setattr(build, "BUILD_SECONDS", 2.0)
    assert re.fullmatch(r".*/cxx( --version)? did not end within 2 s", cpu.why_not() or "")
    wait_for(lambda: not any(map(is_running, started.read_text().split())))


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
