"""The sources of dsmini, by a hash: what a result names, so that nobody takes it for one of other code."""

import functools
import hashlib
import importlib.util
from collections.abc import Collection, Iterable
from pathlib import Path

SUFFIXES = {".py", ".cpp", ".h"}


def hash_of(folders: Iterable[Path], suffixes: Collection[str] = SUFFIXES) -> str:
    """Return a hash of the files in these folders whose names end so."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in suffixes):
            digest.update(f"{path.relative_to(folder.parent)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def kernel_folders() -> list[Path]:
    """Return the folder of the kernels' sources; none without kernels."""
    kernels = importlib.util.find_spec("dsmini_kernels")
    return [*map(Path, (kernels and kernels.submodule_search_locations) or ())]


@functools.cache
def own_sources() -> str:
    """Return a hash of the files of dsmini and of its kernels, as they were when it was first asked for."""
    return hash_of([Path(__file__).parent, *kernel_folders()])
