"""All arms are scored on the same bytes, whatever their context and tokenizer."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsmini import DataConfig
from dsmini.comparison.scoring import SPAN, ScoredWindows, choose_ranges, held_out, windows_of
from dsmini.nn.transformer import IGNORE
from dsmini.text.tokenizer import ByteTokenizer

WORDS = "the model reads a text, and learns what comes next; é is a letter of two bytes "
LINES = [f"{WORDS * (1 + i % 3)}{i * i}" for i in range(800)]
TEXT = np.frombuffer("\n".join(LINES).encode() + b"\0" + "\n".join(reversed(LINES)).encode() + b"\0", dtype=np.uint8)


class Words:
    """A tokenizer whose tokens are words with the space before them."""

    end_of_document = 0

    def __init__(self) -> None:
        self.words: dict[bytes, int] = {b"\0": 0}

    def encode_all(self, texts: list[bytes]) -> list[NDArray[Any]]:
        return [
            np.array([self.words.setdefault(word, len(self.words)) for word in self.cut(text)], dtype=np.int64)
            for text in texts
        ]

    @staticmethod
    def cut(text: bytes) -> list[bytes]:
        parts = text.replace(b" ", b"\1 ").replace(b"\n", b"\1\n").split(b"\1")
        return [part for part in parts if part]

    def bytes_of(self, ids: list[int]) -> bytes:
        known = {i: word for word, i in self.words.items()}
        return b"".join(known[i] for i in ids)


def targets_of(windows: ScoredWindows) -> list[int]:
    """Return the targets that count, in order."""
    return [i for _, targets in windows.blocks(3) for i in targets.flatten().tolist() if i != IGNORE]


def bigram_loss(windows: ScoredWindows) -> float:
    """Return the nats of a bigram model over the targets that count, with the model counted on all of the text."""
    counts = np.ones((256, 256))
    np.add.at(counts, (TEXT[:-1], TEXT[1:]), 1)
    nats = torch.from_numpy(-np.log(counts / counts.sum(1, keepdims=True)))
    total = 0.0
    for tokens, targets in windows.blocks(7):
        counted = targets != IGNORE
        total += nats[tokens[counted], targets[counted]].sum().item()
    return total


@pytest.mark.parametrize("n", [30_000, 4 * SPAN, 10**6])
def test_a_bigram_model_scores_equal_at_every_length(n: int) -> None:
    ranges = choose_ranges(TEXT, n)
    size = sum(end - first for first, end in ranges)
    want = None
    for seq_len in (256, 512, 1024, 100, 3 * SPAN):
        windows = windows_of(TEXT, ranges, ByteTokenizer(), seq_len)
        assert windows.tokens == size == len(targets_of(windows))
        found = bigram_loss(windows) / size
        want = found if want is None else want
        assert found == pytest.approx(want, rel=1e-12), seq_len


@pytest.mark.parametrize("seq_len", [16, 100, 4000])
def test_another_tokenizer_is_scored_on_the_same_bytes(seq_len: int) -> None:
    ranges, words = choose_ranges(TEXT, 4 * SPAN), Words()
    want = b"".join(TEXT[first:end].tobytes() for first, end in ranges)
    assert words.bytes_of(targets_of(windows_of(TEXT, ranges, words, seq_len))) == want  # pyright: ignore[reportArgumentType]
    assert bytes(targets_of(windows_of(TEXT, ranges, ByteTokenizer(), seq_len))) == want


def test_ranges_are_whole_lines_that_do_not_overlap() -> None:
    ranges = choose_ranges(TEXT, 5 * SPAN)
    assert len(ranges) == 5 and ranges[-1][1] > len(TEXT) - 2000
    for (_, end), (first, _) in itertools.pairwise(ranges):
        assert end <= first
    assert all(TEXT[at - 1] in (0, 10) for both in ranges for at in both if 1 < at < len(TEXT))
    one_line = np.frombuffer(("é" * 50_000).encode(), dtype=np.uint8)
    for first, end in choose_ranges(one_line, 2 * SPAN):
        one_line[first:end].tobytes().decode()
    assert choose_ranges(TEXT[:300], 10) == [(1, 300)]


def test_held_out_bytes_are_the_same_for_every_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(TEXT.tobytes().replace(b"\0", b"\n"))
    (tmp_path / "b.json").write_text(json.dumps({}))  # never read
    plain = DataConfig(path=tmp_path / "text.txt")
    other = DataConfig(path=tmp_path / "text.txt", tokenizer=tmp_path / "b.json")
    assert np.array_equal(held_out(plain, tmp_path / "c"), held_out(other, tmp_path / "c"))


def test_the_last_window_of_a_range_shows_what_comes_before() -> None:
    """It reaches back to be whole: over the bytes that the window before it scored, or the text before the range."""
    ranges = choose_ranges(TEXT, 2 * SPAN)
    for seq_len in (100, SPAN):  # the text before a range is shown up to SPAN bytes
        windows = windows_of(TEXT, ranges[1:], ByteTokenizer(), seq_len)
        first, end = windows.counted[-1].tolist()
        assert end == seq_len and first == seq_len - ((ranges[1][1] - ranges[1][0]) % seq_len)
