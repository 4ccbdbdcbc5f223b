"""Attention steps of MHA, GQA and MQA in C++ agree with their reference, on every instruction set."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, ops
from dsmini.functional.decoding import GroupedAttentionPart, grouped_attention_step
from dsmini.inference.parts import parts_of
from dsmini.nn import Cache
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import steps
from tests.helpers.decoding import GROUPED, ROOM, WEIGHTS, filled, model_of, rows_of
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

STEP = rounding(FP32_UNIT, terms=512, chained=8)
"""As of the other steps: eight products follow each other; the longest sum has 512 terms."""
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def layers(model: Transformer, cache: Cache, s: int) -> Iterator[tuple[GroupedAttentionPart, Any, Any, Tensor]]:
    """Yield each block's part with its part of the cache, the table of positions, and the starts."""
    window = cache.place(model.config, torch.zeros(cache.batch_size, s, dtype=torch.int64))
    table = model.rope.table(window.positions)
    for block, past in zip(model.layers, cache.pasts(window), strict=True):
        parts = parts_of(block)
        assert parts is not None and isinstance(parts[0], GroupedAttentionPart)
        yield parts[0], past, table, cache.lengths


def attended(run: Callable[..., Tensor], model: Transformer, lengths: list[int], s: int, dtype: Any) -> list[Tensor]:
    torch.manual_seed(3)
    cache = filled(model, lengths, dtype)
    x = torch.randn(len(lengths), s, model.config.dim)
    return [*(run(x, *layer) for layer in layers(model, cache, s)), *rows_of(cache)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_attention_agrees(every_isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for lengths, s in (([1], 1), ([63], 3), ([64, 65, 1], 1), ([129, 2], 3), ([300, 7], 1), ([129], 32), ([9] * 4, 8)):
        with ops.use("reference"):
            want = attended(grouped_attention_step, model, lengths, s, torch.float32)
        got = attended(cpu.grouped_attention_step, model, lengths, s, torch.float32)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < STEP, (lengths, s)
        # what is stored is rounded, so the reference reads what the kernel stored
        torch.manual_seed(3)
        cache = filled(model, lengths, torch.bfloat16)
        x = torch.randn(len(lengths), s, model.config.dim)
        for part, past, table, starts in layers(model, cache, s):
            got_y = cpu.grouped_attention_step(x, part, past, table, starts)
            with ops.use("reference"):
                past.store.write = lambda *_: None  # the kernel's rows stay
                want_y = grouped_attention_step(x, part, past, table, starts)
            assert relative_error(got_y, want_y) < STEP, (lengths, s)


def test_stored_rows_have_the_bits_of_the_cache(every_isa: str) -> None:
    model = model_of("gqa, blocks", n_layers=1)
    exact = attended(cpu.grouped_attention_step, model, [7], 2, torch.float32)[1]
    got = attended(cpu.grouped_attention_step, model, [7], 2, torch.bfloat16)[1]
    assert torch.equal(got, exact.bfloat16().float())


def test_equal_logits_share_their_weight(every_isa: str) -> None:
    """Queries of zero see all keys alike, so each head returns the mean of its values."""
    model = model_of("gqa", n_layers=1)
    model.layers[0].attn.wq.weight.data.zero_()
    cache = filled(model, [300], torch.float32)
    part, past, table, starts = next(layers(model, cache, 1))
    x = torch.randn(1, 1, model.config.dim)
    got = cpu.grouped_attention_step(x, part, past, table, starts)
    c = model.config
    values = past.store.data[0, :301, c.kv_heads * c.qk_nope_head_dim :].double().mean(0)
    heads = values.view(c.kv_heads, -1).repeat_interleave(c.n_heads // c.kv_heads, 0).flatten()
    assert relative_error(got[0, 0], x[0, 0] + heads @ part.wo.double().T) < STEP


def test_threads_change_no_bit(every_isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gqa, wide", "bfloat16")
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(steps, "n_threads", lambda n=threads: n)
        results.append(attended(cpu.grouped_attention_step, model, [300, 7], 2, torch.bfloat16))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [1, -1])
def test_a_bad_number_stays_visible(every_isa: str, bad: float, column: int) -> None:
    """In the new token, in the first key and in the last value of the cache."""
    model = model_of("gqa")
    for part, past, table, starts in layers(model, filled(model, [70], torch.float32), 1):
        x = torch.randn(1, 1, model.config.dim)
        broken = x.clone()
        broken[0, 0, column] = bad
        assert cpu.grouped_attention_step(broken, part, past, table, starts).isnan().all()
        assert cpu.grouped_attention_step(x, part, past, table, starts).isfinite().all()
        past.store.data[0, 5, column] = bad
        assert not cpu.grouped_attention_step(x, part, past, table, starts).isfinite().any()


def test_hidden_rows_do_not_matter(every_isa: str) -> None:
    """Rows after a sequence's end may hold anything, and other sequences' rows are not read."""
    model = model_of("mha")
    for part, past, table, starts in layers(model, filled(model, [70, 3], torch.float32), 2):
        x = torch.randn(2, 2, model.config.dim)
        want = cpu.grouped_attention_step(x, part, past, table, starts)
        past.store.data[0, 72:], past.store.data[1, 5:] = math.nan, math.nan
        assert torch.equal(cpu.grouped_attention_step(x, part, past, table, starts), want)


def test_strides_are_served_or_refused_with_a_reason() -> None:
    model = model_of("gqa")
    part, past, table, starts = next(layers(model, filled(model, [3], torch.float32), 1))
    x = torch.randn(1, 1, 48)[..., ::2]
    want = cpu.grouped_attention_step(x.contiguous(), part, past, table, starts)
    wide = tuple(torch.stack((t, t), -1)[..., 0].double() for t in table)
    assert torch.equal(cpu.grouped_attention_step(x, part, past, table, starts.to(torch.int32)), want)
    assert torch.equal(cpu.grouped_attention_step(x, part, past, wide, starts), want)
    for call, reason in (
        (lambda: cpu.grouped_attention_step(x.double(), part, past, table, starts), "tokens of torch.float64"),
        (lambda: cpu.grouped_attention_step(x.expand(1, 33, 24), part, past, table, starts), r"\[1, 33, 24\] tokens"),
    ):
        with pytest.raises(Unserved, match=reason):
            call()
    data = past.store.data
    for other, reason in ((data.to(torch.uint8), "in FP8"), (data.half(), "float16"), (data[..., ::2], "contiguous")):
        past.store.data = other
        with pytest.raises(Unserved, match=reason):
            cpu.grouped_attention_step(x, part, past, table, starts)
    past.store.data = data[..., :-1].contiguous()
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.grouped_attention_step(x, part, past, table, starts)


@pytest.mark.parametrize("start", [-1, ROOM, ROOM - 1])
def test_tokens_beyond_the_cache_are_refused(start: int) -> None:
    model = model_of("mqa")
    part, past, table, _ = next(layers(model, filled(model, [3], torch.float32), 2))
    before = past.store.data.clone()
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.grouped_attention_step(torch.randn(1, 2, 24), part, past, table, torch.tensor([start]))
    assert torch.equal(past.store.data, before)
