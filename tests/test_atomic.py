"""The atomic writers: whole or not there, whatever happens, and nothing of the user's is ever removed."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dsmini.atomic import STALE_AFTER, new_file, new_folder, partial_folder, remove_folders, write_text
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


def test_full_disk_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    """Stop in the middle of writing the file x and the folder y."""
    with suppress(error), new_file(tmp_path / "x") as partial:
        partial.write_text("half")
        raise error
    with suppress(error), new_folder(tmp_path / "y") as partial:
        (partial / "a").write_text("half")
        raise error
    assert not {"x", "y"} & set(os.listdir(tmp_path))


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_failed_attempt_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    interrupted(tmp_path, error)
    assert os.listdir(tmp_path) == []


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
