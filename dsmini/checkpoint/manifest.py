"""Folders with a checksum for every file.

A folder is written whole or not at all (see dsmini/atomic.py). Later damage, such as a lost file or a flipped bit, is
found by `verify` before anything is read.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsmini.atomic import as_json, new_folder, remove_leftovers
from dsmini.reading import is_there, open_regular, parse_json, read_text

MANIFEST = "manifest.json"
FORMAT = 1


def write_folder(folder: Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Make `folder` with these files and their manifest, all at once.

    An existing folder is replaced. No other process may be writing in the folder above.

    Args:
        files: the writer of each file, by name.

    Raises: OSError; then nothing of the attempt is left.
    """
    remove_leftovers(folder.parent)
    with new_folder(folder, replace=True) as partial:
        for name, write in files.items():
            write(partial / name)
        write_manifest(partial, files)


NO_CHECKSUMS = (1, 1)
"""The share of a process in `verify` for whom others have computed all checksums."""


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the manifest of these files of a folder, as they are now."""
    manifest = {"format": FORMAT, "files": {name: _fingerprint(folder / name) for name in names}}
    (folder / MANIFEST).write_text(as_json(manifest), encoding="utf-8")


def verify(folder: Path, names: Iterable[str], share: tuple[int, int] = (0, 1)) -> None:
    """Check these files against the manifest, which must list them.

    Args:
        share: (i, n) computes the checksums of every n-th file, from number i: n processes share the work.

    Raises: ValueError naming the file and what is wrong with it.
    """
    listed = _read_manifest(folder / MANIFEST)
    for number, name in enumerate(names):
        if name not in listed:
            raise ValueError(f"{MANIFEST} does not list {name}")
        if not is_there(folder / name):
            raise ValueError(f"{name} is missing")
        if number % share[1] != share[0]:
            continue
        want, got = listed[name], _fingerprint(folder / name)
        if got["bytes"] != want["bytes"]:
            raise ValueError(f"{name} has {got['bytes']} bytes, {MANIFEST} says {want['bytes']}")
        if got["sha256"] != want["sha256"]:
            raise ValueError(f"{name} has sha256 {got['sha256'][:12]}..., {MANIFEST} says {want['sha256'][:12]}...")


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not is_there(path):
        raise ValueError(f"{MANIFEST} is missing")
    text = read_text(path)
    raw = parse_json(text, MANIFEST)
    if text != as_json(raw):
        raise ValueError(f"{MANIFEST} is damaged: it is not as it was written")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        form = raw.get("format") if isinstance(raw, dict) else None
        raise ValueError(f"{MANIFEST} has format {form!r}, this dsmini reads {FORMAT}")
    files = raw.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    ):
        raise ValueError(f"{MANIFEST} is damaged: it gives no bytes and sha256 for every file")
    return files


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            return {"bytes": nbytes, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise ValueError(f"cannot read {path.name}: {error.strerror}") from None
