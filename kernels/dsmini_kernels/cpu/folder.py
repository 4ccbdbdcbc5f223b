"""Find a folder for compiled code that nobody else can change.

A library that another user may replace runs that user's code in this process. So the folder and every folder above it
must belong to this user or to root, and nobody else may write to them. A folder that all may write to is fine if it is
sticky, as /tmp is: what lies in it then can be moved by its owner alone.

The path is checked from the root down. After a folder has passed, nobody else can exchange what is in it, so that the
next check cannot be raced, and neither can the use of the path afterwards.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LINKS = 40
"""Maximum number of symbolic links in a path."""


class UntrustedFolderError(Exception):
    """A folder that another user may change; the message is one sentence."""


def user_cache() -> Path:
    """Return the folder where libraries are stored by default: ${XDG_CACHE_HOME:-~/.cache}/dsmini/kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return private(Path(os.path.abspath(base)) / "dsmini" / "kernels", own=2)


def shared_temporary() -> Path:
    """Return the temporary folder that all processes of this user share."""
    return private(Path(os.path.abspath(tempfile.gettempdir())) / f"dsmini-kernels-{os.geteuid()}", own=1)


def new_temporary() -> Path:
    """Make a temporary folder for this process."""
    folder = tempfile.mkdtemp(prefix="dsmini-kernels-", dir=os.path.abspath(tempfile.gettempdir()))
    try:
        return private(Path(folder), own=1)
    except UntrustedFolderError:
        os.rmdir(folder)
        raise


def private(folder: Path, own: int) -> Path:
    """Return the folder's real path, made where it is missing, if only this user and root can change what it holds.

    Args:
        own: number of folders at the end of the path that are dsmini's. None of them may be a symbolic link.

    Raises: UntrustedFolderError; OSError where it cannot be made or read.
    """
    at, names, links = Path("/"), list(reversed(folder.parts[1:])), 0
    _check(at, found := at.lstat(), others_may_add=True)
    while names:
        name = names.pop()
        if name in ("", "."):
            continue
        if name == "..":  # of a symbolic link; everything above has passed
            at = at.parent
            continue
        above, at = at, at / name
        found = _found_or_made(at)
        if not stat.S_ISLNK(found.st_mode):
            _check(at, found, others_may_add=len(names) >= own)
            continue
        links += 1
        if len(names) < own or links > LINKS:
            raise UntrustedFolderError(f"{at} is a symbolic link")
        if found.st_uid not in _trusted():
            raise UntrustedFolderError(f"{at} is a symbolic link of user {found.st_uid}")
        target = Path(os.readlink(at))
        names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        at = Path("/") if target.is_absolute() else above
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != 0o700:
        with contextlib.suppress(OSError):  # a file system that cannot be written
            at.chmod(0o700)
    return at


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


def _found_or_made(folder: Path) -> os.stat_result:
    try:
        return folder.lstat()
    except FileNotFoundError:
        pass
    with contextlib.suppress(FileExistsError):  # another process was faster; its folder is checked like any other
        folder.mkdir(mode=0o700)
    return folder.lstat()


def _check(folder: Path, found: os.stat_result, others_may_add: bool) -> None:
    """Refuse a folder in which others can change what this user or root has put there.

    Args:
        others_may_add: accept a sticky folder that all may write to.
    """
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder")
    if found.st_uid not in _trusted():
        raise UntrustedFolderError(f"{folder} belongs to user {found.st_uid}")
    if found.st_mode & 0o022 and not (others_may_add and found.st_mode & stat.S_ISVTX):
        raise UntrustedFolderError(f"others can write to {folder} (mode {stat.S_IMODE(found.st_mode):o})")


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
