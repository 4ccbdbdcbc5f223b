"""Folders of texts, corpora of them and of given tokens, and the entries of the cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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


def corpus(train: NDArray[Any], val: NDArray[Any] | None = None, **more: Any) -> Corpus:
    held_out = train[:1000] if val is None else val
    about: dict[str, Any] = {"source": "a test", "files": 1, "split": "", "sha256": ""}
    return Corpus(train=train, val=held_out, **about | more)


def random_text(n: int, kinds: int = 256, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, kinds, n, dtype=np.uint32)


def batches(text: Corpus, rows: int = 512) -> list[tuple[Tensor, Tensor]]:
    return [text.batch(first, 8, 256, 0) for first in range(0, rows, 8)]
