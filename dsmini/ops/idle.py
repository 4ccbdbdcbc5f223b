"""Kernels that check their calls, make their results, and compute nothing: for counts of what would run."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

Fill = Callable[[str, Any], None]
"""Receiver of a kernel's name and of its results, which it may write into."""
_fill: ContextVar[Fill | None] = ContextVar("fill", default=None)


@contextmanager
def without_running(fill: Fill) -> Iterator[None]:
    """Let kernels on CPUs check their calls and make their results, but compute nothing.

    Args:
        fill: receives the name and the unwritten results of each counted kernel. It writes those on which shapes
            depend.
    """
    try:
        idle = importlib.import_module("dsmini_kernels.cpu").without_running()
    except ImportError:  # there are none
        idle = nullcontext()
    token = _fill.set(fill)
    try:
        with idle:
            yield
    finally:
        _fill.reset(token)


def filled(name: str, result: Any) -> None:
    """Let the receiver, if there is one, write into the results of a kernel."""
    if (fill := _fill.get()) is not None:
        with torch._C._DisableTorchDispatch():
            fill(name, result)
