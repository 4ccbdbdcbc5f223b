"""Fast versions of dsmini's operations, a package a backend: `cpu` (C++), `triton`. Imports torch, never dsmini."""


class Unserved(Exception):  # noqa: N818 - no error: the reference serves instead
    """A call that a backend leaves to the reference, with the reason."""
