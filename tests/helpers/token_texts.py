"""Random texts, and corpora and batches of them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsmini.data.corpus import Corpus


def corpus(train: NDArray[Any], val: NDArray[Any] | None = None, **more: Any) -> Corpus:
    held_out = train[:1000] if val is None else val
    about: dict[str, Any] = {"source": "a test", "files": 1, "split": "", "sha256": ""}
    return Corpus(train=train, val=held_out, **about | more)


def random_text(n: int, kinds: int = 256, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, kinds, n, dtype=np.uint32)


def batches(text: Corpus, rows: int = 512, seq_len: int = 256) -> list[tuple[Tensor, Tensor]]:
    return [text.batch(first, 8, seq_len, 0) for first in range(0, rows, 8)]
