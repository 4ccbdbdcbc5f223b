"""Enter the C++, or describe its calls without running them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.build import STRUCTS, BuildError, library

GROUPS = 4
ERRORS = {
    1: "the call is malformed",
    2: "a size is negative, or a tile has none",
    3: "a stride is negative",
    GROUPS: "`ends` must not fall, and must end with the number of rows",
    5: "the tensors reach beyond their memory",
    6: "there is no memory left",
}
_runs: ContextVar[bool] = ContextVar("runs", default=True)
"""False inside `without_running`."""


def run(entry: str, fields: Sequence[Any]) -> None:
    """Call an entry of the library with the fields of its struct; inside `without_running` do nothing.

    Raises: RuntimeError where it refuses; Unserved for groups of rows that do not cover them.
    """
    enter(entry, STRUCTS[entry].pack(*fields))


def enter(entry: str, call: bytes) -> None:
    """Call an entry with a packed call, as `run` does.

    Raises: Unserved, with a warning, where the entry's library cannot be built.
    """
    loaded = library()
    try:
        function = loaded.entries.get(entry) or loaded.entry(entry)
    except BuildError as error:  # after another library was built
        warnings.warn(f"dsmini's kernel {entry} is out, plain PyTorch runs instead: {error}", stacklevel=2)
        raise Unserved(str(error)) from None
    if _runs.get() and (error := function(call, len(call))):
        raise (Unserved if error == GROUPS else RuntimeError)(ERRORS[error])


@contextmanager
def without_running() -> Iterator[None]:
    """Let calls inside the context be checked and described, and compute nothing: their results are not written."""
    token = _runs.set(False)
    try:
        yield
    finally:
        _runs.reset(token)
