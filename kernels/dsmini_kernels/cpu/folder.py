"""Find a folder for compiled code that nobody else can change.

A library that another user may replace runs that user's code in this process. So the folder and every folder above it
must belong to this user or to root, and nobody else may write to them. A folder that all may write to is fine if it is
sticky, as /tmp is, and if the library does not lie in it: what lies in it can be moved by its owner alone.

Symbolic links are followed first. The real path is checked from the root down. After a folder has passed, nobody else
can exchange what is in it, so that the next check cannot be raced, and neither can the use of the path afterwards.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


class UntrustedFolderError(Exception):
    """A folder that another user may change; the message is one sentence."""


def user_cache() -> Path:
    """Return the folder where libraries are stored by default: ${XDG_CACHE_HOME:-~/.cache}/dsmini/kernels.

    Raises: as `private`; FileNotFoundError for a user without a home, as a container may have.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):  # it was not expanded, and would be a folder of that name here
        raise FileNotFoundError("this user has no home folder")
    return private(Path(os.path.abspath(base)) / "dsmini" / "kernels")


def shared_temporary() -> Path:
    """Return the temporary folder that all processes of this user share."""
    return private(Path(os.path.abspath(tempfile.gettempdir())) / f"dsmini-kernels-{os.geteuid()}")


def private(folder: Path) -> Path:
    """Return the folder's real path, made where it is missing, if only this user and root can change what it holds.

    Raises: UntrustedFolderError; OSError where it cannot be made or read.
    """
    for at in reversed((folder, *folder.parents)):
        if not at.exists():
            at.mkdir(mode=0o700, exist_ok=True)  # another process may be faster; its folder is checked like any other
    real = Path(os.path.realpath(folder, strict=True))
    for at in reversed((real, *real.parents)):
        found = at.lstat()
        if found.st_uid not in _trusted():
            raise UntrustedFolderError(f"{at} belongs to user {found.st_uid}")
        if found.st_mode & 0o022 and (at == real or not found.st_mode & stat.S_ISVTX):
            raise UntrustedFolderError(f"others can write to {at} (mode {stat.S_IMODE(found.st_mode):o})")
    with contextlib.suppress(OSError):  # root's, or on a file system that cannot be written
        real.chmod(0o700)
    return real


def is_private_file(found: os.stat_result) -> bool:
    """Return True for a regular file that only this user or root can change."""
    return stat.S_ISREG(found.st_mode) and found.st_uid in _trusted() and not found.st_mode & 0o022


def can_write(folder: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _trusted() -> tuple[int, ...]:
    # in a sandbox root's files belong to another user; who owns / could change everything anyway
    return os.geteuid(), 0, os.lstat("/").st_uid


@contextlib.contextmanager
def alone_in(folder: Path, seconds: float) -> Iterator[None]:
    """Wait at most this long for other processes that do the same with the folder.

    The lock ends with the process that holds it. Where folders have no locks, nobody waits.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
