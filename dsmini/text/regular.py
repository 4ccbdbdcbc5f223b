"""A check of files that somebody else wrote, before they are read."""

import os
from pathlib import Path


def is_regular(path: Path, name: str, largest: int) -> bool:
    """Return True for a regular file and False if there is nothing.

    Args:
        name: the role of the file, for errors: "the chat template".
        largest: largest size in bytes.

    Raises: ValueError for a folder, a pipe, a device or a broken link, and for a file that is too large.
    """
    if path.is_file():
        if path.stat().st_size > largest:
            raise ValueError(f"{name} {path} is larger than {largest:,} bytes; is it the right file?")
        return True
    if os.path.lexists(path):
        raise ValueError(f"{name} {path} is not a regular file; put a file there, or remove it")
    return False
