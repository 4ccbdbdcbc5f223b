"""Fast versions of dsmini's operations: backend `cpu` (C++), backend `triton`. Imports torch, never dsmini."""

from collections.abc import Mapping
from typing import Any


class Unserved(Exception):  # noqa: N818 - not an error: plain PyTorch serves instead
    """A call that a backend cannot serve; the message is the reason. No message: PyTorch serves it faster."""


def entry_of(table: Mapping[Any, Any], key: Any, what: str) -> Any:
    """Return the entry of a table of what a backend serves.

    Raises: Unserved if there is none.
    """
    if key not in table:
        raise Unserved(f"{what} {key!r}")
    return table[key]
