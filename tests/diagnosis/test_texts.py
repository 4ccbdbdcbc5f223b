"""Findings in texts: copies, leaks and damaged labels, put into texts whose truth is known."""

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini.data.corpus import Corpus
from dsmini.diagnosis import texts
from dsmini.diagnosis.findings import finding, padding
from dsmini.diagnosis.texts import DUPLICATES, ENOUGH, LEAK, duplicates, held_out_leak, label_damage
from dsmini.measure.turns import Estimate
from dsmini.nn.transformer import IGNORE
from tests.helpers.token_texts import batches, corpus, random_text

LENGTH = 200
"""Tokens of a passage where a token is a byte."""


# --- the default text


def test_default_corpus_is_healthy(default: Corpus) -> None:
    """Check all findings: licence headers are copies, and there is room for other versions of Python."""
    copies, leak, labels = duplicates(default), held_out_leak(default), label_damage(batches(default))
    assert not any(each.is_fault for each in (copies, leak, labels))
    assert 0.005 < copies.value < DUPLICATES / 3 and leak.value < LEAK / 2
    assert labels.low > 0.3 and labels.unit == "nats a token"


# --- copies


@pytest.mark.parametrize("kinds", [256, 129_280])
@pytest.mark.parametrize(("length", "copied"), [(LENGTH - 1, 0), (LENGTH, LENGTH), (1000, 1000)])
def test_copied_piece_is_counted_twice(kinds: int, length: int, copied: int) -> None:
    """Check that a piece shorter than a passage is no copy."""
    text = random_text(100_000, kinds)
    text[70_000 : 70_000 + length] = text[10_000 : 10_000 + length]
    found = duplicates(corpus(text))
    assert found.value == found.low == found.high == 2 * copied / 100_000
    assert not found.is_fault and not found.fix


def test_leak_is_the_share_of_held_out_tokens() -> None:
    train, val = random_text(50_000), random_text(5_000, seed=1)
    assert held_out_leak(corpus(train, val)).value == 0.0
    val[1_000:2_000] = train[40_000:41_000]
    found = held_out_leak(corpus(train, val))
    assert found.value == 0.2 and found.is_fault and "held-out" in found.sentence


@pytest.mark.parametrize("n", [1, LENGTH - 1, LENGTH])
def test_text_shorter_than_two_passages_has_no_copies(n: int) -> None:
    short, beside = corpus(random_text(n)), corpus(random_text(1_000), random_text(n, seed=1))
    for found in (duplicates(short), duplicates(beside), held_out_leak(beside)):
        assert found.value == 0.0 and not found.is_fault
    assert ("less than one passage" in duplicates(short).sentence) == (n < LENGTH)


def brute_force(text: list[int], other: list[int] | None, length: int) -> float:
    """Return the share of tokens in passages that occur twice in the text, or once in the other one."""

    def all_of(ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]

    counts = Counter(all_of(text if other is None else other))
    copied = [counts[passage] >= (2 if other is None else 1) for passage in all_of(text)]
    return float(np.mean([any(copied[max(0, t - length + 1) : t + 1]) for t in range(len(text))]))


tokens = st.sampled_from([0, 1, 2, 1 << 8, 1 << 16])  # whose sums, orders and high bytes must not be mixed up
ids = st.lists(tokens, min_size=5, max_size=80)


@given(text=ids, other=ids, length=st.integers(1, 5))
def test_copied_share_is_that_of_brute_force(text: list[int], other: list[int], length: int) -> None:
    both = np.array(text, dtype=np.uint32), np.array(other, dtype=np.uint32)
    hashes, others = (texts.passage_hashes(each, length) for each in both)
    for copied, want in (
        (texts.repeated(hashes), brute_force(text, None, length)),
        (texts.occurring(hashes, others), brute_force(text, other, length)),
    ):
        assert texts.covered(copied, length).mean() == want


# --- large texts


def test_of_a_large_text_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a copy inside the first 10,000 tokens, and one after them that is not seen; the sentence says so."""
    monkeypatch.setattr(texts, "MOST_READ", 10_000)
    monkeypatch.setattr(texts, "MOST_HELD_OUT", 1_000)
    text, held_out = random_text(50_000), random_text(5_000, seed=1)
    text[5_000:5_500] = text[1_000:1_500] = held_out[:500]
    text[30_000:31_000] = text[20_000:21_000] = held_out[2_000:3_000]
    copies, leak = duplicates(corpus(text, held_out)), held_out_leak(corpus(text, held_out))
    assert copies.value == 0.1 and "the first 10,000 of 50,000 tokens were compared" in copies.sentence
    assert leak.value == 0.5 and "the first 1,000 of 5,000 tokens" in leak.sentence


@pytest.mark.slow
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


# --- what a finding is


def test_finding_is_a_fault_only_with_a_fix() -> None:
    interval = Estimate(value=0.5, low=0.4, high=0.6, turns=9)
    found = [finding("Data", "x", interval, "A.", fix, is_fault=fault) for fix, fault in (("B.", True), ("B.", False))]
    assert [(each.is_fault, each.fix) for each in found] == [(True, "B."), (False, "")]
    assert (found[0].low, found[0].value, found[0].high) == (0.4, 0.5, 0.6)
    assert finding("Data", "x", 0.3, "A.").high == 0.3


# --- padding

OUT = IGNORE
# targets, the share that is left out, if it is a fault, and words of the sentence
PADDED: dict[str, tuple[list[list[int]], float, bool, str]] = {
    "none": ([[0] * 8] * 6, 0.0, False, "0.0% of the 48 targets"),
    "two of three at the end": ([[1, 2, OUT, 4, OUT, OUT]], 0.5, True, "33.3% stand after"),
    "a masked prompt is context": ([[OUT] * 9 + [1]] * 2, 0.9, False, "0.0% stand after"),
    "a row without a target": ([[1, 2], [OUT, OUT]], 0.5, True, "50.0% stand after"),
    "a tenth": ([[0] * 90 + [OUT] * 10], 0.1, False, "10.0% stand after"),
    "more than a tenth": ([[0] * 89 + [OUT] * 11], 0.11, True, "11.0% stand after"),
}


@pytest.mark.parametrize("case", PADDED)
def test_targets_after_the_last_that_counts_are_for_nothing(case: str) -> None:
    rows, share, is_fault, words = PADDED[case]
    found = padding([torch.tensor(rows)])
    assert (found.value, found.is_fault, bool(found.fix)) == (share, is_fault, is_fault) and words in found.sentence


# --- labels: targets that do not follow from their tokens

Pairs = Iterable[tuple[Tensor, Tensor]]


def changed(change: Callable[[Tensor, Tensor], Tensor], rows: int = 512) -> Callable[[Corpus], Pairs]:
    """Return what makes batches of a text whose targets are changed."""
    return lambda text: ((x, change(x, y.clone())) for x, y in batches(text, rows))


def without_last_and_masked(_x: Tensor, y: Tensor) -> Tensor:
    y[:, -1], y[:, 10:20] = 0, -100
    return y


def one_wrong(_x: Tensor, y: Tensor) -> Tensor:
    y[5, 77] += 1
    return y


def topics(_text: Corpus) -> Pairs:
    """Yield rows of four kinds of tokens each, other ones in each row, in no order."""
    rng = np.random.default_rng(0)
    whole = torch.from_numpy(np.stack([rng.integers(first, first + 4, 257) for first in range(0, 256, 4)]))
    return [(whole[:, :-1], whole[:, 1:])] * 2


# what makes batches of the default text, or of another, and words of the sentence where they are at fault
LABELS: dict[str, tuple[Callable[[Corpus], Pairs], str]] = {
    "shuffled": (changed(lambda x, y: y.flatten()[torch.randperm(y.numel())].reshape(y.shape)), "not the next token"),
    "another row": (changed(lambda x, y: y.roll(1, 0)), "not the next token"),
    "the token itself": (changed(lambda x, y: x), "not the next token"),
    "two ahead": (changed(lambda x, y: y.roll(-1, 1)), "not the next token"),
    "one wrong": (changed(one_wrong, rows=8), "1 of 2,040 targets"),
    "topics of rows alone": (topics, "no better than by chance"),
    "last targets of rows, and masked ones": (changed(without_last_and_masked), ""),
    "endless batches": (lambda text: (text.batch(0, 64, 256, 0) for _ in itertools.count()), ""),
    **{f"rows of {n}": (lambda text, n=n: batches(text, 8, n), "") for n in (2, 4, 16, 64, 256, 300)},
}


@pytest.mark.parametrize("case", LABELS)
def test_damaged_targets_are_a_fault(default: Corpus, case: str) -> None:
    make, words = LABELS[case]
    found = label_damage(make(default))
    assert found.is_fault == bool(words) and words in found.sentence
    assert not words or "loader" in found.fix


@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("kinds", [256, 129_280])
def test_shuffled_corpus_carries_no_information(default: Corpus, rows: int, kinds: int) -> None:
    ordered = np.asarray(default.train[:3_000_000])
    if kinds > 256:  # bytes and the words before them: 129,280 kinds of tokens, most of them rare
        ordered = ordered.astype(np.uint32)
        ordered = (ordered[:-2] * 65_536 + ordered[1:-1] * 256 + ordered[2:])[::3] % kinds
    assert not label_damage(batches(corpus(ordered), rows)).is_fault
    shuffled = corpus(np.random.default_rng(0).permutation(ordered))
    found = label_damage(batches(shuffled, rows))
    assert found.is_fault and "no better than by chance" in found.sentence and "not the next" not in found.sentence
    assert abs(found.value) < 0.05, "without bias"


def test_information_of_a_known_chain_is_exact() -> None:
    """A chain of 8 kinds repeats its token with chance 1/2: I = log 8 - H(9/16, 7 times 1/16)."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 8, 200_000)
    for t in range(1, len(text)):
        if rng.random() < 0.5:
            text[t] = text[t - 1]
    expected = np.log(8) + 9 / 16 * np.log(9 / 16) + 7 / 16 * np.log(1 / 16)
    found = label_damage(batches(corpus(text)))
    assert found.low <= expected <= found.high and found.high - found.low < 0.03


@pytest.mark.parametrize(("rows", "seq_len"), [(8, ENOUGH // 8 - 1), (ENOUGH * 2, 1)])
def test_too_few_pairs_say_nothing(rows: int, seq_len: int) -> None:
    found = label_damage(batches(corpus(random_text(100_000)), rows, seq_len))
    assert not found.is_fault and "too few" in found.sentence
    assert not label_damage([]).is_fault
