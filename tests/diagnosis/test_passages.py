"""Copied passages: equal to brute force on small texts, within the interval on samples of larger ones."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsmini.data.corpus import Corpus
from dsmini.diagnosis.findings import passages
from dsmini.diagnosis.findings.text import DUPLICATES, LEAK, duplicates, held_out_leak
from tests.helpers.token_texts import corpus, random_text

LENGTH = 200
"""Tokens of a passage where a token is a byte."""


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample texts of more than 2^16 tokens, and read 2^17 of them in blocks of 2^8."""
    for name, value in {"EXACT": 1 << 16, "READ": 1 << 17, "BLOCK": 1 << 8, "ALL_ASKED": 1 << 10}.items():
        monkeypatch.setattr(passages, name, value)


def brute_force(text: list[int], other: list[int] | None, length: int) -> float:
    """Return the share of tokens in passages that occur twice in the text, or once in the other one."""

    def all_of(ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]

    counts = Counter(all_of(text if other is None else other))
    copied = [counts[passage] >= (2 if other is None else 1) for passage in all_of(text)]
    return float(np.mean([any(copied[max(0, t - length + 1) : t + 1]) for t in range(len(text))]))


ids = st.lists(st.integers(0, 2), min_size=5, max_size=80)


@given(text=ids, length=st.integers(1, 5))
def test_copied_share_equals_brute_force(text: list[int], length: int) -> None:
    found = passages.copied_within(np.array(text, dtype=np.uint8), length, 0)
    assert found.low == found.value == found.high == brute_force(text, None, length)


@given(text=ids, other=ids, length=st.integers(1, 5))
def test_leaked_share_equals_brute_force(text: list[int], other: list[int], length: int) -> None:
    both = np.array(text, dtype=np.uint16), np.array(other, dtype=np.uint16)
    found = passages.copied_from(*both, length, 0)
    assert found.low == found.value == found.high == brute_force(text, other, length)


@pytest.mark.parametrize("n", [passages.BLOCK - 1, passages.BLOCK, 2 * passages.BLOCK + 63])
def test_hashes_across_blocks_repeat_with_the_text(n: int) -> None:
    text = random_text(n, 129_280)
    hashes = passages.passage_hashes(np.concatenate([text, text]), LENGTH)
    assert np.array_equal(hashes[:n][: n - LENGTH + 1], hashes[n:])
    assert len(np.unique(hashes)) == n, "as many as passages of the text read as a circle"


def test_hashes_depend_on_each_token_and_on_the_order() -> None:
    text = random_text(LENGTH)
    steps = [(i, step) for i in range(LENGTH) for step in (1, 1 << 8, 1 << 16)]
    changed = [text.copy() for _ in steps]
    for row, (i, step) in zip(changed, steps, strict=True):
        row[i] += step
    rows = [text, text[::-1], np.roll(text, 1), *changed]
    assert len({int(passages.passage_hashes(row, LENGTH)[0]) for row in rows}) == len(rows)


def test_repeated_finds_each_of_many_equal_hashes() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 1 << 64, 30_000, dtype=np.uint64)
    counts = rng.integers(1, 4, len(kinds))
    order = rng.permutation(counts.sum())
    hashes = np.repeat(kinds, counts)[order]
    assert np.array_equal(passages.repeated(hashes), np.repeat(counts > 1, counts)[order])


def sampled(train: NDArray[Any], val: NDArray[Any] | None = None) -> Corpus:
    """Return a corpus whose passages have 10 tokens, much less than a block of `small_limits`."""
    held_out = random_text(1_000, 50_000, seed=2) if val is None else val
    return corpus(train, held_out, val_bytes=20 * len(held_out))


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("n", [100_000, 500_000])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.6, 1.0])
def test_sample_covers_the_true_share(n: int, share: float) -> None:
    text = random_text(n, 50_000)
    half = int(share * n / 2)
    text[n // 2 : n // 2 + half] = text[:half]
    found = duplicates(sampled(text))
    assert found.low - 0.01 <= share <= found.high + 0.01  # tokens at a block's beginning lose passages
    # five standard errors of the draws that are independent, of which a fraction sees its copy
    fraction = min(1.0, passages.READ / n)
    draws = passages.ASKED if fraction == 1.0 else passages.ASKED / (1 + 2 * passages.ASKED / 512)
    error = 5 * (share * fraction * (1 - share * fraction) / draws) ** 0.5 / fraction
    assert found.value == pytest.approx(share, abs=error + 0.01)
    assert found.is_fault == (share > DUPLICATES)
    assert "random tokens were looked for in" in found.sentence


@pytest.mark.usefixtures("small_limits")
def test_sample_is_right_on_average_over_seeds() -> None:
    """Half of a text of 2^19 tokens occurs three times, a quarter of the text is read."""
    n = 1 << 19
    text = random_text(n, 50_000)
    third = n // 6
    text[:third] = text[third : 2 * third] = text[2 * third : 3 * third]
    found = [duplicates(sampled(text), seed) for seed in range(20)]
    spread = float(np.std([one.value for one in found], ddof=1))
    assert np.mean([one.value for one in found]) == pytest.approx(0.5, abs=4 * spread / 20**0.5 + 0.02)
    assert sum(one.low <= 0.5 <= one.high for one in found) >= 18


@pytest.mark.usefixtures("small_limits")
def test_interval_holds_where_a_quarter_is_read() -> None:
    text = random_text(1 << 19, 50_000)
    copied = int(0.15 * len(text))
    text[-copied:] = text[:copied]
    found = [duplicates(sampled(text), seed) for seed in range(60)]
    assert sum(one.low <= 0.3 <= one.high for one in found) >= 57, "95% of them"


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("times", [2, 3, 10])
def test_sample_of_text_repeated_is_a_fault(times: int) -> None:
    found = duplicates(sampled(np.tile(random_text(600_000 // times, 50_000), times)))
    assert found.value > 0.7 and found.high == 1.0 and found.is_fault


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(("n", "share"), [(100_000, 0.5), (500_000, 0.5), (500_000, 0.0)])
def test_sampled_leak_covers_the_true_share(n: int, share: float) -> None:
    train, val = random_text(n, 50_000), random_text(20_000, 50_000, seed=1)
    pieces = int(share * 400)  # spread, so that the blocks that are read hold their part of them
    for i in range(pieces):
        val[i * 50 : i * 50 + 50] = train[i * (n // 401) : i * (n // 401) + 50]
    found = held_out_leak(sampled(train, val))
    assert found.low - 0.01 <= share <= found.high + 0.01
    assert found.is_fault == (share > LEAK)


@pytest.mark.usefixtures("small_limits")
def test_seed_decides_the_sample() -> None:
    text = sampled(np.concatenate([random_text(90_000, 9_000)] * 2 + [random_text(300_000, 9_000, seed=1)]))
    once, again, other = (duplicates(text, seed) for seed in (3, 3, 4))
    assert once == again and once.value != other.value
