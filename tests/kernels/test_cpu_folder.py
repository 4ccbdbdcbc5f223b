"""Compiled code is taken only from folders that nobody else can change. No compiler runs here."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from dsmini_kernels.cpu import build, folder

KEY, CONTENT, STRANGER = "k" * 24, b"a library, which nobody loads here", 12345
NAME = build._name(KEY, CONTENT)


@pytest.fixture
def base(private_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a user's cache with a library in dsmini/kernels, and a folder for temporary ones next to it."""
    cache, temporary = private_folder / "cache", private_folder / "tmp"
    kernels = cache / "dsmini" / "kernels"
    kernels.mkdir(parents=True)
    temporary.mkdir()
    put_library(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(folder.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setattr(build, "find_compiler", lambda: ("c++",))
    monkeypatch.setattr(build, "_key", lambda *_: KEY)
    for path in (cache, kernels.parent, kernels, temporary):
        path.chmod(0o755)
    return cache


def put_library(kernels: Path, mode: int = 0o700) -> Path:
    path = kernels / NAME
    path.write_bytes(CONTENT)
    path.chmod(mode)
    return path


def found() -> Path:
    return build.find_or_build("portable")


def move_behind_a_link(path: Path) -> None:
    moved = path.with_name(f"{path.name}-moved")
    path.rename(moved)
    path.symlink_to(moved)


def link_to(path: Path, target: str, mode: int = 0o755) -> None:
    (path.parent / "tmp").chmod(mode)
    path.rename(path.with_name("away"))
    path.symlink_to(target)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.lchown(path, STRANGER, -1)


def give_link_away(path: Path) -> None:
    move_behind_a_link(path)
    give_away(path)


UNTRUSTED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "world-writable cache": ("", lambda path: path.chmod(0o777), "others can write to"),
    "group-writable cache": ("", lambda path: path.chmod(0o775), "others can write to"),
    "group-writable parent": ("..", lambda path: path.chmod(0o770), "others can write to"),
    "world-writable dsmini": ("dsmini", lambda path: path.chmod(0o777), "others can write to"),
    "group-writable kernels": ("dsmini/kernels", lambda path: path.chmod(0o775), "others can write to"),
    "sticky kernels": ("dsmini/kernels", lambda path: path.chmod(0o1777), "others can write to"),
    "symlinked kernels": ("dsmini/kernels", move_behind_a_link, "is a symbolic link"),
    "symlinked dsmini": ("dsmini", move_behind_a_link, "is a symbolic link"),
    "link to a writable folder": ("", lambda path: link_to(path, "tmp/../tmp", 0o777), "others can write to .*/tmp "),
    "link to itself": ("", lambda path: link_to(path, path.name), "is a symbolic link"),
    "another user's link": ("", give_link_away, f"symbolic link of user {STRANGER}"),
    **{
        f"another user's {place or 'cache'}": (place, give_away, f"belongs to user {STRANGER}")
        for place in ("", "dsmini", "dsmini/kernels")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("place", "change", "reason"), UNTRUSTED.values(), ids=list(UNTRUSTED))
def test_cache_that_others_can_change_is_not_used(
    base: Path, place: str, change: Callable[[Path], None], reason: str
) -> None:
    change(base.parent if place == ".." else base / place)
    with pytest.raises(folder.UntrustedFolderError, match=reason):
        folder.user_cache()


def test_private_folder_serves_instead_and_a_warning_says_so(base: Path) -> None:
    base.chmod(0o777)
    shared = base.parent / "tmp" / f"dsmini-kernels-{os.geteuid()}"
    shared.mkdir(mode=0o700)
    want = put_library(shared)
    with pytest.warns(UserWarning, match=rf"stored in {shared}, because others can write to {base} .*go-w") as caught:
        assert found() == want
    assert len(caught) == 1
    shared.chmod(0o777)
    with pytest.raises(folder.UntrustedFolderError):
        folder.shared_temporary()
    fresh = folder.new_temporary()
    assert fresh != shared and fresh.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_no_private_folder_at_all_is_reported(base: Path) -> None:
    for path in (base, base.parent / "tmp"):
        path.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"no folder .* can be written; others can write to"):
        found()
    assert not [p for p in (base.parent / "tmp").iterdir() if p.name != f"dsmini-kernels-{os.geteuid()}"]


@pytest.mark.slow
def test_own_folder_below_a_sticky_one_and_behind_an_own_link_is_used_and_closed(base: Path) -> None:
    base.chmod(0o1777)
    real = base.resolve()
    assert folder.user_cache() == real / "dsmini" / "kernels"
    assert folder.user_cache().stat().st_mode & 0o777 == 0o700
    move_behind_a_link(base)
    assert folder.user_cache() == base.resolve() / "dsmini" / "kernels"


@pytest.mark.slow
def test_missing_folders_are_made_private_under_any_umask(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "a" / "b"))
    before = os.umask(0)
    try:
        made = folder.user_cache()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (made, *list(made.parents)[:3])} == {0o700}


PLANTED: dict[str, Callable[[Path], object]] = {
    "group-writable": lambda path: put_library(path.parent, 0o770),
    "link": lambda path: path.symlink_to(put_library(path.parents[2])),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "foreign": lambda path: give_away(put_library(path.parent)),
}


@pytest.mark.slow
@pytest.mark.parametrize("planted", PLANTED)
def test_planted_file_is_not_loaded(base: Path, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    path = base / "dsmini" / "kernels" / NAME
    assert found() == path
    path.unlink()
    PLANTED[planted](path)
    monkeypatch.setattr(build, "_build", lambda *_, **__: base / "built")
    assert found() == base / "built"


@pytest.mark.slow
def test_cache_that_cannot_be_written_is_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "can_write", lambda _: False)
    monkeypatch.setattr(build, "_build", lambda *_, **__: pytest.fail("a library was built"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found() == base / "dsmini" / "kernels" / NAME


@pytest.mark.slow
def test_cache_that_cannot_be_made_gives_way_to_a_temporary_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "file"))
    used: list[Path] = []
    monkeypatch.setattr(build, "_build", lambda _c, _f, place, _k, **_: used.append(place) or place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found()
    assert used == [base.parent / "tmp" / f"dsmini-kernels-{os.geteuid()}"]
    assert used[0].stat().st_mode & 0o777 == 0o700
