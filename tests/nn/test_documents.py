"""Documents packed into a row: logits as of separate sequences, and what is refused."""

import functools
import inspect
from typing import Any

import pytest
import torch

from dsmini import Transformer
from tests.conftest import SMALL, randomise
from tests.helpers.configs import DSA, V4_MODEL, refusal
from tests.helpers.models import tokens_of
from tests.helpers.tolerances import relative_error

LENGTHS = [9, 3, 4, 17, 7]
ERROR = 1e-6
"""Between packed and separate sequences in FP32, whose rotary angles are of other positions."""
MODELS = {"v3": {}, "v3.2": DSA | {"indexer_fp8": False}, "v4": V4_MODEL}


def documents_of(lengths: list[int], rows: int = 2) -> Any:
    return torch.repeat_interleave(torch.tensor(lengths)).expand(rows, -1)


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_equal_those_of_separate_sequences(name: str) -> None:
    """All heads of multi-token prediction too, at the positions whose later tokens are of the same document."""
    model = randomise(Transformer(**SMALL | MODELS[name] | {"n_mtp_layers": 2, "max_seq_len": 64}))
    tokens, documents = tokens_of(2, sum(LENGTHS)), documents_of(LENGTHS)
    out = model.run(tokens, documents=documents, mtp=True)
    assert torch.equal(model(tokens, documents=documents), out.logits)
    assert relative_error(model(tokens), out.logits) > 1e-2
    start = 0
    for part in tokens.split(LENGTHS, 1):
        want = model.run(part, mtp=True)
        columns = slice(start, start + part.shape[1])
        assert relative_error(out.logits[:, columns], want.logits) < ERROR
        assert relative_error(out.hidden[:, columns], want.hidden) < ERROR
        for got, alone in zip(out.mtp_logits, want.mtp_logits, strict=True):
            assert relative_error(got[:, start : start + alone.shape[1]], alone) < ERROR
        start += part.shape[1]


def test_documents_in_forward_reach_the_losses() -> None:
    """A wrapper calls forward alone."""
    model = randomise(Transformer(**SMALL))
    tokens, documents = tokens_of(2, 12), documents_of([5, 7])
    assert torch.equal(
        model(tokens, targets=tokens, documents=documents).total,
        model.losses(tokens, tokens, documents=documents).total,
    )


def test_documents_that_are_none_are_refused_in_a_sentence() -> None:
    model, tokens = Transformer(**SMALL), tokens_of(2, 12)
    good = documents_of([5, 7])
    unchecked: Any = functools.partial(inspect.unwrap(Transformer.states), model)  # without type checks
    for wrong, got in (
        (good[:, :11], "torch.int64 [2, 11]"),
        (good[:1], "torch.int64 [1, 12]"),
        (good[0], "torch.int64 [12]"),
        (good.float(), "torch.float32 [2, 12]"),
        (good > 0, "torch.bool [2, 12]"),
        (good.tolist(), "list"),
    ):
        want = f"documents are {got}; want int64 [2, 12], the number of each token's document"
        assert refusal(unchecked, tokens, documents=wrong) == want
    back = good.clone()
    back[1, 9:] = 0
    want = (
        "documents go back from 1 to 0 at position 9 of row 1; a document is a run of equal numbers, and the next has "
        "a larger one: number them 0, 1, 2, ..."
    )
    for call in (model, model.run, functools.partial(model.losses, targets=tokens)):
        assert refusal(call, tokens, documents=back) == want
    assert model(tokens, documents=(3 * good - 1).int()).shape == (2, 12, SMALL["vocab_size"])
    assert "documents do not go with a cache" in refusal(model, tokens, model.new_cache(2), documents=good)
