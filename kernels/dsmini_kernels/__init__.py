"""Fast versions of dsmini's operations, one package for each backend: `cpu` (C++), `triton`. Imports torch, never dsmini."""


class Unserved(Exception):  # noqa: N818 - not an error: plain PyTorch serves instead
    """A call that a backend cannot serve; the message is the reason."""
