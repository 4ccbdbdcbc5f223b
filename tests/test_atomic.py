"""The atomic writers: whole or not there, whatever happens, and nothing of the user's is ever removed."""

import errno
import fcntl
import os
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dsmini.atomic import STALE_AFTER, lock, new_file, new_folder, partial_folder, remove_folders, write_text
from dsmini.checkpoint.run_folder import lock_run
from dsmini.checkpoint.training_state import MANIFEST, write_manifest
from tests.helpers.runs import Killed


def age(path: Path) -> None:
    """Make a file, or a folder with all in it, look as if nobody had touched it for long."""
    for one in (*(path.iterdir() if path.is_dir() else ()), path):
        os.utime(one, (time.time() - STALE_AFTER - 100,) * 2)


def test_folder_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could leave the name without the content. A file is known by its inode, which renaming keeps."""
    done: list[int | str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"now {new.name}"), rename(old, new)))
    folder = tmp_path / "checkpoints/step-000002"
    with new_folder(folder, replace=True) as partial:
        for name in ("a", "b"):
            shutil.copy(__file__, partial / name)
        write_manifest(partial, ("a", "b"))
    *before, folders, above = ((folder / path).stat().st_ino for path in ("a", "b", MANIFEST, ".", "..", "../.."))
    assert done == [*before, "now step-000002", folders, above]


def test_folder_that_cannot_be_forced_to_the_disk_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is on some network drives."""

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(tmp_path / "y") as partial:
        write_text(partial / "x", "new")
    assert (tmp_path / "y" / "x").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks_gets_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"\.lock has no locks \(.*\), so nothing keeps a second process out"):
        lock_run(tmp_path).close()
    monkeypatch.undo()
    with lock_run(tmp_path), pytest.raises(ValueError, match="another process is training"):
        lock_run(tmp_path)


def test_broken_disk_is_not_one_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with (tmp_path / "x").open("w") as file, pytest.raises(OSError, match="Input/output"):
        lock(file, tmp_path / "x")


def interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    """Stop in the middle of writing the file x and the folder y."""
    with suppress(error), new_file(tmp_path / "x") as partial:
        partial.write_text("half")
        raise error
    with suppress(error), new_folder(tmp_path / "y") as partial:
        (partial / "a").write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_failed_attempt_leaves_the_old_text_alone(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "x", "old")
    interrupted(tmp_path, error)
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_leftovers_of_killed_writers_are_removed_later(tmp_path: Path) -> None:
    interrupted(tmp_path, Killed)
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2 and all(path.name.startswith(".") for path in left)
    write_text(tmp_path / "x", "whole")
    assert set(left) < set(tmp_path.iterdir()), "another process may be at it"
    for path in left:
        age(path)
    write_text(tmp_path / "x", "whole")
    with new_folder(tmp_path / "y"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_files_of_the_user_are_never_removed(tmp_path: Path) -> None:
    theirs = [".x.partial-1", ".x.partial-notes", ".x.old-17", ".y.partial-17-0123abcd", "x.partial-17-0123abcd"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
        age(tmp_path / name)
    write_text(tmp_path / "x", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "x"])


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with new_file(tmp_path / "x") as one, new_file(tmp_path / "x") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x").read_text() == "one" and os.listdir(tmp_path) == ["x"]


def test_folder_in_use_is_replaced_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/old").write_text("old")
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "x") as partial:
        (partial / "new").write_text("new")
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["old"]
    with new_folder(tmp_path / "x", replace=True) as partial:
        (partial / "new").write_text("new")
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["new"]


def test_unfinished_folder_is_dropped(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "x") as partial:
        (partial / "a").write_text("a")
    assert os.listdir(tmp_path) == []


def test_removed_folder_is_gone_or_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        remove_folders([tmp_path / "x"])
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".x.old-")
