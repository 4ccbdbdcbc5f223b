"""Targets that do not follow from their tokens: each kind of damage is found, and sound batches are not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsmini.data.corpus import Corpus
from dsmini.diagnosis.findings.labels import ENOUGH, label_damage
from tests.helpers.token_texts import batches, corpus, random_text


def test_default_corpus_has_sound_labels(default: Corpus) -> None:
    found = label_damage(batches(default))
    assert not found.is_fault and found.low > 0.3 and found.unit == "nats a token"


@pytest.mark.parametrize("rows", [8, 512])
@pytest.mark.parametrize("kinds", [256, 129_280])
def test_shuffled_corpus_carries_no_information(default: Corpus, rows: int, kinds: int) -> None:
    if kinds == 256:
        ordered = np.asarray(default.train)
    else:  # bytes and the words before them: 129,280 kinds of tokens, most of them rare
        ordered = np.asarray(default.train).astype(np.uint32)
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


def test_rows_of_different_topics_are_not_information() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(first, first + 4, 257) for first in range(0, 256, 4)])
    whole = torch.from_numpy(rows)
    assert label_damage([(whole[:, :-1], whole[:, 1:])] * 2).is_fault


def shuffled_targets(targets: Tensor) -> Tensor:
    return targets.flatten()[torch.randperm(targets.numel())].reshape(targets.shape)


DAMAGES = {
    "shuffled": lambda x, y: shuffled_targets(y),
    "another row": lambda x, y: y.roll(1, 0),
    "the token itself": lambda x, y: x,
    "two ahead": lambda x, y: y.roll(-1, 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_targets_are_a_fault(default: Corpus, damage: str) -> None:
    found = label_damage([(x, DAMAGES[damage](x, y)) for x, y in batches(default)])
    assert found.is_fault and "not the next token" in found.sentence and "loader" in found.fix


def test_one_wrong_target_is_a_fault(default: Corpus) -> None:
    pairs = [(x, y.clone()) for x, y in batches(default, 16)]
    pairs[-1][1][5, 77] += 1
    found = label_damage(pairs)
    assert found.is_fault and "1 of 4,080 targets" in found.sentence


def test_last_target_of_a_row_and_masked_ones_are_not_checked(default: Corpus) -> None:
    pairs = [(x, y.clone()) for x, y in batches(default)]
    for _, targets in pairs:
        targets[:, -1] = 0
        targets[:, 10:20] = -100
    assert not label_damage(pairs).is_fault


@pytest.mark.parametrize(("rows", "seq_len"), [(8, ENOUGH // 8 - 1), (ENOUGH * 2, 1)])
def test_too_few_pairs_say_nothing(rows: int, seq_len: int) -> None:
    found = label_damage(batches(corpus(random_text(100_000)), rows, seq_len))
    assert not found.is_fault and "too few" in found.sentence
    assert not label_damage([]).is_fault


@pytest.mark.parametrize("seq_len", [2, 4, 16, 64, 256, 300])
def test_few_pairs_of_sound_text_are_not_a_fault(default: Corpus, seq_len: int) -> None:
    assert not label_damage(batches(default, 8, seq_len)).is_fault


def test_endless_batches_are_read_in_part(default: Corpus) -> None:
    def endless() -> Any:
        while True:
            yield default.batch(0, 64, 256, 0)

    assert not label_damage(endless()).is_fault


def test_seed_decides_the_shuffles(default: Corpus) -> None:
    pairs = batches(default, 16)
    once, again, other = (label_damage(pairs, seed) for seed in (3, 3, 4))
    assert once == again and once.value != other.value


def test_batch_of_other_shapes_raises() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 8\).*\(2, 7\)"):
        label_damage([(torch.zeros(2, 8).long(), torch.zeros(2, 7).long())])
