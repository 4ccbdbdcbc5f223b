"""Fast versions of dsmini's operations: backend `cpu` (C++), backend `triton`. Imports torch, never dsmini."""


class Unserved(Exception):  # noqa: N818 - not an error: plain PyTorch serves instead
    """A call that a backend cannot serve; the message is the reason. No message: PyTorch serves it faster."""
