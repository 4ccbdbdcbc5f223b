"""The corpus: token ids that are mapped, not loaded, and cut into batches.

The default corpus is real text that every machine has: the source code of Python's own standard library.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from dsmini.config import DataConfig
from dsmini.config.fields import plain
from dsmini.data.documents import ProgressCallback, find, silent
from dsmini.data.order import window_starts
from dsmini.data.tokenized import CorpusCache, CorpusFacts, forget
from dsmini.text.tokenizer import FIM_TOKENS, ByteTokenizer, Tokenizer, load_tokenizer

COUNTED = 1 << 24
"""Number of tokens that are counted at a time."""


def sequences(
    text: NDArray[Any], starts: NDArray[np.int64], seq_len: int
) -> tuple[Int[Tensor, "n {seq_len}"], Int[Tensor, "n {seq_len}"]]:
    """Return tokens and targets of the sequences that begin at these places.

    The text is a circle: a sequence that reaches its end continues at its beginning.
    """
    both = np.empty((len(starts), seq_len + 1), dtype=np.int64)
    for row, start in zip(both, starts.tolist(), strict=True):
        at_end = text[start : start + seq_len + 1]
        row[: len(at_end)] = at_end
        row[len(at_end) :] = text[: seq_len + 1 - len(at_end)]
    forget(text)
    tokens = torch.from_numpy(both)
    return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Corpus(CorpusFacts):
    """Token ids of the training and the held-out text, and their source."""

    train: NDArray[Any]
    val: NDArray[Any]
    end_of_document: int = ByteTokenizer.end_of_document
    """Token after every document."""
    cache: str = ""
    """Sentence that says where the tokens are stored."""

    def describe(self) -> dict[str, str | int | list[str]]:
        """Return the content of a run's corpus.json."""
        return plain({f.name: getattr(self, f.name) for f in dataclasses.fields(CorpusFacts)})

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes of a held-out token."""
        return 1.0 if self.val_bytes is None else self.val_bytes / len(self.val)

    def batch(
        self, first: int, n: int, seq_len: int, seed: int
    ) -> tuple[Int[Tensor, "{n} {seq_len}"], Int[Tensor, "{n} {seq_len}"]]:
        """Return tokens and targets of sequences first .. first + n - 1 of the endless stream."""
        return sequences(self.train, window_starts(first, n, len(self.train), seq_len, seed), seq_len)

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """Return how often each token id is in the training text."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in range(0, len(self.train), COUNTED):
            counts += np.bincount(self.train[start : start + COUNTED], minlength=vocab_size)
        forget(self.train)
        return counts

    def documents(self, tokens: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
        """Return the number, from 0 in each row, of the document that a token belongs to; its end belongs to it."""
        ends = (tokens == self.end_of_document).long()
        return ends.cumsum(1) - ends

    def windows(self, seq_len: int, at_most: int | None = None) -> "Windows":
        """Cut the held-out split into windows of seq_len: each token is scored once, except a tail shorter than that.

        Args:
            at_most: for a quick look, take about this many tokens, in windows spread evenly.
        """
        n = (len(self.val) - 1) // seq_len
        numbers = np.arange(n)
        if at_most is not None and at_most < n * seq_len:
            numbers = np.linspace(0, n - 1, max(1, at_most // seq_len)).round().astype(np.int64)
        return Windows(text=self.val, starts=numbers * seq_len, seq_len=seq_len)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Held-out windows, read when needed."""

    text: NDArray[Any]
    starts: NDArray[np.int64]
    seq_len: int

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """Number of tokens that all windows score."""
        return len(self.starts) * self.seq_len

    def share(self, part: int, parts: int) -> tuple["Windows", int]:
        """Return every parts-th window, and how many of them count: all parts get as many, some one twice."""
        starts = self.starts[part::parts]
        missing = -(-len(self) // parts) - len(starts)
        return dataclasses.replace(self, starts=np.append(starts, self.starts[:missing])), len(starts)

    def blocks(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens and targets [at most `rows`, seq_len], block by block."""
        for i in range(0, len(self), rows):
            yield sequences(self.text, self.starts[i : i + rows], self.seq_len)


class Loader:
    """Prepares batches ahead of the training, in threads. Its results depend on the requests alone.

    Args:
        workers: number of threads; 0 prepares each batch when it is needed.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, workers: int) -> None:
        self.corpus: Corpus = corpus
        self.seq_len: int = seq_len
        self.seed: int = seed
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batch") if workers else None
        self._started: dict[tuple[int, int], Future[tuple[Tensor, Tensor]]] = {}

    def take(self, requests: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return the batch of the first request, which is (first sequence, number of sequences).

        The others are started, and stored until a later call asks for them or no longer does. An error in a thread is
        raised by the call that takes its batch.
        """
        if self._pool is None:
            return self.prepared(requests[0])
        self._started = {
            request: self._started.get(request) or self._pool.submit(self.prepared, request) for request in requests
        }
        return self._started.pop(requests[0]).result()

    def prepared(self, request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Prepare a batch now."""
        return self.corpus.batch(*request, self.seq_len, self.seed)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def cache_next_to(place: Path | None) -> Path:
    """Return the folder of the tokenized corpora of a run's folder or a file of results: one for all in its parent.

    Args:
        place: None: a new run of no name, in runs.
    """
    place = place or Path("runs/new")
    return (place if place.name not in ("", "..") else place.resolve()).parent / "corpus-cache"


def load_corpus(
    config: DataConfig, seq_len: int, vocab_size: int, cache: Path, seed: int = 0, progress: ProgressCallback = silent
) -> Corpus:
    """Return the corpus of a run, tokenized now or by an earlier run.

    Args:
        cache: folder of tokenized corpora; made where it is missing.
        seed: seed of the choice of documents for fill-in-the-middle.
        progress: told how far reading and tokenizing are.

    Raises: ValueError for a path that is missing, unreadable, empty, not text, or too short for one sequence in each
        part, and for a vocabulary or a fill-in-the-middle that the tokenizer does not have; OSError for a full disk.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    _check_vocabulary(config, tokenizer, vocab_size)
    source = find(config.path, cache, config.tokenizer)

    def check(train: int, val: int) -> None:
        for part, tokens in (("training", train), ("held-out", val)):
            if tokens < seq_len + 1:
                raise ValueError(
                    f"the {part} part of {source.words} has {tokens} tokens, too short for one sequence of {seq_len} "
                    f"and its targets; want at least {seq_len + 1}: use more text or a smaller train.seq_len"
                )

    found, parts, words = CorpusCache(cache, source, tokenizer, config, seed).open(check, progress)
    check(found.train_tokens, found.val_tokens)
    facts: dict[str, Any] = asdict(found) | {"source": source.words}  # as it is named now
    return Corpus(
        **facts, train=parts["train"], val=parts["val"], end_of_document=tokenizer.end_of_document, cache=words
    )


def _check_vocabulary(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    if config.tokenizer is None and vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is not that of bytes; use {tokenizer.vocab_size}, or name the tokenizer "
            "with --data.tokenizer"
        )
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is less than the {tokenizer.vocab_size} tokens of {config.tokenizer}; "
            f"use --model.vocab-size {tokenizer.vocab_size}"
        )
    if config.fim_rate and tokenizer.fim is None:
        raise ValueError(
            f"data.fim_rate={config.fim_rate} needs the tokens {' '.join(FIM_TOKENS)}, which {config.tokenizer} does "
            "not have; use a tokenizer.json with them, as python -m dsmini.tokenize makes, or leave data.fim_rate out"
        )
