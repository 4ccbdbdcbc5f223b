"""Compiled code is taken only from folders that nobody else can change."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmini_kernels.cpu import build, folder
from tests.helpers.cpu_kernels import LIBRARY

IS_ROOT = os.geteuid() == 0


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a user's cache with a library in dsmini/kernels, and a folder for temporary ones next to it."""
    kernels = tmp_path / "cache" / "dsmini" / "kernels"
    kernels.mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    _copy_library(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    for path in (tmp_path / "cache", kernels.parent, kernels, tmp_path / "tmp"):
        path.chmod(0o755)
    return tmp_path / "cache"


def _copy_library(kernels: Path, mode: int = 0o700) -> Path:
    path = kernels / LIBRARY.path.name
    path.write_bytes(LIBRARY.path.read_bytes())
    path.chmod(mode)
    return path


def _move_behind_a_link(path: Path) -> None:
    moved = path.parent.parent / f"{path.name}-moved"
    path.rename(moved)
    path.symlink_to(moved)


def _make_world_writable(path: Path) -> None:
    path.chmod(0o777)


UNTRUSTED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "world-writable cache": (".", _make_world_writable),
    "group-writable cache": (".", lambda path: path.chmod(0o775)),
    "group-writable parent": ("..", lambda path: path.chmod(0o770)),
    "world-writable dsmini": ("dsmini", _make_world_writable),
    "group-writable kernels": ("dsmini/kernels", lambda path: path.chmod(0o775)),
    "sticky kernels": ("dsmini/kernels", lambda path: path.chmod(0o1777)),
    "symlinked kernels": ("dsmini/kernels", _move_behind_a_link),
    "symlinked dsmini": ("dsmini", _move_behind_a_link),
}


@pytest.mark.parametrize(("place", "change"), UNTRUSTED.values(), ids=list(UNTRUSTED))
def test_cache_that_others_can_change_is_not_used(base: Path, place: str, change: Callable[[Path], None]) -> None:
    change((base / place).resolve() if place == ".." else base / place)
    with pytest.raises(folder.UntrustedFolderError, match=r"others can write to|is a symbolic link"):
        folder.user_cache()


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a folder away")
@pytest.mark.parametrize("place", [".", "dsmini", "dsmini/kernels"])
def test_folder_of_another_user_is_not_used(base: Path, place: str) -> None:
    os.chown(base / place, 12345, -1)
    with pytest.raises(folder.UntrustedFolderError, match="belongs to user 12345"):
        folder.user_cache()


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a link away")
def test_link_of_another_user_is_not_followed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = base.parent / "link"
    link.symlink_to(base)
    monkeypatch.setenv("XDG_CACHE_HOME", str(link))
    assert folder.user_cache() == base / "dsmini" / "kernels", "an own link above dsmini's folders is followed"
    os.lchown(link, 12345, -1)
    with pytest.raises(folder.UntrustedFolderError, match="symbolic link of user 12345"):
        folder.user_cache()


def test_links_that_lead_to_a_writable_folder_or_nowhere_are_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = base.parent / "link"
    link.symlink_to("tmp/../tmp")
    (base.parent / "tmp").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(link))
    with pytest.raises(folder.UntrustedFolderError, match=r"others can write to .*/tmp "):
        folder.user_cache()
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(folder.UntrustedFolderError, match="is a symbolic link"):
        folder.user_cache()


def test_own_folder_below_a_sticky_one_is_used_and_closed(base: Path) -> None:
    base.chmod(0o1777)
    found = folder.user_cache()
    assert found == base / "dsmini" / "kernels" and found.stat().st_mode & 0o777 == 0o700


def test_missing_folders_are_made_private_under_any_umask(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "a" / "b"))
    before = os.umask(0)
    try:
        found = folder.user_cache()
    finally:
        os.umask(before)
    made = (base / "a", base / "a" / "b", found.parent, found)
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}


def test_private_folder_serves_instead_and_a_warning_says_so(base: Path) -> None:
    base.chmod(0o777)
    shared = base.parent / "tmp" / f"dsmini-kernels-{os.geteuid()}"
    shared.mkdir(mode=0o700)
    want = _copy_library(shared)
    with pytest.warns(UserWarning, match=rf"stored in {shared}, because others can write to {base} .*go-w") as caught:
        assert build.find_or_build(LIBRARY.isa) == want
    assert len(caught) == 1
    shared.chmod(0o777)
    with pytest.raises(folder.UntrustedFolderError):
        folder.shared_temporary()
    fresh = folder.new_temporary()
    assert fresh != shared and fresh.stat().st_mode & 0o777 == 0o700


def test_no_private_folder_at_all_is_reported(base: Path) -> None:
    for path in (base, base.parent / "tmp"):
        path.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"no folder .* can be written; others can write to"):
        build.find_or_build(LIBRARY.isa)
    assert not [p for p in (base.parent / "tmp").iterdir() if p.name != f"dsmini-kernels-{os.geteuid()}"]


@pytest.mark.parametrize("planted", ["group-writable", "link", "pipe", "folder", "foreign"])
def test_planted_file_is_not_loaded(base: Path, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    path = base / "dsmini" / "kernels" / LIBRARY.path.name
    assert build.find_or_build(LIBRARY.isa) == path
    path.rename(base / "good.so")
    if planted == "group-writable":
        _copy_library(path.parent, 0o770)
    elif planted == "link":
        path.symlink_to(base / "good.so")
    elif planted == "pipe":
        os.mkfifo(path)
    elif planted == "folder":
        path.mkdir()
    elif IS_ROOT:
        os.chown(_copy_library(path.parent), 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    monkeypatch.setattr(build, "_build", lambda *_, **__: base / "built")
    assert build.find_or_build(LIBRARY.isa) == base / "built"


def test_cache_that_cannot_be_written_is_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "can_write", lambda _: False)
    monkeypatch.setattr(build, "_build", lambda *_, **__: pytest.fail("a library was built"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.find_or_build(LIBRARY.isa) == base / "dsmini" / "kernels" / LIBRARY.path.name


def test_cache_that_cannot_be_made_gives_way_to_a_temporary_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "file"))
    used: list[Path] = []
    monkeypatch.setattr(build, "_build", lambda _c, _f, place, _k, **_: used.append(place) or place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.find_or_build(LIBRARY.isa)
    assert used == [base.parent / "tmp" / f"dsmini-kernels-{os.geteuid()}"]
    assert used[0].stat().st_mode & 0o777 == 0o700
