"""Enter the C++, or describe its calls without running them."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_runs: ContextVar[bool] = ContextVar("runs", default=True)
"""False inside `without_running`."""


def enter(entry: "ctypes._NamedFuncPointer", call: bytes) -> int:
    """Run a function of the library and return its error, or 0; inside `without_running` do nothing."""
    return entry(call, len(call)) if _runs.get() else 0


@contextmanager
def without_running() -> Iterator[None]:
    """Let calls inside the context be checked and described, and compute nothing: their results are not written."""
    token = _runs.set(False)
    try:
        yield
    finally:
        _runs.reset(token)
