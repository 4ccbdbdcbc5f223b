"""Findings in texts and batches: copies, leaks, wrong targets and padding, put in where the truth is known."""

import tomllib
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini.config import DataConfig
from dsmini.data.corpus import load_corpus
from dsmini.diagnosis import findings
from dsmini.diagnosis.findings import DUPLICATES, LEAK, duplicates, held_out_leak, padding, wrong_targets
from dsmini.nn.transformer import IGNORE
from tests.helpers.corpora import batches, corpus, random_text

LENGTH = 200
"""Tokens of a passage where a token is a byte."""


def test_default_corpus_is_healthy(tmp_path: Path) -> None:
    """Check all findings: licence headers are copies, and there is room for other versions of Python."""
    text = load_corpus(DataConfig(), 256, 256, tmp_path)
    copies, leak, targets = duplicates(text), held_out_leak(text), wrong_targets(batches(text))
    assert not any(each.is_fault for each in (copies, leak, targets))
    assert 0.005 < copies.value < DUPLICATES / 3 and leak.value < LEAK / 2 and targets.value == 0.0


# --- copies


@pytest.mark.parametrize("kinds", [256, 129_280])
@pytest.mark.parametrize(("length", "copied"), [(LENGTH - 1, 0), (LENGTH, LENGTH), (1000, 1000)])
def test_copied_piece_is_counted_twice(kinds: int, length: int, copied: int) -> None:
    """Check that a piece shorter than a passage is not a copy."""
    text = random_text(100_000, kinds)
    text[70_000 : 70_000 + length] = text[10_000 : 10_000 + length]
    found = duplicates(corpus(text))
    assert found.value == 2 * copied / 100_000
    assert not found.is_fault and not found.fix


def test_leak_is_the_share_of_held_out_tokens() -> None:
    train, val = random_text(50_000), random_text(5_000, seed=1)
    assert held_out_leak(corpus(train, val)).value == 0.0
    val[1_000:2_000] = train[40_000:41_000]
    found = held_out_leak(corpus(train, val))
    assert found.value == 0.2 and found.is_fault and "held-out" in found.sentence


def brute_force(text: list[int], other: list[int] | None, length: int) -> float:
    """Return the share of tokens in passages that occur twice in the text, or once in the other one."""

    def all_of(ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]

    counts = Counter(all_of(text if other is None else other))
    copied = [counts[passage] >= (2 if other is None else 1) for passage in all_of(text)]
    return float(np.mean([any(copied[max(0, t - length + 1) : t + 1]) for t in range(len(text))]))


tokens = st.sampled_from([0, 1, 2, 1 << 8, 1 << 16])  # whose sums, orders and high bytes must not be mixed up
ids = st.lists(tokens, min_size=1, max_size=80)


@given(text=ids, other=ids, length=st.integers(1, 5))
def test_copied_share_is_that_of_brute_force(text: list[int], other: list[int], length: int) -> None:
    both = np.array(text, dtype=np.uint32), np.array(other, dtype=np.uint32)
    hashes, others = (findings.passage_hashes(each, length) for each in both)
    for copied, want in (
        (findings.repeated(hashes), brute_force(text, None, length)),
        (findings.occurring(hashes, others), brute_force(text, other, length)),
    ):
        assert findings.share_covered(copied, length) == want


# --- large texts


def test_of_a_large_text_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a copy inside the first 10,000 tokens, and one after them that is not seen; the sentence says so."""
    monkeypatch.setattr(findings, "MOST_READ", 10_000)
    monkeypatch.setattr(findings, "MOST_HELD_OUT", 1_000)
    text, held_out = random_text(50_000), random_text(5_000, seed=1)
    text[5_000:5_500] = text[1_000:1_500] = held_out[:500]
    text[30_000:31_000] = text[20_000:21_000] = held_out[2_000:3_000]
    copies, leak = duplicates(corpus(text, held_out)), held_out_leak(corpus(text, held_out))
    assert copies.value == 0.1 and "the first 10,000 of 50,000 tokens were compared" in copies.sentence
    assert leak.value == 0.5 and "the first 1,000 of 5,000 tokens" in leak.sentence


@pytest.mark.slow
@pytest.mark.memory(1.5)
def test_largest_texts_fit_into_memory(tmp_path: Path) -> None:
    """Map 100 million random tokens: most of it is never read, and none is held."""
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        rng = np.random.default_rng(0)
        for _ in range(100):
            file.write(rng.bytes(2_000_000))
    mapped = np.memmap(path, dtype=np.uint16, mode="r")
    text = corpus(mapped, mapped[-1_000_000:])
    tracemalloc.start()
    try:
        found = [duplicates(text), held_out_leak(text)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 30
    finally:
        tracemalloc.stop()
    assert not any(each.is_fault for each in found)


# --- padding

PADDED = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["padded"]


@pytest.mark.parametrize("case", PADDED)
def test_targets_after_the_last_that_counts_are_for_nothing(case: str) -> None:
    rows, share, is_fault, words = PADDED[case]
    found = padding([torch.tensor(eval(rows, {"OUT": IGNORE}))])
    assert (found.value, found.is_fault, bool(found.fix)) == (share, is_fault, is_fault) and words in found.sentence


# --- targets that are not the next token


# what changes targets of 8 rows of 256 tokens, and words of the sentence where they are at fault
TARGETS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "shuffled": (lambda x, y: y.flatten()[torch.randperm(y.numel())].reshape(y.shape), "not the next token"),
    "the token itself": (lambda x, y: x, "not the next token"),
    "two ahead": (lambda x, y: y.roll(-1, 1), "not the next token"),
    "one wrong": (lambda x, y: y.index_put((torch.tensor(5), torch.tensor(77)), y[5, 77] + 1), "1 of 2,040 targets"),
    "right": (lambda x, y: y, ""),
    "last targets of rows": (lambda x, y: y.index_fill(1, torch.tensor(255), 0), ""),
    "masked ones": (lambda x, y: y.index_fill(1, torch.arange(10, 20), IGNORE), ""),
}


@pytest.mark.parametrize("case", TARGETS)
def test_wrong_targets_are_a_fault(case: str) -> None:
    change, words = TARGETS[case]
    found = wrong_targets([(x, change(x, y)) for x, y in batches(corpus(random_text(10_000)), rows=8)])
    assert found.is_fault == bool(words) == (found.value > 0) and words in found.sentence
    assert not words or "loader" in found.fix
