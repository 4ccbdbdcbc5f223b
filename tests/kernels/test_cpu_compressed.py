"""V4's attention and feed-forward in a decoding step agree with their equations, in each format of a cache."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, ops
from dsmini.inference.fused import attention_step, extract_weights, feed_forward_step
from dsmini.measure.costs import cost_of
from dsmini.nn.cache import Cache, Rows
from dsmini.nn.compressed_attention import CompressedAttention
from dsmini_kernels import Unserved, cpu
from tests.helpers.decoding import CACHES, COMPRESSED, EXPERTS, WEIGHTS, model_of
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.kernels.conftest import assert_threads_change_no_bit

STEP = rounding(FP32_UNIT, terms=512, chained=8)
"""Eight products follow each other in a step; the longest sum has 512 terms."""
pytestmark = pytest.mark.usefixtures("library", "poisoned_memory", "without_gradients")
STEPS: list[tuple[list[int], int, list[int] | None]] = [
    ([70], 1, None),
    ([127], 9, None),
    ([9, 66, 126], 5, [5, 0, 3]),
    ([200, 3], 3, [1, 3]),
]
"""Lengths of cached sequences, columns of a step, and the numbers of new tokens of each sequence."""


def given(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def filled(model: Transformer, lengths: list[int], dtype: Any) -> Cache:
    """Return a cache whose layers have read random tokens."""
    cache = model.new_cache(len(lengths), 240, dtype)
    at = cache.place(max(lengths), torch.tensor(lengths))
    with ops.use("eager"):
        for block, view in zip(model.layers, cache.views(at), strict=True):
            part = extract_weights(block, torch.float32)
            assert part is not None
            x = expanded(block, given((len(lengths), max(lengths), model.config.dim)))
            attention_step(x, part.attention, view, part.attention.layer.rope.cos_sin(at.positions), at.lengths * 0)
    cache.lengths = at.lengths
    return cache


def expanded(block: Any, x: Tensor) -> Tensor:
    """Return residual streams that differ."""
    x = block.hc_attn.expand(x)
    return x * torch.randn(x.shape[-2], 1) if x.dim() == 4 else x


def layers(
    model: Transformer, cache: Cache, s: int, new: list[int] | None, products: Any = torch.float32
) -> Iterator[Any]:
    """Yield each block's parts with its part of the cache, cos and sin of all positions, and the starts."""
    at = cache.place(s, None if new is None else torch.tensor(new))
    for block, view in zip(model.layers, cache.views(at), strict=True):
        parts = extract_weights(block, products)
        assert parts is not None
        yield block, *parts, view, parts.attention.layer.rope.cos_sin(torch.arange(256)[None]), cache.lengths


def attended(
    model: Transformer, cache: Cache, s: int, new: list[int] | None, backend: str = "cpu", **how: Any
) -> list[Tensor]:
    """Return the results of all attentions for new tokens, and all that is stored afterwards, as it is stored."""
    torch.manual_seed(4)
    out = []
    for block, part, _, *more in layers(model, cache, s, new, **how):
        x = expanded(block, given((cache.batch_size, s, model.config.dim)))
        with ops.use(backend):
            y = attention_step(x, part, *more)
        out += [row[:n] for row, n in zip(y, new or [s] * len(y), strict=True)]
    return out


def stored(cache: Cache) -> list[Tensor]:
    return [rows.data for rows in cache.rows]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", COMPRESSED)
def test_attention_agrees_and_stores_the_same(isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for step in STEPS:
        cache = filled(model, step[0], torch.float32)
        other = copy.deepcopy(cache)
        got, want = attended(model, cache, *step[1:]), attended(model, other, *step[1:], backend="reference")
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < STEP, step
        for a, b in zip(stored(cache), stored(other), strict=True):
            assert relative_error(a, b) < STEP, step


def read_what_is_stored(patch: pytest.MonkeyPatch) -> None:
    """Let the reference read the rows that the kernel has stored, and write none."""

    def extend(self: Rows, rows: Tensor, at: Any, n: int, dtype: torch.dtype) -> Tensor:
        columns = torch.arange(-n, rows.shape[1])
        return self.read_at((at.positions[:, :1] + columns) % self.data.shape[1], dtype).expand(len(rows), -1, -1)

    patch.setattr(Rows, "extend", extend)
    patch.setattr(Rows, "write", lambda *_: None)


@pytest.mark.parametrize("dtype", CACHES[1:], ids=str)
@pytest.mark.parametrize("name", COMPRESSED)
def test_rounded_rows_have_the_bits_of_the_cache(
    isa: str, name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache would make the same rows of the same numbers, and attention reads them."""
    model = model_of(name)
    for step in STEPS:
        torch.manual_seed(1)
        exact = filled(model, step[0], torch.float32)
        torch.manual_seed(1)
        cache = filled(model, step[0], dtype)
        before = copy.deepcopy(cache)
        attended(model, exact, *step[1:])
        got = attended(model, cache, *step[1:])
        for a, b, old in zip(cache.rows, exact.rows, before.rows, strict=True):
            changed = (a.data != old.data).any(-1)
            want = a.codec.encode(b.data)
            assert torch.equal(a.data[changed].view(torch.uint8), want[changed].view(torch.uint8))
        with monkeypatch.context() as patch:
            read_what_is_stored(patch)
            for a, b in zip(got, attended(model, cache, *step[1:], backend="reference"), strict=True):
                assert relative_error(a, b) < STEP, step


def test_products_in_bf16_round_once(isa: str) -> None:
    """In BF16 a CPU with units for it rounds queries, weights of rows and results, and nothing else."""
    model = model_of("v4, all entries", "bfloat16", head_dim=64)
    cache = filled(model, [70], torch.bfloat16)
    other = copy.deepcopy(cache)
    for a, b in zip(
        attended(model, cache, 2, None, products=torch.bfloat16), attended(model, other, 2, None), strict=True
    ):
        assert relative_error(a, b) < rounding(BF16_UNIT, chained=4)


@pytest.mark.parametrize("name", ["v4", "v4, blocks"])
def test_threads_change_no_bit(isa: str, name: str) -> None:
    model = model_of(name, "bfloat16")
    cache = filled(model, [200, 66], torch.bfloat16)

    def run() -> list[Tensor]:
        own = copy.deepcopy(cache)
        return [*attended(model, own, 3, [3, 2]), *stored(own)]

    assert_threads_change_no_bit(run, most=4)


@pytest.mark.parametrize("scale", [1e15, 1e-15, 1e-38])
def test_numbers_of_any_magnitude_agree(isa: str, scale: float) -> None:
    """Norms make them moderate, but where they are smaller than eps, which then counts alone."""
    model = model_of("v4, all entries")
    cache = filled(model, [70], torch.float32)
    for (_, part, feed_forward, *more), (*_, view, _, _) in zip(
        layers(model, cache, 1, None), layers(model, copy.deepcopy(cache), 1, None), strict=True
    ):
        x = given((1, 1, model.config.dim), scale)
        got = attention_step(x, part, *more)
        with ops.use("reference"):
            want = attention_step(x, part, view, *more[1:])
            of_experts = feed_forward_step(x[0], feed_forward)[0]
        assert relative_error(got, want) < STEP and got.isfinite().all()
        assert relative_error(feed_forward_step(x[0], feed_forward)[0], of_experts) < STEP


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_visible(isa: str, bad: float) -> None:
    model = model_of("v4, all entries")
    for _, part, feed_forward, *more in layers(model, filled(model, [70], torch.float32), 1, None):
        x = given((1, 1, model.config.dim))
        x[0, 0, 3] = bad
        assert attention_step(x, part, *more).isnan().all()
        assert feed_forward_step(x[0], feed_forward)[0].isnan().all()


@pytest.mark.parametrize("weights", EXPERTS)
@pytest.mark.parametrize("name", COMPRESSED)
def test_feed_forward_agrees(isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for n in (1, 3, 32):
        tokens = torch.randint(61, (n,))
        for block, _, part, *_ in layers(model, model.new_cache(1, 40), 1, None):
            x = expanded(block, given((1, n, model.config.dim), 3.0))[0]
            got = cpu.feed_forward_step(x, part, tokens)
            with ops.use("reference"):
                want = feed_forward_step(x, part, tokens)
            assert torch.equal(got[1], want[1]) and torch.equal(got[4], want[4]), "experts and counts"
            for place in (0, 2, 3):
                assert relative_error(got[place], want[place]) < STEP


def test_scores_of_sqrtsoftplus_keep_their_ends(isa: str) -> None:
    model = model_of("v4, all entries")
    _, _, part, *_ = next(layers(model, model.new_cache(1, 40), 1, None))
    x = torch.ones(1, model.config.dim)
    for weight in (-1e3, 1e3, 1.0, math.nan):
        part.weights["gate"][2:4] = weight
        with ops.use("reference"):
            want = feed_forward_step(x, part)
        got = cpu.feed_forward_step(x, part)
        assert torch.equal(got[1], want[1])
        assert relative_error(got[3].nan_to_num(7), want[3].nan_to_num(7)) < STEP


def test_wrong_tables_and_tokens_are_refused() -> None:
    model = model_of("v4")
    block, _, part, *_ = next(layers(model, model.new_cache(1, 40), 1, None))
    x = expanded(block, given((1, 2, model.config.dim)))[0]
    for tokens in ([0, 61], [-1, 0]):
        with pytest.raises(RuntimeError, match="beyond their memory"):
            cpu.feed_forward_step(x, part, torch.tensor(tokens))
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.feed_forward_step(x, part)
    part.weights["gate.tid2eid"][5, 1] = 8
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.feed_forward_step(x, part, torch.tensor([0, 5]))


def test_what_is_not_served_says_why() -> None:
    model = model_of("v4")
    cache = filled(model, [9], torch.float32)
    for block, part, _, view, cos_sin, starts in layers(model, cache, 1, None):
        x = expanded(block, given((1, 1, model.config.dim)))
        data, view.store.window.data = view.store.window.data, view.store.window.data.transpose(0, 1).contiguous().mT
        with pytest.raises((Unserved, RuntimeError)):
            cpu.attention_step(x, part, view, cos_sin, starts)
        view.store.window.data = data
        assert isinstance(part.layer, CompressedAttention)
        for bad in (-1, 256, 1 << 40):
            with pytest.raises(RuntimeError, match="beyond their memory"):
                cpu.attention_step(x, part, view, cos_sin, torch.tensor([bad]))


def test_costs_of_a_step_by_hand() -> None:
    """A token at position 70 with a window of 8 rows, 17 entries of 4 tokens, of which it reads 4, and their keys."""
    model = model_of("v4")
    cache = filled(model, [70], torch.float32)
    block, part, feed_forward, *more = [*layers(model, cache, 1, None)][1]
    x = expanded(block, given((1, 1, model.config.dim)))
    cost = cost_of(ops.Call("attention_step", (x, part, *more), {}, x))
    of_weights = sum(t.nbytes for t in part.tensors)
    width, index, f4 = 32, 16, 4
    raw = 2 * 2 * (width + index)
    assert cost.read == x.nbytes + of_weights + f4 * (8 * width + 4 * width + 17 * index)
    assert cost.written == x.nbytes + f4 * (width + raw)
    dim, heads = model.config.dim, 4
    products = dim * (24 + width + raw + 2) + 24 * (heads * width + 2 * index) + 32 * 64 + 32 * dim + 24 * 4 * dim
    assert cost.flops == 2 * products + 4 * (8 + 4) * heads * width + 2 * 17 * 2 * index
    result = cpu.feed_forward_step(x[0], feed_forward, torch.tensor([3]))
    more_flops = cost_of(ops.Call("feed_forward_step", (x[0], feed_forward), {}, result)).flops
    inter = model.config.moe_inter_dim
    assert more_flops == 2 * (24 * 4 * dim + 8 * dim + 3 * dim * inter * (3 + model.config.n_shared_experts))
