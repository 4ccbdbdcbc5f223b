"""A small folder of texts, its corpus, and the cache's entries for it."""

from pathlib import Path
from typing import Any

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus

Files = dict[str, bytes]


TEXTS: Files = {f"{i:02d}.txt": f"document {i}, héllo ".encode() * (10 + i) for i in range(40)}


def load(place: Path, seed: int = 0, **config: Any) -> Corpus:
    return load_corpus(DataConfig(**{"path": place / "texts"} | config), 8, 256, place / "corpus", seed)


def entries(place: Path) -> list[Path]:
    return sorted(path for path in (place / "corpus").iterdir() if path.name != ".lock")
