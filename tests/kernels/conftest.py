"""Fixtures for the tests of kernels. Nothing is built before a test needs it; slow ones build for other CPUs too."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsmini import ops
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build, folder, muon, norms, panels, picks, steps, tiles
from tests.helpers.cpu_kernels import guarded, load

NAMED = os.environ.get(build.ISA_VARIABLE) or build.isas_here()[-1]
"""The instruction set of this process: the best of this CPU, or another that DSMINI_CPU_ISA names."""


@pytest.fixture(scope="session")
def library() -> build.Library:
    """Return the compiled library, or skip the test where there is none."""
    reason = cpu.why_not()
    if reason is not None:
        pytest.skip(reason)
    return build.library()


@pytest.fixture(params=[name if name == NAMED else pytest.param(name, marks=pytest.mark.slow) for name in build.ISAS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, library: build.Library) -> str:
    """Force each instruction set that this CPU has, one after the other; at most the one that DSMINI_CPU_ISA names."""
    name, names = request.param, list(build.ISAS)
    if name not in build.isas_here() or names.index(name) > names.index(library.isa):
        pytest.skip(f"this CPU has no {name}")
    forced = load(name)
    for module in (tiles, steps, panels, norms, picks, muon):
        monkeypatch.setattr(module, "library", lambda: forced)
    return name


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
