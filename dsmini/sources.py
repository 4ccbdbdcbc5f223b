"""The sources of dsmini, by a hash: what a result names, so that nobody takes it for one of other code."""

import functools
import hashlib
import importlib.util
from pathlib import Path

SUFFIXES = {".py", ".cpp", ".h"}


@functools.cache
def own_sources() -> str:
    """Return a hash of the files of dsmini and of its kernels, as they were when it was first asked for."""
    kernels = importlib.util.find_spec("dsmini_kernels")
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, *map(Path, (kernels and kernels.submodule_search_locations) or ())):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
            digest.update(f"{path.relative_to(folder.parent)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
