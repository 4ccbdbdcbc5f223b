"""Products and decoding steps in C++ agree with their references, on every instruction set, and V4's too."""

import copy
import dataclasses
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, ops
from dsmini.inference.fused import attention_step, extract_weights, feed_forward_step, normed
from dsmini.machine import on_threads
from dsmini.measure.costs import cost_of
from dsmini.nn import Cache, RMSNorm, Rope
from dsmini.nn.cache import Rows
from dsmini.nn.compressed_attention import CompressedAttention
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import build, steps
from dsmini_kernels.cpu.calls import span
from dsmini_kernels.cpu.structs import LAYOUTS
from tests.helpers import decoding
from tests.helpers.decoding import (
    CACHES,
    COMPRESSED,
    GROUPED,
    MODELS,
    ROOM,
    SPARSE,
    WEIGHTS,
    filled,
    index_stores,
    model_of,
    rows_of,
)
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.kernels.conftest import assert_threads_change_no_bit, dense, weight_in

STEP = rounding(FP32_UNIT, terms=512, chained=8)
"""Eight products follow each other in a step; the longest sum has 512 terms."""
pytestmark = pytest.mark.usefixtures("library", "poisoned_memory", "without_gradients")
LENGTHS = ([1], [63], [64, 65, 1], [129], [300, 7])
SPARSE_LENGTHS = ([30], [38], [41], [129, 7], [300, 63])
"""Below and above index_topk, at its edge, and both in one call."""
GROUPED_CALLS = [([1], 1), ([63], 3), ([64, 65, 1], 1), ([129, 2], 3), ([300, 7], 1), ([129], 32), ([9] * 4, 8)]


def calls(name: str) -> list[tuple[list[int], int]]:
    """Return the lengths of cached sequences, and the number of new tokens of each."""
    if name in GROUPED:
        return GROUPED_CALLS
    return [(lengths, s) for lengths in (SPARSE_LENGTHS if name in SPARSE else LENGTHS) for s in (1, 3)]


def layers(
    model: Transformer, cache: Cache, s: int, products: torch.dtype = torch.float32
) -> Iterator[tuple[Any, ...]]:
    """Yield each block's parts with its part of the cache, cos and sin of positions, and the starts."""
    tokens = torch.zeros(cache.batch_size, s, dtype=torch.int64)
    window = cache.place_tokens(model.config, tokens)
    cos_sin = Rope.from_config(model.config).cos_sin(window.positions)
    for block, view in zip(model.layers, cache.views(window), strict=True):
        parts = extract_weights(block, products)
        assert parts is not None
        yield *parts, view, cos_sin, cache.lengths


def attend(x: Tensor, part: Any, *more: Any, reference: bool = False) -> Tensor:
    """Run the step of an attention, in C++ or as its reference."""
    if reference:
        with ops.use("reference"):
            return attention_step(x, part, *more)
    return cpu.attention_step(x, part, *more)


def step(name: str, lengths: list[int], s: int = 1, weights: str = "float32", dtype: Any = torch.float32) -> Any:
    """Return tokens and the attention of the first layer, with its filled cache, cos and sin, and the starts."""
    model = model_of(name, weights)
    part, _, view, cos_sin, starts = next(layers(model, filled(model, lengths, dtype), s))
    return torch.randn(len(lengths), s, model.config.dim), part, view, cos_sin, starts


def attended(model: Transformer, lengths: list[int], s: int, dtype: Any, reference: bool = False) -> list[Tensor]:
    """Return the results of all attentions, and the rows that they store."""
    torch.manual_seed(3)
    cache = filled(model, lengths, dtype)
    x = torch.randn(len(lengths), s, model.config.dim)
    out = [attend(x, part, *more, reference=reference) for part, _, *more in layers(model, cache, s)]
    return [*out, *rows_of(cache), *(store.read(ROOM, torch.float32) for store in index_stores(cache))]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", [*MODELS, *GROUPED, *SPARSE])
def test_attention_agrees(isa: str, name: str, weights: str) -> None:
    """In a cache of FP32, results and stored rows; where rows are rounded, results from what the kernel stored."""
    model = model_of(name, weights)
    for number, (lengths, s) in enumerate(calls(name)):
        want = attended(model, lengths, s, torch.float32, reference=True)
        for a, b in zip(attended(model, lengths, s, torch.float32), want, strict=True):
            assert relative_error(a, b) < STEP, (lengths, s)
        dtype = CACHES[1 + number // 2 % 2] if name in MODELS else torch.bfloat16
        x = torch.randn(len(lengths), s, model.config.dim)
        for part, _, view, cos_sin, starts in layers(model, filled(model, lengths, dtype), s):
            got = attend(x, part, view, cos_sin, starts)
            stores = [view.store, *([view.store.index] if name in SPARSE else [])]
            kept = [store.data.clone() for store in stores]
            for store in stores:
                store.write = lambda *_: None
            assert relative_error(got, attend(x, part, view, cos_sin, starts, reference=True)) < STEP, (lengths, s)
            assert all(torch.equal(store.data, data) for store, data in zip(stores, kept, strict=True))


@pytest.mark.parametrize("weights", decoding.EXPERTS)
@pytest.mark.parametrize("name", MODELS)
def test_feed_forward_agrees(isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for n in (1, 2, 3, 7, 32):
        x = torch.randn(n, model.config.dim)
        for _, part, *_ in layers(model, model.new_cache(1, 8), 1):
            with ops.use("reference"):
                want = feed_forward_step(x, part)
            got = cpu.feed_forward_step(x, part)
            assert relative_error(got[0], want[0]) < STEP
            if "gate" in part.weights:
                assert torch.equal(got[1], want[1]) and torch.equal(got[4], want[4]), "experts and counts"
                assert relative_error(got[2], want[2]) < STEP and relative_error(got[3], want[3]) < STEP


@pytest.mark.parametrize("weights", ["fp8", "fp4"])
@pytest.mark.parametrize("name", ["wide", "blocks", "dsa", "gqa, wide"])
def test_codes_in_bf16_agree(isa: str, name: str, weights: str) -> None:
    """Products of codes in BF16, where the CPU has them, round what they multiply to BF16, and nothing else."""
    model = model_of(name, weights)

    def halves(s: int, products: torch.dtype) -> list[Tensor]:
        torch.manual_seed(s)
        x, cache = torch.randn(2, s, model.config.dim), filled(model, [30, 5], torch.float32)
        every = [*layers(model, cache, s, products)]
        attention = [attend(x, part, *more) for part, _, *more in every]
        return attention + [cpu.feed_forward_step(x.flatten(0, 1), part)[0] for _, part, *_ in every]

    for s in (1, 4):
        for got, want in zip(halves(s, torch.bfloat16), halves(s, torch.float32), strict=True):
            assert relative_error(got, want) < STEP + rounding(BF16_UNIT / 2, chained=8)


SIZES = ((1, 1), (5, 31), (130, 200), (33, 128), (257, 65), (131, 640), (9, 777))
FEW_ROWS = [(n, *size) for size in SIZES for n in (1, 2, 3, 5, 8, 32)]
MANY_ROWS = [(33, 1, 1), (16, 40, 31), (97, 130, 63), (200, 33, 257), (600, 50, 128)]
"""Rows, and the two sizes of the weight."""


@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_agrees(isa: str, weights: str) -> None:
    for n, o, i in FEW_ROWS + MANY_ROWS:
        x, weight = torch.randn(2, n, i)[1:], weight_in(weights, o, i)
        for dtype, unit in ((torch.float32, 0.0), (torch.bfloat16, BF16_UNIT / 2)):
            got, want = cpu.quantized_linear(x.to(dtype), weight), x.to(dtype).double() @ dense(weight).T
            assert got.dtype == dtype and got.shape == (1, n, o)
            assert relative_error(got, want) < rounding(unit) + rounding(FP32_UNIT, terms=i)
        if n < 16 and weights != "fp8":  # few rows of BF16 are those of FP32, and rounded once
            short = x.bfloat16()
            once = cpu.quantized_linear(short.float(), weight).bfloat16()
            assert torch.equal(cpu.quantized_linear(short, weight), once)


def norm_of(weight: Tensor, eps: float) -> RMSNorm:
    norm = RMSNorm(len(weight), eps)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def test_normed_agrees(isa: str) -> None:
    for dim, n in ((1, 1), (31, 2), (200, 7), (513, 32)):
        x, norm = torch.randn(n, 2 * dim)[:, ::2], norm_of(torch.randn(dim), 0.5)  # not contiguous
        with ops.use("reference"):
            want = normed(x, norm)
        assert relative_error(cpu.normed(x, norm), want) < rounding(FP32_UNIT, terms=dim)
    x[0, 3], x[1, 2] = math.nan, math.inf
    assert cpu.normed(x, norm).isnan().any(-1).tolist() == [True, True, *[False] * 30]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_size_of_x_loses_nothing(isa: str, weights: str) -> None:
    x, held = torch.randn(3, 200), weight_in(weights, 130, 200)
    want = cpu.quantized_linear(x, held)
    for power in (-110.0, -60.0, 60.0, 110.0):
        factor = torch.tensor(2.0**power)
        got = cpu.quantized_linear(x * torch.tensor([[1.0], [1.0], [0.0]]) * factor, held)
        assert torch.equal(got[:2], want[:2] * factor) and not got[2].any()
    assert cpu.quantized_linear(torch.full((1, 200), math.inf), held).isfinite().logical_not().all()


@pytest.mark.parametrize(("rows", "width", "at"), [(1, 40, 3), (32, 40, 3), (1, 700, 3), (1, 700, 697)])
def test_every_code_is_decoded(isa: str, rows: int, width: int, at: int) -> None:
    codes = torch.zeros(256, width).to(torch.float8_e4m3fn)
    codes[:, at] = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0], [3.0]]).repeat(1, -(-width // 128))
    weight = dataclasses.replace(weight_in("fp8", 256, width), codes=codes, scales=scales)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(rows, width, dtype=dtype)
        x[:, at] = 1
        got, want = cpu.quantized_linear(x, weight), weight.dequantize(dtype)[:, at]
        assert all(torch.equal(row.nan_to_num(nan=7e7), want.nan_to_num(nan=7e7)) for row in got)


def test_blocks_that_are_not_whole_calls_are_refused() -> None:
    run = build.library().entry("blocks")
    x, part, view, cos_sin, starts = step("wide", [9])
    call, y = steps._Step(x, starts, x.shape[:2]), torch.empty(x.shape)  # whose memory the call reads and writes
    function, packed = call.attention(span(call.x), span(y), True, part, view, cos_sin)
    header, head = steps.STEP_HEADERS[function], LAYOUTS["StepHeader"]
    whole = header + packed
    assert run(whole, len(whole)) == 0 and run(b"", 0) == 0
    for wrong in (whole[:-1], whole[:7], whole + b"x", whole + header, header):
        assert run(wrong, len(wrong)) != 0
    for number, size in ((-1, len(packed)), *((n, len(packed)) for n in (1, 3, 5)), (0, len(packed) - 8), (0, -1)):
        assert run(head.pack(kind=number, bytes=size) + packed, len(whole)) != 0
    assert y.isfinite().all()


@pytest.mark.parametrize("name", ["wide", "gqa, wide", "dsa, blocks"])
def test_threads_change_no_bit(isa: str, name: str) -> None:
    model = model_of(name, "bfloat16")
    x = torch.randn(5, model.config.dim)
    _, part, *_ = list(layers(model, model.new_cache(1, 8), 1))[1]

    def run() -> list[Tensor]:
        after = attended(model, [300, 70], 2, torch.bfloat16)
        return [*after, *cpu.feed_forward_step(x, part), cpu.linear(x, model.head.weight)]

    assert_threads_change_no_bit(run)


def test_threads_of_python_share_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one call holds the team, others run alone, with the same bits."""
    monkeypatch.setattr(steps, "n_threads", lambda: 2)
    x, weight = torch.randn(1, 700), torch.randn(900, 700)
    want = cpu.linear(x, weight)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(lambda: [cpu.linear(x, weight) for _ in range(50)]) for _ in range(8)]
        assert all(torch.equal(y, want) for future in futures for y in future.result())


@pytest.mark.parametrize("rows", [1, 64])
def test_a_child_after_a_fork_has_threads_of_its_own(rows: int) -> None:
    """The parent's threads are lost in a fork: the team's, and torch's, which multiply many rows. Nobody waits."""
    x, weight = torch.randn(rows, 700), torch.randn(300, 700)  # torch compares so few results in one thread

    def check() -> None:
        assert all(torch.equal(cpu.linear(x, weight), want) for _ in range(20))

    with on_threads(2):
        want = cpu.linear(x, weight)
        child = multiprocessing.get_context("fork").Process(target=check, daemon=True)
        child.start()
        check()
        child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("name", ["blocks", "wide", "gqa, blocks"])
def test_stored_rows_have_the_bits_of_the_cache(isa: str, name: str) -> None:
    """The same numbers are stored in FP32, and rounded as the cache rounds them."""
    model = model_of(name)
    exact = attended(model, [7], 2, torch.float32)[len(model.layers) :]
    for dtype in CACHES[1:] if name in MODELS else CACHES[1:2]:
        torch.manual_seed(3)
        cache = filled(model, [7], dtype)
        x = torch.randn(1, 2, model.config.dim)
        for part, _, *more in layers(model, cache, 2):
            attend(x, part, *more)
        for store, rows in zip(cache.stores, exact, strict=True):
            assert torch.equal(store.data[:, 7:9].view(torch.uint8), store.codec.encode(rows[:, 7:9]).view(torch.uint8))


def test_tiny_numbers_keep_the_eps_and_the_scales(isa: str) -> None:
    """A norm divides by sqrt(eps) there, and a tile of the cache is stored with a scale of its own."""
    model = model_of("blocks")
    for attention, feed_forward, view, cos_sin, starts in layers(model, filled(model, [9], "fp8"), 1):
        x = torch.randn(1, 1, model.config.dim) * 1e-4
        with ops.use("reference"):
            want = feed_forward_step(x[0], feed_forward)[0]
        assert relative_error(cpu.feed_forward_step(x[0], feed_forward)[0] - x[0], want - x[0]) < STEP
        kv_norm, latent = attention.weights["kv_norm"], attention.layer.kv_lora_rank
        kv_norm.mul_(1e-9)
        cpu.attention_step(x, attention, view, cos_sin, starts)
        rows = view.store.read(10, torch.float32)[:, 9, :latent]
        assert 0 < rows.abs().max() < 1e-8 and len(rows.unique()) > latent // 4
        kv_norm.zero_()
        assert cpu.attention_step(x, attention, view, cos_sin, starts).isfinite().all()
        assert not view.store.read(10, torch.float32)[:, 9, :latent].any(), "and zeros are zeros"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "column"), [("odd", 3), ("gqa", 1), ("gqa", -1)])
def test_a_bad_number_stays_visible(isa: str, name: str, column: int, bad: float) -> None:
    """In the new token, and in an old row of the cache: of GQA in the first key and in the last value."""
    model = model_of(name)
    for part, feed_forward, view, cos_sin, starts in layers(model, filled(model, [70], torch.float32), 1):
        x = torch.randn(1, 1, model.config.dim)
        broken = x.clone()
        broken[0, 0, column] = bad
        assert attend(broken, part, view, cos_sin, starts).isnan().all()
        assert cpu.feed_forward_step(broken[0], feed_forward)[0].isnan().all()
        assert attend(x, part, view, cos_sin, starts).isfinite().all()
        if name == "odd":
            view.store.data[0, 5] = bad
            assert attend(x, part, view, cos_sin, starts).isnan().all()
        else:
            # a query may turn an infinite key to a logit of -inf, which has no weight
            view.store.data[0, 5, column] = bad if column < 0 else math.nan
            assert not attend(x, part, view, cos_sin, starts).isfinite().any()


@pytest.mark.parametrize(("experts", "weight"), [([5], math.nan), (slice(None), -1e3)], ids=["NaN", "scores of zero"])
def test_scores_at_their_ends_are_those_of_the_reference(isa: str, experts: Any, weight: float) -> None:
    """An expert whose score is NaN is chosen, so that it shows. Weights of zero are not divided by their sum."""
    model = model_of("odd")
    part = [part for _, part, *_ in layers(model, model.new_cache(1, 8), 1)][-1]
    part.weights["gate"][experts] = weight
    x = torch.ones(2, model.config.dim)
    with ops.use("reference"):
        want = feed_forward_step(x, part)
    got = cpu.feed_forward_step(x, part)
    assert torch.equal(got[1], want[1]) and torch.equal(got[0].isnan(), want[0].isnan())
    assert got[0].isnan().all() == math.isnan(weight) and (got[2].nan_to_num() == 0).all()


@pytest.mark.parametrize("column", [5, 128])
def test_a_code_of_nan_stays_visible(isa: str, column: int) -> None:
    """Both where whole vectors are read and in the rest of a row."""
    x, part, view, cos_sin, starts = step("blocks", [70], weights="fp8")
    codes = part.weights["wkv_b"].codes.view(torch.uint8)
    for row in (0, part.layer.qk_nope_head_dim):  # of W_UK, and of W_UV
        before, codes[row, column] = codes[row, column].clone(), 0xFF
        assert cpu.attention_step(x, part, view, cos_sin, starts).isnan().all()
        codes[row, column] = before


@pytest.mark.parametrize("name", ["odd", "mha", "dsa"])
def test_rows_after_the_end_do_not_matter(isa: str, name: str) -> None:
    """Rows after a sequence's end may hold anything, and other sequences' rows are not read."""
    x, part, view, cos_sin, starts = step(name, [300, 63], s=2)
    want = attend(x, part, view, cos_sin, starts)
    for data in (view.store.data, *([view.store.index.data] if name == "dsa" else [])):
        data[0, 302:], data[1, 65:] = math.nan, math.nan
    assert torch.equal(attend(x, part, view, cos_sin, starts), want)


def test_what_is_not_served_says_why() -> None:
    x, one = torch.randn(1, 1, 24), norm_of(torch.ones(24), 0.0)
    model = model_of("odd", "fp8")
    (attention, _, *more), *_, (_, routed, *_) = layers(model, filled(model, [3], torch.float32), 1)
    _, grouped, view, *after = step("gqa", [3])
    _, sparse, *sparse_more = step("dsa", [3])
    stacks = {f"experts.{name}": torch.empty(513, 1, 1) for name in ("w1", "w2", "w3")}
    many = dataclasses.replace(routed, weights=routed.weights | stacks, prepared={})
    mixed = sparse.weights | {"indexer.wq_b": sparse.weights["indexer.wq_b"].bfloat16()}
    data = view.store.data
    large = torch.randn(300, 301)

    def with_cache(other: Tensor) -> None:
        view.store.data = other
        cpu.attention_step(x, grouped, view, *after)

    refused: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: cpu.attention_step(x.double(), attention, *more), "tokens of torch.float64"),
        (lambda: cpu.attention_step(x.expand(1, 33, 24), attention, *more), r"\[1, 33, 24\] tokens"),
        (lambda: with_cache(data.to(torch.uint8)), r"cache of torch\.uint8"),
        (lambda: with_cache(data[..., ::2]), "contiguous"),
        (lambda: cpu.attention_step(*step("dsa", [70], dtype="fp8")), r"index_cache of torch\.uint8"),
        (
            lambda: cpu.attention_step(x, dataclasses.replace(sparse, weights=mixed, prepared={}), *sparse_more),
            "weights of different types",
        ),
        (lambda: cpu.feed_forward_step(x[0], many), "513 experts"),
        (lambda: cpu.normed(x.half(), one), "numbers of torch.float16"),
        (lambda: cpu.normed(x, norm_of(torch.ones(24).double(), 0.0)), "numbers in torch.float64"),
        (lambda: cpu.linear(torch.randn(1, 301).half(), large), "tensors in torch.float16"),
        (lambda: cpu.linear(torch.randn(1, 301), large.half()), "a weight of torch.float16"),
        (lambda: cpu.linear(torch.randn(1, 300), large), r"x of shape \[1, 300\] for a weight"),
        (lambda: cpu.linear(torch.randn(1, 300), large.T), "strides"),
        (lambda: cpu.linear(torch.randn(steps.MOST_ROWS + 1, 301), large), r"^$"),
    )
    for call, reason in refused:
        with pytest.raises(Unserved, match=reason):
            call()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Unserved, match="autocast"):
        cpu.linear(torch.randn(1, 301), large)


def test_torch_multiplies_many_bf16_rows_only_with_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_served(rows: int, columns: int, dtype: torch.dtype) -> bool:
        with suppress(Unserved):
            x, weight = torch.randn(rows, columns, dtype=dtype), torch.randn(301, columns, dtype=dtype)
            return cpu.linear(x, weight).numel() > 0
        return False

    for units in (True, False):
        monkeypatch.setattr(steps, "has_bf16_units", lambda units=units: units)
        shapes = ((steps.MOST_ROWS + 1, 301), (8, 301), (64, 16), (1, 16))
        served = [is_served(*shape, torch.bfloat16) for shape in shapes]
        assert served == [not units, not units, not units, False]
        assert [is_served(*shape, torch.float32) for shape in ((steps.MOST_ROWS + 1, 301), (8, 301))] == [False, True]


def test_other_strides_and_integers_are_served() -> None:
    x, part, view, cos_sin, starts = step("gqa", [3])
    want = attend(x, part, view, cos_sin, starts)
    apart = torch.stack((x, x), -1)[..., 0]
    wide = tuple(torch.stack((t, t), -1)[..., 0].double() for t in cos_sin)
    for call in ((apart, part, view, cos_sin, starts.to(torch.int32)), (apart, part, view, wide, starts)):
        assert torch.equal(attend(*call), want)


@pytest.mark.parametrize("start", [-1, ROOM, ROOM - 1])
@pytest.mark.parametrize("name", ["odd", "mqa"])
def test_tokens_beyond_the_cache_are_refused(name: str, start: int) -> None:
    x, part, view, cos_sin, _ = step(name, [3], s=2)
    before = view.store.data.clone()
    with pytest.raises(RuntimeError, match="beyond their memory"):
        attend(x, part, view, cos_sin, torch.tensor([start]))
    assert torch.equal(view.store.data, before)


def test_caches_and_indexers_that_do_not_fit_are_refused() -> None:
    for name in ("gqa", "dsa"):
        x, part, view, cos_sin, starts = step(name, [70])
        store = view.store if name == "gqa" else view.store.index
        whole = store.data
        for wrong in (whole[..., :-1].contiguous(), *([whole[:, :-1].contiguous()] if name == "dsa" else [])):
            store.data = wrong
            with pytest.raises(RuntimeError, match="beyond their memory"):
                attend(x, part, view, cos_sin, starts)
        store.data = whole
    for name, value in (("n_heads", 4), ("topk", -1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(part.layer.indexer, name, value)
            with pytest.raises(RuntimeError):
                attend(x, dataclasses.replace(part, prepared={}), view, cos_sin, starts)


# --- V4's steps, in each format of a cache

V4_STEPS: list[tuple[list[int], int, list[int] | None]] = [
    ([70], 1, None),
    ([127], 9, None),
    ([9, 66, 126], 5, [5, 0, 3]),
    ([200, 3], 3, [1, 3]),
]
"""Lengths of cached sequences, columns of a step, and the numbers of new tokens of each sequence."""


def given(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def filled_v4(model: Transformer, lengths: list[int], dtype: Any) -> Cache:
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


def layers_of_v4(
    model: Transformer, cache: Cache, s: int, new: list[int] | None, products: Any = torch.float32
) -> Iterator[Any]:
    """Yield each block's parts with its part of the cache, cos and sin of all positions, and the starts."""
    at = cache.place(s, None if new is None else torch.tensor(new))
    for block, view in zip(model.layers, cache.views(at), strict=True):
        parts = extract_weights(block, products)
        assert parts is not None
        yield block, *parts, view, parts.attention.layer.rope.cos_sin(torch.arange(256)[None]), cache.lengths


def attended_v4(
    model: Transformer, cache: Cache, s: int, new: list[int] | None, backend: str = "cpu", **how: Any
) -> list[Tensor]:
    """Return the results of all attentions for new tokens, and all that is stored afterwards, as it is stored."""
    torch.manual_seed(4)
    out = []
    for block, part, _, *more in layers_of_v4(model, cache, s, new, **how):
        x = expanded(block, given((cache.batch_size, s, model.config.dim)))
        with ops.use(backend):
            y = attention_step(x, part, *more)
        out += [row[:n] for row, n in zip(y, new or [s] * len(y), strict=True)]
    return out


def stored(cache: Cache) -> list[Tensor]:
    return [rows.data for rows in cache.rows]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", COMPRESSED)
def test_attention_of_v4_agrees_and_stores_the_same(isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for step in V4_STEPS:
        cache = filled_v4(model, step[0], torch.float32)
        other = copy.deepcopy(cache)
        got, want = attended_v4(model, cache, *step[1:]), attended_v4(model, other, *step[1:], backend="reference")
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
    for step in V4_STEPS:
        torch.manual_seed(1)
        exact = filled_v4(model, step[0], torch.float32)
        torch.manual_seed(1)
        cache = filled_v4(model, step[0], dtype)
        before = copy.deepcopy(cache)
        attended_v4(model, exact, *step[1:])
        got = attended_v4(model, cache, *step[1:])
        for a, b, old in zip(cache.rows, exact.rows, before.rows, strict=True):
            changed = (a.data != old.data).any(-1)
            want = a.codec.encode(b.data)
            assert torch.equal(a.data[changed].view(torch.uint8), want[changed].view(torch.uint8))
        with monkeypatch.context() as patch:
            read_what_is_stored(patch)
            for a, b in zip(got, attended_v4(model, cache, *step[1:], backend="reference"), strict=True):
                assert relative_error(a, b) < STEP, step


def test_products_in_bf16_round_once(isa: str) -> None:
    """In BF16 a CPU with units for it rounds queries, weights of rows and results, and nothing else."""
    model = model_of("v4, all entries", "bfloat16", head_dim=64)
    cache = filled_v4(model, [70], torch.bfloat16)
    other = copy.deepcopy(cache)
    for a, b in zip(
        attended_v4(model, cache, 2, None, products=torch.bfloat16), attended_v4(model, other, 2, None), strict=True
    ):
        assert relative_error(a, b) < rounding(BF16_UNIT, chained=4)


@pytest.mark.parametrize("name", ["v4", "v4, blocks"])
def test_threads_change_no_bit_of_v4(isa: str, name: str) -> None:
    model = model_of(name, "bfloat16")
    cache = filled_v4(model, [200, 66], torch.bfloat16)

    def run() -> list[Tensor]:
        own = copy.deepcopy(cache)
        return [*attended_v4(model, own, 3, [3, 2]), *stored(own)]

    assert_threads_change_no_bit(run, most=4)


@pytest.mark.parametrize("scale", [1e15, 1e-15, 1e-38])
def test_numbers_of_any_magnitude_agree(isa: str, scale: float) -> None:
    """Norms make them moderate, but where they are smaller than eps, which then counts alone."""
    model = model_of("v4, all entries")
    cache = filled_v4(model, [70], torch.float32)
    for (_, part, feed_forward, *more), (*_, view, _, _) in zip(
        layers_of_v4(model, cache, 1, None), layers_of_v4(model, copy.deepcopy(cache), 1, None), strict=True
    ):
        x = given((1, 1, model.config.dim), scale)
        got = attention_step(x, part, *more)
        with ops.use("reference"):
            want = attention_step(x, part, view, *more[1:])
            of_experts = feed_forward_step(x[0], feed_forward)[0]
        assert relative_error(got, want) < STEP and got.isfinite().all()
        assert relative_error(feed_forward_step(x[0], feed_forward)[0], of_experts) < STEP


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_visible_in_v4(isa: str, bad: float) -> None:
    model = model_of("v4, all entries")
    for _, part, feed_forward, *more in layers_of_v4(model, filled_v4(model, [70], torch.float32), 1, None):
        x = given((1, 1, model.config.dim))
        x[0, 0, 3] = bad
        assert attention_step(x, part, *more).isnan().all()
        assert feed_forward_step(x[0], feed_forward)[0].isnan().all()


@pytest.mark.parametrize("weights", decoding.EXPERTS)
@pytest.mark.parametrize("name", COMPRESSED)
def test_feed_forward_of_v4_agrees(isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for n in (1, 3, 32):
        tokens = torch.randint(61, (n,))
        for block, _, part, *_ in layers_of_v4(model, model.new_cache(1, 40), 1, None):
            x = expanded(block, given((1, n, model.config.dim), 3.0))[0]
            got = cpu.feed_forward_step(x, part, tokens)
            with ops.use("reference"):
                want = feed_forward_step(x, part, tokens)
            assert torch.equal(got[1], want[1]) and torch.equal(got[4], want[4]), "experts and counts"
            for place in (0, 2, 3):
                assert relative_error(got[place], want[place]) < STEP


def test_scores_of_sqrtsoftplus_keep_their_ends(isa: str) -> None:
    model = model_of("v4, all entries")
    _, _, part, *_ = next(layers_of_v4(model, model.new_cache(1, 40), 1, None))
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
    block, _, part, *_ = next(layers_of_v4(model, model.new_cache(1, 40), 1, None))
    x = expanded(block, given((1, 2, model.config.dim)))[0]
    for tokens in ([0, 61], [-1, 0]):
        with pytest.raises(RuntimeError, match="beyond their memory"):
            cpu.feed_forward_step(x, part, torch.tensor(tokens))
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.feed_forward_step(x, part)
    part.weights["gate.tid2eid"][5, 1] = 8
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.feed_forward_step(x, part, torch.tensor([0, 5]))


def test_what_is_not_served_of_v4_says_why() -> None:
    model = model_of("v4")
    cache = filled_v4(model, [9], torch.float32)
    for block, part, _, view, cos_sin, starts in layers_of_v4(model, cache, 1, None):
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
    cache = filled_v4(model, [70], torch.float32)
    block, part, feed_forward, *more = [*layers_of_v4(model, cache, 1, None)][1]
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
