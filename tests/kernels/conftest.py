"""Fixtures for the tests of C++ kernels; nothing is built before a test needs it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini_kernels.cpu import build, norms, panels, picks, steps
from dsmini_kernels.cpu import tiles as wrapper
from tests.helpers.cpu_kernels import library_of


@pytest.fixture(params=list(build.ISAS))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each instruction set that this CPU has, one after the other."""
    forced = library_of(request.param)
    monkeypatch.setattr(wrapper, "library", lambda: forced)
    return request.param


@pytest.fixture(params=list(build.ISAS))
def every_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do the same for products and steps."""
    forced = library_of(request.param)
    for module in (steps, panels, norms, picks):
        monkeypatch.setattr(module, "library", lambda: forced)
    return request.param


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill outputs with garbage before a kernel writes them."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros(*args, **kwargs)
        if out.numel():
            out.view(torch.uint8).fill_(0xA5)
        return out

    class Poisoned:
        def __getattr__(self, name: str) -> Any:
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(wrapper, "torch", Poisoned())


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_door() -> Iterator[None]:
    """Let ops look for backends again, in the test and after it."""
    ops._load.cache_clear()
    build.library.cache_clear()
    yield
    ops._load.cache_clear()
    build.library.cache_clear()
