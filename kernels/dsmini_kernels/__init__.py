"""Fast versions of dsmini's operations, a backend a subpackage: `cpu` (C++). Imports torch, never dsmini."""


class Unserved(Exception):  # noqa: N818  it is an answer, not an error
    """The backend does not serve this call; the reason is the message. Plain PyTorch does."""
