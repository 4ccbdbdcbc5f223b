"""Findings in texts: copies, leaks, entropies and damaged labels, put into texts whose truth is known."""

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings import passages
from dsmini.diagnosis.findings import text as text_module
from dsmini.diagnosis.findings.labels import ENOUGH, label_damage
from dsmini.diagnosis.findings.text import (
    DUPLICATES,
    LEAK,
    duplicates,
    epochs,
    held_out_leak,
    loss_above_frequencies,
    text_findings,
    unigram_entropy,
)
from tests.helpers.token_texts import batches, corpus, random_text

LENGTH = 200
"""Tokens of a passage where a token is a byte."""


# --- the default text


def test_default_corpus_is_healthy(default: Corpus) -> None:
    """Check all findings: licence headers are copies, and there is room for other versions of Python."""
    found = {each.name: each for each in text_findings(default, batches(default), trained=1_000_000, loss=2.0)}
    names = ["duplicates", "held_out_leak", "label_damage", "unigram_entropy", "epochs", "loss_above_frequencies"]
    assert [*found] == names and not any(each.is_fault for each in found.values())
    assert [each.name for each in text_findings(corpus(random_text(500)), [])] == names[:4]
    assert all(each.sentence.endswith((".", ").")) for each in found.values())
    assert 0.005 < found["duplicates"].value < DUPLICATES / 3 and found["held_out_leak"].value < LEAK / 2
    assert found["label_damage"].low > 0.3 and found["label_damage"].unit == "nats a token"
    share = np.bincount(default.train) / len(default.train)
    share = share[share > 0]
    assert found["unigram_entropy"].value == pytest.approx(-(share * np.log(share)).sum(), abs=1e-4)


def test_default_corpus_twice_is_a_fault(default: Corpus) -> None:
    once = default.train[:1_000_000]
    twice = corpus(np.tile(once, 2), once[500_000:800_000])
    copies, leak = duplicates(twice), held_out_leak(twice)
    assert copies.value == leak.value == 1.0 and copies.is_fault and leak.is_fault
    assert "100.0%" in copies.sentence and copies.fix


def test_verse_with_names_that_repeat_is_healthy(tmp_path: Path) -> None:
    """Speeches of a few hundred words, with names and phrases that repeat, are no copies of each other."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 8))) for _ in range(1_000)]
    share = 1 / np.arange(1, len(words) + 1)
    lines = [" ".join(line) for line in rng.choice(words, (4_000, 8), p=share / share.sum())]
    names = ["FIRST CITIZEN", "MENENIUS", "CORIOLANUS"]
    (tmp_path / "verse.txt").write_text("".join(f"{names[i % 3]}:\n{line}\n\n" for i, line in enumerate(lines)))
    found = load_corpus(DataConfig(path=tmp_path / "verse.txt"), 256, 256, tmp_path / "cache")
    assert duplicates(found).value < 0.01 and held_out_leak(found).value < 0.01
    assert not label_damage(batches(found)).is_fault


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


def test_passage_has_fewer_tokens_where_tokens_are_longer() -> None:
    text = random_text(10_000, 129_280)
    text[7_000:7_050] = text[1_000:1_050]
    held_out = random_text(1_000, 129_280, seed=1)
    assert duplicates(corpus(text, held_out, val_bytes=4_000)).value == 100 / 10_000
    assert duplicates(corpus(text, held_out, val_bytes=3_900)).value == 0.0, "passages of 51 tokens"


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
    """Compare texts that are hashed in blocks of 8 tokens, which passages cross."""
    both = np.array(text, dtype=np.uint32), np.array(other, dtype=np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passages, "BLOCK", 8)
        for found, want in (
            (passages.copied_within(both[0], length, 0), brute_force(text, None, length)),
            (passages.copied_from(*both, length, 0), brute_force(text, other, length)),
        ):
            assert found.low == found.value == found.high == want


def test_repeated_finds_each_of_many_equal_hashes() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 1 << 64, 30_000, dtype=np.uint64)
    counts = rng.integers(1, 4, len(kinds))
    order = rng.permutation(counts.sum())
    hashes = np.repeat(kinds, counts)[order]
    assert np.array_equal(passages.repeated(hashes), np.repeat(counts > 1, counts)[order])


# --- samples of large texts


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample texts of more than 2^16 tokens, and read 2^17 of them in blocks of 2^8."""
    for name, value in {"EXACT": 1 << 16, "READ": 1 << 17, "BLOCK": 1 << 8, "ALL_ASKED": 1 << 10}.items():
        monkeypatch.setattr(passages, name, value)
    for name, value in {"EXACT": 1 << 16, "BLOCK": 1 << 8, "_COUNTED": 1 << 18}.items():
        monkeypatch.setattr(text_module, name, value)


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
    often = duplicates(sampled(np.tile(random_text(60_000, 50_000), 10)))
    assert often.value > 0.7 and often.high == 1.0 and often.is_fault
    assert duplicates(sampled(text), 3) == found[3] != found[4], "the seed decides the sample"


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
def test_interval_holds_where_a_quarter_is_read() -> None:
    text = random_text(1 << 19, 50_000)
    copied = int(0.15 * len(text))
    text[-copied:] = text[:copied]
    found = [duplicates(sampled(text), seed) for seed in range(60)]
    assert sum(one.low <= 0.3 <= one.high for one in found) >= 57, "95% of them"


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


class Counted(np.ndarray):
    """Tokens that count how many of them are read."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = np.asarray(self)[place]
        self.read += found.size
        return found


@pytest.mark.usefixtures("small_limits")
def test_large_text_is_read_in_part() -> None:
    """Check that no more tokens are read, and no more memory taken, of a text that is four times as long."""
    read, most = [], []
    for n in (1 << 19, 1 << 21):
        text = random_text(n, 50_000).view(Counted)
        tracemalloc.start()
        found = [find(sampled(text)) for find in (duplicates, held_out_leak, unigram_entropy)]
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        read.append(text.read)
        assert not found[0].is_fault and found[2].value == pytest.approx(np.log(50_000), abs=0.1)
    # twice READ with what blocks overlap, the entropy's sample, and the passages around each asked token
    assert max(read) < 2 * (1 << 17) * 1.1 + (1 << 18) + 2 * passages.ASKED * 20
    assert most[1] < 1.2 * most[0]


@pytest.mark.slow
@pytest.mark.parametrize("n", [passages.EXACT, 200_000_000])
def test_largest_texts_fit_into_memory(tmp_path: Path, n: int) -> None:
    """Map 100 million random tokens, written twice: half of it is never read, and none is held."""
    path = tmp_path / "train.bin"
    with path.open("wb") as file:
        for _ in range(2 if n > passages.EXACT else 1):
            rng = np.random.default_rng(0)
            for _ in range(100):
                file.write(rng.bytes(2_000_000))
    mapped = np.memmap(path, dtype=np.uint16, mode="r")
    text = corpus(mapped[:n], mapped[-1_000_000:])
    tracemalloc.start()
    try:
        found = [duplicates(text), held_out_leak(text), unigram_entropy(text)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 30
    finally:
        tracemalloc.stop()
    assert found[0].is_fault == (n == 200_000_000)
    assert found[2].value == pytest.approx(np.log(65_536), abs=0.001)


# --- entropies and epochs


@pytest.mark.parametrize("kinds", [256, 129_280])
def test_entropy_of_uniform_tokens_is_log_of_their_number(kinds: int) -> None:
    found = unigram_entropy(corpus(random_text(500_000, kinds)))
    # counts of n uniform draws miss (K - 1) / 2n, 0.13 nats; the next term of the series is K^2 / 12 n^2, 0.006
    assert found.value == pytest.approx(np.log(kinds), abs=0.02)
    assert found.low == found.value == found.high and not found.is_fault


def test_loss_above_the_entropy_is_named() -> None:
    text = corpus(random_text(100_000))
    above, below = (loss_above_frequencies(text, loss) for loss in (5.6, 5.4))
    assert above.is_fault and above.axis == "Algorithm" and "knows less" in above.sentence and above.fix
    assert not below.is_fault and "knows more" in below.sentence and below.value < 0 < above.value
    with pytest.raises(ValueError, match="finite"):
        loss_above_frequencies(text, float("nan"))


def test_epochs_are_tokens_trained_over_tokens() -> None:
    found = epochs(corpus(random_text(1_000)), 2_500)
    assert found.value == 2.5 and found.unit == "epochs" and not found.is_fault


def test_finding_outside_its_interval_raises() -> None:
    about: Any = {"axis": "Data", "name": "x", "unit": "share", "sentence": "A.", "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="outside"):
        Finding(value=2.0, is_fault=False, **about)
    with pytest.raises(ValueError, match="without a fix"):
        Finding(value=0.5, is_fault=True, **about)


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


def test_seed_decides_the_shuffles(default: Corpus) -> None:
    pairs = batches(default, 16)
    once, again, other = (label_damage(pairs, seed) for seed in (3, 3, 4))
    assert once == again and once.value != other.value


def test_batch_of_other_shapes_raises() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 8\).*\(2, 7\)"):
        label_damage([(torch.zeros(2, 8).long(), torch.zeros(2, 7).long())])
