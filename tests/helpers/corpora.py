"""Folders of texts, their corpora, and the cache's entries for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus

Files = dict[str, bytes]
TEXTS: Files = {f"{i:02d}.txt": f"document {i}, héllo ".encode() * (10 + i) for i in range(40)}


def lay_out(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write files below a folder, and return it."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def load(place: Path, seed: int = 0, seq_len: int = 8, **config: Any) -> Corpus:
    """Return the corpus of place/texts, or of another path, with its cache in place/corpus."""
    return load_corpus(DataConfig(**{"path": place / "texts"} | config), seq_len, 256, place / "corpus", seed)


def entries(place: Path) -> list[Path]:
    return sorted(path for path in (place / "corpus").iterdir() if path.name != ".lock")
