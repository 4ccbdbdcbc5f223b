"""Ranges of bytes of the held-out text on which losses are measured, the same for all arms.

Windows that are cut for a context or of an arm's own tokens end at other bytes in each arm, and some bytes are easier
than others: arms that are the same would differ by more than most ideas change. So ranges of bytes are chosen once, and
each arm cuts them into windows of its own length and tokens. Every byte of a range is scored once, after bytes that
come before it. Ranges begin and end with a line where there is one, so that no tokenizer has to cut a word.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsmini.config import DataConfig
from dsmini.data.corpus import Windows, load_corpus, sequences
from dsmini.data.documents import ProgressCallback, silent
from dsmini.nn.transformer import IGNORE
from dsmini.text.tokenizer import Tokenizer

SPAN = 8192
"""Bytes of a range, before its ends move to those of lines, and of the text before it that a long window may show."""
NEAR = 1024
"""Bytes within which a range waits for the end of a line."""
Ranges = Sequence[tuple[int, int]]
"""First byte of each range, and the one after its last, in the held-out text."""


def held_out(data: DataConfig, cache: Path, progress: ProgressCallback = silent) -> NDArray[np.uint8]:
    """Return the bytes of the held-out text, each document followed by a NUL."""
    as_bytes = dataclasses.replace(data, tokenizer=None, fim_rate=0.0)
    return load_corpus(as_bytes, 1, 256, cache, progress=progress).val


def choose_ranges(text: NDArray[np.uint8], n: int) -> list[tuple[int, int]]:
    """Return ranges of about n bytes in all, spread evenly; all of a short text but its first byte."""
    if len(text) <= max(n, SPAN):
        return [(1, len(text))]
    starts = np.linspace(1, len(text) - SPAN, max(1, n // SPAN)).astype(int).tolist()
    return [(_line_at(text, start), _line_at(text, start + SPAN)) for start in starts]


def _line_at(text: NDArray[np.uint8], at: int) -> int:
    """Return the first byte of a line or document from `at` on, where one is near; else of a character."""
    near = text[at - 1 : at + NEAR]
    for begins in ((near == 10) | (near == 0), near[1:] & 0xC0 != 0x80):
        if begins.any():
            return at + int(begins.argmax())
    return min(at, len(text))


@dataclass(frozen=True, kw_only=True)
class ScoredWindows(Windows):
    """Windows of an arm, of whose targets some count."""

    counted: NDArray[np.int64]
    """First target of each window that counts, and the one after its last."""

    @property
    def tokens(self) -> int:
        return int((self.counted[:, 1] - self.counted[:, 0]).sum())

    def blocks(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens and targets [at most `rows`, seq_len], block by block; IGNORE for targets that do not count."""
        for i in range(0, len(self), rows):
            tokens, targets = sequences(self.text, self.starts[i : i + rows], self.seq_len)
            targets = targets.clone()  # of the memory of the tokens
            for row, (first, end) in zip(targets, self.counted[i : i + rows].tolist(), strict=True):
                row[:first], row[end:] = IGNORE, IGNORE
            yield tokens, targets


def windows_of(text: NDArray[np.uint8], ranges: Ranges, tokenizer: Tokenizer, seq_len: int) -> ScoredWindows:
    """Return windows of seq_len tokens that score the bytes of these ranges, each once.

    The last window of a range reaches back into it, and into the text before it, to be as long as the others.
    """
    parts: list[NDArray[Any]] = []
    starts, counted, at = list[int](), list[tuple[int, int]](), 0
    for first, end in ranges:
        before = _ids(text[max(0, first - SPAN) : first], tokenizer)[-seq_len:]
        own = _ids(text[first:end], tokenizer)
        parts += [before, own]
        last = at + len(before) + len(own)
        for target in range(at + len(before), last, seq_len):
            start = max(at, min(target - 1, last - 1 - seq_len))
            starts.append(start)
            counted.append((target - start - 1, min(seq_len, last - start - 1)))
        at = last
    ids = np.concatenate([*parts, np.zeros(seq_len + 1, dtype=np.int64)])
    return ScoredWindows(text=ids, starts=np.array(starts), seq_len=seq_len, counted=np.array(counted))


def _ids(text: NDArray[np.uint8], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return the tokens of documents that end with a NUL."""
    first, *others = tokenizer.encode_all(text.tobytes().split(b"\0"))
    parts = [part for each in others for part in ([tokenizer.end_of_document], each)]
    return np.concatenate([first, *parts]).astype(np.int64)
