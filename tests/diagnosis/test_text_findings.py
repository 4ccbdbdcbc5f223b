"""Findings in texts: known shares of copies, healthy texts, bounds on large ones, entropies."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings import passages
from dsmini.diagnosis.findings.labels import label_damage
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
SECONDS, BYTES = 3.0, 1 << 30


@pytest.mark.parametrize("kinds", [256, 129_280])
@pytest.mark.parametrize("length", [LENGTH, 1000])
def test_copied_piece_is_counted_twice(kinds: int, length: int) -> None:
    text = random_text(100_000, kinds)
    text[70_000 : 70_000 + length] = text[10_000 : 10_000 + length]
    found = duplicates(corpus(text))
    assert found.value == found.low == found.high == 2 * length / 100_000
    assert not found.is_fault and not found.fix


def test_piece_shorter_than_a_passage_is_not_a_copy() -> None:
    text = random_text(100_000)
    text[70_000 : 70_000 + LENGTH - 1] = text[10_000 : 10_000 + LENGTH - 1]
    assert duplicates(corpus(text)).value == 0.0


@pytest.mark.parametrize("times", [2, 10])
def test_repeated_text_is_a_fault(times: int) -> None:
    found = duplicates(corpus(np.tile(random_text(5_000), times)))
    assert found.value == 1.0 and found.is_fault and "100.0%" in found.sentence and found.fix


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
    for text in (corpus(random_text(n)), corpus(random_text(1_000), random_text(n, seed=1))):
        for found in (duplicates(text), held_out_leak(text)):
            if found.name == "duplicates" or len(text.train) == 1_000:
                assert found.value == 0.0 and not found.is_fault
    assert ("less than one passage" in duplicates(corpus(random_text(n))).sentence) == (n < LENGTH)


def test_default_corpus_is_healthy(default: Corpus) -> None:
    copies, leak = duplicates(default), held_out_leak(default)
    assert 0.005 < copies.value < DUPLICATES / 3, "licence headers, and room for other versions of Python"
    assert leak.value < LEAK / 2
    assert not copies.is_fault and not leak.is_fault


def test_default_corpus_twice_is_a_fault(default: Corpus) -> None:
    twice = corpus(np.tile(default.train, 2), default.train[1_000_000:1_300_000])
    copies, leak = duplicates(twice), held_out_leak(twice)
    assert copies.value == leak.value == 1.0 and copies.is_fault and leak.is_fault


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint16]:
    """Map 200 million tokens: 100 million random ones, written twice."""
    path = tmp_path_factory.mktemp("large") / "train.bin"
    with path.open("wb") as file:
        for _ in range(2):
            rng = np.random.default_rng(0)
            for _ in range(100):
                file.write(rng.bytes(2_000_000))
    return np.memmap(path, dtype=np.uint16, mode="r")


@pytest.mark.parametrize("n", [passages.EXACT, 200_000_000])
def test_large_text_takes_bounded_time_and_memory(mapped: NDArray[np.uint16], n: int) -> None:
    text = corpus(mapped[:n], mapped[-1_000_000:])
    tracemalloc.start()
    start = time.process_time()
    try:
        found = [duplicates(text), held_out_leak(text), unigram_entropy(text)]
        assert time.process_time() - start < SECONDS * len(found)
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()
    assert found[0].is_fault == (n == 200_000_000)
    assert found[2].value == pytest.approx(np.log(65_536), abs=0.001)


@pytest.mark.parametrize("kinds", [256, 129_280])
def test_entropy_of_uniform_tokens_is_log_of_their_number(kinds: int) -> None:
    found = unigram_entropy(corpus(random_text(500_000, kinds)))
    # counts of n uniform draws miss (K - 1) / 2n, 0.13 nats; the next term of the series is K^2 / 12 n^2, 0.006
    assert found.value == pytest.approx(np.log(kinds), abs=0.02)
    assert found.low == found.value == found.high and not found.is_fault


def test_entropy_of_the_default_corpus_is_counted(default: Corpus) -> None:
    share = np.bincount(default.train) / len(default.train)
    share = share[share > 0]
    assert unigram_entropy(default).value == pytest.approx(-(share * np.log(share)).sum(), abs=1e-4)


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


def test_all_findings_of_a_text(default: Corpus) -> None:
    names = ["duplicates", "held_out_leak", "label_damage", "unigram_entropy"]
    pairs = batches(default, 64)
    assert [found.name for found in text_findings(default, pairs)] == names
    more = text_findings(default, pairs, trained=1_000_000, loss=2.0)
    assert [found.name for found in more] == [*names, "epochs", "loss_above_frequencies"]
    assert not any(found.is_fault for found in more)
    assert all(found.sentence.endswith((".", ").")) for found in more)


def test_finding_outside_its_interval_raises() -> None:
    about: Any = {"axis": "Data", "name": "x", "unit": "share", "sentence": "A.", "low": 0.0, "high": 1.0}
    with pytest.raises(ValueError, match="outside"):
        Finding(value=2.0, is_fault=False, **about)
    with pytest.raises(ValueError, match="without a fix"):
        Finding(value=0.5, is_fault=True, **about)


def test_tiny_shakespeare_like_verse_is_healthy(tmp_path: Path) -> None:
    """Speeches of a few hundred words, with names and phrases that repeat, are no copies of each other."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 8))) for _ in range(4_000)]
    share = 1 / np.arange(1, len(words) + 1)
    lines = [" ".join(line) for line in rng.choice(words, (8_000, 8), p=share / share.sum())]
    names = ["FIRST CITIZEN", "MENENIUS", "CORIOLANUS"]
    text = "".join(f"{names[i % 3]}:\n{line}\n\n" for i, line in enumerate(lines))
    (tmp_path / "verse.txt").write_text(text)
    found = load_corpus(DataConfig(path=tmp_path / "verse.txt"), 256, 256, tmp_path / "cache")
    assert duplicates(found).value < 0.01 and held_out_leak(found).value < 0.01
    assert not label_damage(batches(found)).is_fault
