"""Folders that are whole or not there: written aside, forced to the disk, then renamed; a checksum for every file.

A power cut, a kill or a full disk at any moment leaves the folder as it was before, or complete. What breaks later, a
lost file or a flipped bit, is found by `verify` before anything is read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MANIFEST = "manifest.json"
FORMAT = 1


def write_folder(folder: Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Make `folder` with these files and their manifest, all at once.

    One that is there already is replaced; between the two renames neither is there.

    Args:
        files: what writes each file, by name.

    Raises: OSError, also for safetensors' own error; nothing of the attempt is left then.
    """
    remove_leftovers(folder.parent)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, write in files.items():
            write(partial / name)
            sync(partial / name)
        manifest = {"format": FORMAT, "files": {name: _fingerprint(partial / name) for name in files}}
        (partial / MANIFEST).write_text(_written(manifest), encoding="utf-8")
        sync(partial / MANIFEST)
        sync(partial)
        if folder.exists():
            _put_aside(folder)
        os.rename(partial, folder)
    except (OSError, SafetensorError) as error:  # the second is what a full disk is called in safetensors
        shutil.rmtree(partial, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from None
    sync(folder.parent)
    sync(folder.parent.parent)
    remove_leftovers(folder.parent)


def remove_folders(folders: Iterable[Path]) -> None:
    """Remove folders so that a kill in between leaves none of them half there."""
    for folder in folders:
        shutil.rmtree(_put_aside(folder), ignore_errors=True)  # what stays is a leftover, removed at the next writing


def remove_leftovers(parent: Path) -> None:
    """Remove what an interrupted writing or removal left. Only one process may write in `parent` at a time."""
    for pattern in (".*.partial-*", ".*.old-*"):
        for path in parent.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def verify(folder: Path, names: Iterable[str]) -> None:
    """Check these files, which the manifest must list, against it.

    Raises: ValueError naming the file and what is wrong with it.
    """
    listed = _read_manifest(folder / MANIFEST)
    for name in names:
        if name not in listed:
            raise ValueError(f"{MANIFEST} does not list {name}")
        want, got = listed[name], _fingerprint_if_there(folder / name)
        if got is None:
            raise ValueError(f"{name} is missing")
        if got["bytes"] != want["bytes"]:
            raise ValueError(f"{name} has {got['bytes']} bytes, {MANIFEST} says {want['bytes']}")
        if got["sha256"] != want["sha256"]:
            raise ValueError(f"{name} has sha256 {got['sha256'][:12]}..., {MANIFEST} says {want['sha256'][:12]}...")


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one: a temporary file, forced to the disk, then renamed."""
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """write_text of a readable JSON object."""
    write_text(path, _written(value))


def _written(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _put_aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    os.rename(folder, aside)
    return aside


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {MANIFEST}: {error}") from None
    if text != _written(raw):
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
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fingerprint_if_there(path: Path) -> dict[str, Any] | None:
    try:
        return _fingerprint(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot read {path.name}: {error.strerror}") from None
