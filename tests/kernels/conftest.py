"""Fixtures for the tests of C++ kernels; nothing is built before a test needs it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini_kernels.cpu import build, panels, steps
from dsmini_kernels.cpu import tiles as wrapper
from tests.helpers.cpu_kernels import LIBRARY


@pytest.fixture(params=[name for name, number in build.ISA_NUMBERS.items() if number])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each instruction set that this CPU has, one after the other."""
    library, number = build.library(), build.ISA_NUMBERS[request.param]
    if number > library.isa:
        pytest.skip(f"this CPU has no {request.param}")
    forced = dataclasses.replace(library, isa=number, isa_name=request.param)
    monkeypatch.setattr(wrapper, "library", lambda: forced)
    return request.param


@pytest.fixture(params=[name for name, number in build.ISA_NUMBERS.items() if number])
def every_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Do the same for products and steps."""
    number = build.ISA_NUMBERS[request.param]
    if number > LIBRARY.isa:
        pytest.skip(f"this CPU has no {request.param}")
    forced = dataclasses.replace(LIBRARY, isa=number)
    for module in (steps, panels):
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
def fresh_door() -> Iterator[None]:
    """Let ops look for backends again, in the test and after it."""
    ops._load.cache_clear()
    build.library.cache_clear()
    yield
    ops._load.cache_clear()
    build.library.cache_clear()
