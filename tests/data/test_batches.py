"""Batches: each token trained on once an epoch, in an order that is a function of the seed and not of the workers."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dsmini.data.corpus import Corpus, Loader
from dsmini.data.order import permute
from tests.helpers.corpora import corpus


def corpus_of(train: bytes = b"a" * 100, val: bytes = b"") -> Corpus:
    return corpus(np.frombuffer(train, np.uint8), np.frombuffer(val, np.uint8))


def inputs_of(corpus: Corpus, first: int, n: int, seq_len: int, seed: int) -> list[list[int]]:
    return corpus.batch(first, n, seq_len, seed)[0].tolist()


def keys_of(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(6, np.uint64).astype(np.uint64)


@given(st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_permutation_is_one_to_one(n: int, seed: int) -> None:
    assert sorted(permute(np.arange(n), n, keys_of(seed)).tolist()) == list(range(n))


def test_every_order_of_four_is_equally_likely() -> None:
    seen = Counter(tuple(permute(np.arange(4), 4, keys_of(seed))) for seed in range(2400))
    assert len(seen) == 24
    # each is binomial with mean 100 and deviation below 10: five of them are passed once in a million tests
    assert all(abs(count - 100) < 50 for count in seen.values())


@given(st.data(), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_epoch_trains_on_every_token_once(data: st.DataObject, seq_len: int, seed: int, epoch: int) -> None:
    size = data.draw(st.integers(seq_len + 1, 250))
    corpus, per_epoch = corpus_of(bytes(range(size))), size // seq_len
    rows = inputs_of(corpus, epoch * per_epoch, per_epoch, seq_len, seed)
    seen = Counter(token for row in rows for token in row)
    assert set(seen.values()) == {1}
    assert size - len(seen) == size % seq_len


@given(st.integers(9, 250), st.integers(0, 100), st.integers(1, 60), st.integers(0, 9))
def test_targets_are_the_next_tokens_of_a_circle(size: int, first: int, n: int, seed: int) -> None:
    tokens, targets = corpus_of(bytes(range(size))).batch(first, n, 8, seed)
    assert tokens.shape == targets.shape == (n, 8) and tokens.dtype == targets.dtype == torch.int64
    assert torch.equal((tokens + 1) % size, targets)


@given(st.lists(st.integers(0, 200), min_size=2, max_size=9, unique=True).map(sorted), st.integers(0, 9))
def test_stream_can_start_at_any_position(places: list[int], seed: int) -> None:
    corpus = corpus_of(bytes(range(200)))
    whole = inputs_of(corpus, 0, places[-1], 7, seed)
    for start, stop in pairwise(places):
        assert inputs_of(corpus, start, stop - start, 7, seed) == whole[start:stop]


def test_epochs_and_seeds_differ_in_order_and_offset() -> None:
    corpus = corpus_of(bytes(range(250)))
    epochs = [inputs_of(corpus, epoch * 31, 31, 8, seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(row[0] for row in rows) for rows in epochs}) == 3
    assert len({rows[0][0] % 8 for rows in epochs}) > 1
    assert sorted(row[0] for row in epochs[0]) != [row[0] for row in epochs[0]]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_do_not_depend_on_workers(workers: int) -> None:
    corpus = corpus_of(bytes(range(250)))
    loader = Loader(corpus, 8, seed=3, workers=workers)
    requests = [(sum(range(i)), i) for i in range(1, 30)]
    for i, (first, n) in enumerate(requests):
        got, want = loader.take(requests[i : i + 4]), corpus.batch(first, n, 8, 3)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_reaches_the_training(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    def fail(self: Corpus, first: int, *rest: int) -> None:
        raise OSError(f"sequence {first}")

    monkeypatch.setattr(Corpus, "batch", fail)
    loader = Loader(corpus_of(), 8, seed=0, workers=workers)
    with pytest.raises(OSError, match="sequence 4"):
        loader.take([(4, 2), (6, 2)])
    loader.close()


def test_document_includes_its_end_token() -> None:
    tokens = torch.tensor([[5, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 0]])
    assert corpus_of().documents(tokens).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


@given(st.integers(2, 400), st.integers(1, 40), st.integers(1, 9))
def test_every_held_out_token_is_scored_once(size: int, seq_len: int, rows: int) -> None:
    assume(size > seq_len)
    val = bytes(i % 251 for i in range(size))
    windows = corpus_of(val=val).windows(seq_len)
    blocks = list(windows.blocks(rows))
    n = (size - 1) // seq_len * seq_len
    assert b"".join(bytes(x.flatten().tolist()) for x, _ in blocks) == val[:n]
    assert b"".join(bytes(y.flatten().tolist()) for _, y in blocks) == val[1 : n + 1]
    assert windows.tokens == n == len(windows) * seq_len
    assert all(len(x) == rows for x, _ in blocks[:-1])
    few = corpus_of(val=val).windows(seq_len, at_most=3 * seq_len)
    ((part, _),), ((whole, _),) = few.blocks(99), windows.blocks(999)
    assert len(few) == len(part) == min(3, len(windows)) and part[0].equal(whole[0])
    assert part[-1].equal(whole[-1] if len(part) > 1 else whole[0])
