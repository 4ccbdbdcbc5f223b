"""Decoding steps with an indexer in C++ agree with their reference: the same picks, and attention to them."""

import dataclasses
from typing import Any

import pytest
import torch

from dsmini import ops
from dsmini.functional.decoding import attention_step
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import steps
from tests.helpers.decoding import SPARSE, WEIGHTS, filled, model_of
from tests.helpers.tolerances import relative_error
from tests.kernels.test_cpu_steps import STEP, layers

pytestmark = pytest.mark.usefixtures("poisoned_memory", "without_gradients")
LENGTHS = ([30], [38], [41], [129, 7], [300, 63])
"""Below and above index_topk, at its edge, and both in one call."""


def step(name: str, lengths: list[int], s: int = 1, weights: str = "float32", dtype: Any = torch.float32) -> Any:
    """Return tokens and the parts of the first layer, with its filled cache."""
    model = model_of(name, weights)
    attention, _, past, table, starts = next(layers(model, filled(model, lengths, dtype), s))
    return torch.randn(len(lengths), s, model.config.dim), attention, past, table, starts


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", SPARSE)
def test_attention_to_the_picks_agrees(every_isa: str, name: str, weights: str) -> None:
    for number, lengths in enumerate(LENGTHS):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        for s in (1, 3):
            x, attention, past, table, starts = step(name, lengths, s, weights, dtype)
            got = cpu.attention_step(x, attention, past, table, starts)
            kept = [past.store.data.clone(), past.store.index.data.clone()]
            if dtype == torch.bfloat16:  # what is stored is rounded, so the reference reads what the kernel stored
                past.store.write = past.store.index.write = lambda *_: None
            with ops.use("reference"):
                want = attention_step(x, attention, past, table, starts)
            assert relative_error(got, want) < STEP, (lengths, s)
            for a, b in zip(kept, (past.store.data, past.store.index.data), strict=True):
                assert relative_error(a, b) < STEP, (lengths, s)


def test_of_equal_scores_the_first_keys_are_picked(every_isa: str) -> None:
    x, attention, past, table, starts = step("dsa", [300])
    attention.indexer.weights_proj.zero_()
    want = cpu.attention_step(x, attention, past, table, starts)
    past.store.data[:, 40:300] += 1e3  # after the first 40, which is index_topk
    assert torch.equal(cpu.attention_step(x, attention, past, table, starts), want)
    past.store.data[:, 39] += 1e3
    assert not torch.equal(cpu.attention_step(x, attention, past, table, starts), want)


def test_rows_beyond_a_sequence_are_never_picked(every_isa: str) -> None:
    x, attention, past, table, starts = step("dsa", [300, 63], s=2)
    want = cpu.attention_step(x, attention, past, table, starts)
    for data in (past.store.data, past.store.index.data):
        data[0, 302:], data[1, 65:] = torch.nan, torch.nan
    assert torch.equal(cpu.attention_step(x, attention, past, table, starts), want)


def test_score_of_nan_is_picked_and_stays_visible(every_isa: str) -> None:
    x, attention, past, table, starts = step("dsa", [300])
    past.store.data[0, 5] = past.store.index.data[0, 5] = torch.nan
    assert cpu.attention_step(x, attention, past, table, starts).isnan().all()


def test_threads_pick_the_same_keys(every_isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = step("dsa, blocks", [300, 70], s=2)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(steps, "n_threads", lambda n=threads: n)
        results.append(cpu.attention_step(*call))
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_an_indexer_that_is_not_served_says_why() -> None:
    with pytest.raises(Unserved, match=r"keys of an indexer in torch\.uint8"):
        cpu.attention_step(*step("dsa", [70], dtype="fp8"))
    x, attention, past, table, starts = step("dsa", [70])
    bf16 = dataclasses.replace(attention.indexer, wq_b=attention.indexer.wq_b.bfloat16())
    with pytest.raises(Unserved, match="weights of different types"):
        cpu.attention_step(x, dataclasses.replace(attention, indexer=bf16, prepared={}), past, table, starts)


def test_index_keys_that_do_not_fit_are_refused() -> None:
    x, attention, past, table, starts = step("dsa", [70])
    whole = past.store.index.data
    for wrong in (whole[:, :-1].contiguous(), whole[..., :-1].contiguous()):
        past.store.index.data = wrong
        with pytest.raises(RuntimeError, match="beyond their memory"):
            cpu.attention_step(x, attention, past, table, starts)
    past.store.index.data = whole
    for change in ({"n_heads": 4}, {"topk": -1}):
        other = dataclasses.replace(attention.indexer, **change)
        with pytest.raises(RuntimeError):
            cpu.attention_step(x, dataclasses.replace(attention, indexer=other), past, table, starts)
