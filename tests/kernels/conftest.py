"""Fixtures for the tests of kernels. Nothing is built before a test needs it; slow ones build for other CPUs too."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsmini import ops
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build, folder, muon, norms, panels, picks, steps, tiles
from tests.helpers.gpu import gpu_device
from tests.helpers.kernels import ISAS, Kernels, guarded, load


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        gpu_device()


@pytest.fixture(scope="session")
def library() -> build.Library:
    """Return the compiled library, or skip the test where there is none."""
    reason = cpu.why_not()
    if reason is not None:
        pytest.skip(reason)
    return build.library()


def force(name: str, monkeypatch: pytest.MonkeyPatch, library: build.Library) -> str:
    """Force an instruction set; skip the test if this CPU lacks it, or DSMINI_CPU_ISA names one before it."""
    names = list(build.ISAS)
    if name not in build.isas_here() or names.index(name) > names.index(library.isa):
        pytest.skip(f"this CPU has no {name}")
    forced = load(name)
    for module in (tiles, steps, panels, norms, picks, muon):
        monkeypatch.setattr(module, "library", lambda: forced)
    return name


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, library: build.Library) -> str:
    """Force each instruction set that this CPU has, one after the other."""
    return force(request.param, monkeypatch, library)


@pytest.fixture(params=[*ISAS, pytest.param("triton", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Provide the kernels of tiles of each instruction set, and Triton's. Outputs lie between guards."""
    if request.param != "triton":
        force(request.param, monkeypatch, request.getfixturevalue("library"))
        with guarded(tiles):
            yield Kernels()
        return
    device = gpu_device()
    pytest.importorskip("triton", reason="Triton is not installed")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's kernels run on a CPU with TRITON_INTERPRET=1 alone")
    from dsmini_kernels.triton import tiles as module

    with guarded(module):
        yield Kernels("triton", device)


@pytest.fixture
def guarded_outputs() -> Iterator[None]:
    """Fill new memory with garbage before a kernel of tiles writes it, and check the memory around it."""
    with guarded(tiles):
        yield


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def serves_all(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, without_gradients: None) -> None:
    """Serve products of any size, without gradients, and fill outputs with NaN before a kernel writes them."""
    monkeypatch.setattr(panels, "LEAST", 0)


@pytest.fixture
def private_folder(tmp_path: Path) -> Path:
    """Return the real path of a temporary folder, or skip the test where others can change all of them."""
    try:
        return folder.private(tmp_path, own=1)
    except folder.UntrustedFolderError as error:
        pytest.skip(f"the folder for temporary files does not do for compiled code: {error}")


@pytest.fixture
def fresh_door() -> Iterator[None]:
    """Let ops look for backends again, in the test and after it."""
    ops._load.cache_clear()
    build.library.cache_clear()
    yield
    ops._load.cache_clear()
    build.library.cache_clear()
