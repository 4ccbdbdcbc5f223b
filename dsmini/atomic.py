"""Write files and folders that are whole or not there. Every writer of dsmini goes through this module.

The content is written under a hidden name next to the final one, forced to the disk, then renamed. A power cut, a kill
or a full disk at any moment leaves either the old content or the complete new one. A failed attempt removes what it
wrote and raises the system's own OSError. A later write removes what a killed process left.

A file system that cannot force a folder's entries to the disk, or has no locks, as some networks' have not, is used as
it is.

The one exception is a log that grows line by line: it is opened to append, and a reader ignores a torn last line.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

STALE_AFTER = 3600.0
"""Seconds without a change after which a half-written file or folder belongs to nobody."""

MISSING = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of a file system that has no such operation."""

STOPPED = (Exception, KeyboardInterrupt, SystemExit)
"""Exceptions after which an attempt cleans up."""


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file to write; it becomes `path` when the block ends without an error."""
    remove_leftovers(path.parent, STALE_AFTER, path.name)
    partial = _hidden_name(path, "partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except STOPPED:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def try_writing(path: Path) -> None:
    """Make a temporary file next to `path` and remove it, as a later write will. Raises: OSError if it fails."""
    partial = _hidden_name(path, "partial")
    partial.touch()
    partial.unlink()


def check_folder(folder: Path, names: Iterable[str]) -> None:
    """Make the folder --out for files of these names, if it is not there, before they are made.

    Raises: ValueError for one that cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} in it is a folder")
            try_writing(folder / name)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or leave the old one."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a whole file of UTF-8 or leave the old one."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people to read, or leave the old one."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """Return the text of a JSON file for people to read."""
    return json.dumps(value, indent=2) + "\n"


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write files into; it becomes `path` when the block ends without an error.

    Args:
        replace: put an existing folder aside; between the two renames neither is there. Without it only an empty
            folder is replaced, and any other raises OSError.
    """
    with partial_folder(path) as partial:
        yield partial
        finish_folder(partial, path, replace)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`, for `finish_folder`; without that call it is removed after the block."""
    remove_leftovers(path.parent, STALE_AFTER, path.name)
    partial = _hidden_name(path, "partial")
    try:
        partial.mkdir(parents=True)
        yield partial
    except STOPPED:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if partial.exists():
        shutil.rmtree(partial, ignore_errors=True)


def finish_folder(partial: Path, path: Path, replace: bool = False) -> None:
    """Force a folder to the disk, then give it its name. See `new_folder` for `replace`."""
    for file in sorted(partial.iterdir()):
        sync(file)
    sync(partial)
    aside = _put_aside(path) if replace and path.exists() else None
    os.rename(partial, path)
    for above in (path.parent, path.parent.parent):  # the second may have been made here too
        with suppress(PermissionError):
            sync(above)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folders(folders: Iterable[Path]) -> None:
    """Remove folders; a kill meanwhile leaves none of them half removed under its name."""
    for folder in folders:
        shutil.rmtree(_put_aside(folder), ignore_errors=True)  # what stays is a leftover


def remove_leftovers(parent: Path, older_than: float = 0.0, of: str | None = None) -> None:
    """Remove what interrupted writes and removals left in a folder.

    Args:
        older_than: seconds without a change; 0 only where no other process may be writing in `parent`.
        of: name of the one file or folder that was written; None: of all, in a folder that belongs to dsmini alone.
    """
    name = ".+" if of is None else re.escape(of)
    ours = re.compile(rf"\.{name}\.(partial|old)-\d+-[0-9a-f]{{8}}")
    with suppress(OSError):  # a folder that is not there, or cannot be read, has none
        for path in [path for path in parent.iterdir() if ours.fullmatch(path.name)]:
            if older_than and time.time() - _changed(path) <= older_than:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _put_aside(folder: Path) -> Path:
    """Rename a folder to a hidden name that `remove_leftovers` knows, and return that name."""
    aside = _hidden_name(folder, "old")
    os.rename(folder, aside)
    return aside


def _changed(path: Path) -> float:
    """Return the time of the last change of a file, or of a folder and its entries; now if it has just gone."""
    try:
        return max(one.stat().st_mtime for one in (path, *(path.iterdir() if path.is_dir() else ())))
    except OSError:
        return time.time()


def _hidden_name(path: Path, kind: str) -> Path:
    """Return an unused name next to `path`; two writers of the same path get different ones."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if sys.platform == "darwin":  # there fsync leaves the content in the drive's own cache
            with suppress(OSError):  # some drives have no such command
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    except OSError as error:
        if error.errno not in MISSING or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def lock(file: int | IO[Any], path: Path, *, wait: bool = False) -> None:
    """Lock an open file against other processes until it is closed. Warn where the file system has no locks.

    Args:
        path: the file, for the warning.
        wait: for a process that holds it.

    Raises: BlockingIOError without `wait`, if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in MISSING:
            raise
        words = f"the file system of {path} has no locks ({error.strerror})"
        warnings.warn(f"{words}, so nothing keeps a second process out; start none there", stacklevel=3)
