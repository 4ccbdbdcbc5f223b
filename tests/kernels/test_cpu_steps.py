"""Products and decoding steps in C++ agree with their references, on every instruction set."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, ops
from dsmini.functional.decoding import NormPart, attention_step, blocks_step, feed_forward_step, normed
from dsmini.inference.parts import parts_of
from dsmini.nn import Cache
from dsmini.numerics import WEIGHT_TILE, quantize
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import build, steps
from tests.helpers.decoding import CACHES, GROUPED, MODELS, ROOM, SPARSE, WEIGHTS, filled, model_of, rows_of
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

STEP = rounding(FP32_UNIT, terms=512, chained=8)
"""Eight products follow each other in a step; the longest sum has 512 terms."""
pytestmark = pytest.mark.usefixtures("poisoned_memory", "without_gradients")
LENGTHS = ([1], [63], [64, 65, 1], [129], [300, 7])


def layers(model: Transformer, cache: Cache, s: int) -> Iterator[tuple[Any, ...]]:
    """Yield each block's parts with its part of the cache, the table of positions, and the starts."""
    tokens = torch.zeros(cache.batch_size, s, dtype=torch.int64)
    window = cache.place(model.config, tokens)
    table = model.rope.table(window.positions)
    for block, past in zip(model.layers, cache.pasts(window), strict=True):
        parts = parts_of(block)
        assert parts is not None
        yield *parts, past, table, cache.lengths


def attended(run: Callable[..., Tensor], model: Transformer, lengths: list[int], s: int, dtype: Any) -> list[Tensor]:
    torch.manual_seed(3)
    cache = filled(model, lengths, dtype)
    x = torch.randn(len(lengths), s, model.config.dim)
    out = [run(x, attention, past, table, starts) for attention, _, past, table, starts in layers(model, cache, s)]
    return [*out, *rows_of(cache)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_attention_agrees(every_isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for number, lengths in enumerate(LENGTHS):
        for s in (1, 3):
            with ops.use("reference"):
                want = attended(attention_step, model, lengths, s, torch.float32)
            got = attended(cpu.attention_step, model, lengths, s, torch.float32)
            for a, b in zip(got, want, strict=True):
                assert relative_error(a, b) < STEP, (lengths, s)
        # what is stored is rounded, so the reference reads what the kernel stored
        dtype = CACHES[1 + number % 2]
        torch.manual_seed(3)
        cache = filled(model, lengths, dtype)
        x = torch.randn(len(lengths), 2, model.config.dim)
        for attention, _, past, table, starts in layers(model, cache, 2):
            got_y = cpu.attention_step(x, attention, past, table, starts)
            kept = past.store.data.clone()
            with ops.use("reference"):
                past.store.write = lambda *_: None  # the kernel's rows stay
                want_y = attention_step(x, attention, past, table, starts)
            assert torch.equal(past.store.data, kept)
            assert relative_error(got_y, want_y) < STEP, (lengths, dtype)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_feed_forward_agrees(every_isa: str, name: str, weights: str) -> None:
    model = model_of(name, weights)
    for n in (1, 2, 3, 7, 32):
        x = torch.randn(n, model.config.dim)
        for _, part, *_ in layers(model, model.new_cache(1, 8), 1):
            with ops.use("reference"):
                want = feed_forward_step(x, part)
            got = cpu.feed_forward_step(x, part)
            assert relative_error(got[0], want[0]) < STEP
            if part.gate is not None:
                assert torch.equal(got[1], want[1]) and torch.equal(got[4], want[4]), "experts and counts"
                assert relative_error(got[2], want[2]) < STEP and relative_error(got[3], want[3]) < STEP


@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_agrees(every_isa: str, weights: str) -> None:
    for o, i in ((1, 1), (5, 31), (130, 200), (33, 128), (257, 65)):
        weight: Any = torch.randn(o, i)
        if weights == "bfloat16":
            weight = weight.bfloat16()
        elif weights == "fp8":
            weight = quantize(weight, WEIGHT_TILE)
        dense = weight.float() if isinstance(weight, Tensor) else weight.dequantize()
        for n in (1, 2, 3, 5, 8, 32):
            x = torch.randn(n, i)
            want = x.double() @ dense.double().T
            assert relative_error(cpu.quantized_linear(x, weight), want) < rounding(FP32_UNIT, terms=i)
            x = x.bfloat16()
            got = cpu.quantized_linear(x, weight)
            assert got.dtype == torch.bfloat16
            assert relative_error(got, x.double() @ dense.double().T) < rounding(2.0**-9) + rounding(FP32_UNIT, terms=i)


def test_normed_agrees(every_isa: str) -> None:
    for dim, n in ((1, 1), (31, 2), (200, 7), (513, 32)):
        x, y = torch.randn(n, dim), torch.randn(n, 2 * dim)[:, ::2]  # y is not contiguous
        one, two = NormPart(torch.randn(dim), 1e-6), NormPart(torch.randn(dim), 0.5)
        with ops.use("reference"):
            want, pair = normed(x, one), normed(x, one, y, two)
        assert relative_error(cpu.normed(x, one), want) < rounding(FP32_UNIT, terms=dim)
        assert relative_error(cpu.normed(x, one, y, two), pair) < rounding(FP32_UNIT, terms=dim)
    x[0, 3], y[1, 2] = math.nan, math.inf
    assert cpu.normed(x, one, y, two).isnan().any(-1).tolist() == [True, True, *[False] * 30]
    assert cpu.normed(x, one).isnan().all(-1).tolist() == [True, *[False] * 31]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_size_of_x_loses_nothing(every_isa: str, weights: str) -> None:
    x, weight = torch.randn(3, 200), torch.randn(130, 200)
    held: Any = {"float32": weight, "bfloat16": weight.bfloat16(), "fp8": quantize(weight, WEIGHT_TILE)}[weights]
    want = cpu.quantized_linear(x, held)
    for power in (-110.0, -60.0, 60.0, 110.0):
        factor = torch.tensor(2.0**power)
        got = cpu.quantized_linear(x * torch.tensor([[1.0], [1.0], [0.0]]) * factor, held)
        assert torch.equal(got[:2], want[:2] * factor) and not got[2].any()
    assert cpu.quantized_linear(torch.full((1, 200), math.inf), held).isfinite().logical_not().all()


def test_every_code_is_decoded(every_isa: str) -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).expand(16, 256).contiguous()
    model = model_of("blocks", "fp8")
    weight = dataclasses.replace(
        model.layers[0].attn.wo.operand("weight"), codes=codes.T.contiguous(), shape=torch.Size((256, 16))
    )
    weight = dataclasses.replace(weight, scales=torch.tensor([[1.0], [3.0]]))
    got = cpu.quantized_linear(torch.eye(16)[:1], weight)
    want = codes[0].float() * torch.tensor([1.0, 3.0]).repeat_interleave(128)
    assert torch.equal(got[0].nan_to_num(nan=7e7), want.nan_to_num(nan=7e7))


@pytest.mark.parametrize("name", [*MODELS, *GROUPED, *SPARSE])
def test_one_call_for_all_blocks_has_the_bits_of_many(every_isa: str, name: str) -> None:
    model = model_of(name, "bfloat16")
    results = []
    for run in (cpu.blocks_step, blocks_step.reference):
        torch.manual_seed(3)
        cache = filled(model, [70, 9], torch.bfloat16)
        attentions, feed_forwards, pasts, tables, starts = zip(*layers(model, cache, 2), strict=True)
        blocks = list(zip(attentions, feed_forwards, strict=True))
        # copies that a call needs must live until it has run
        x, table = torch.randn(2, 2, model.config.dim)[:, ::2].expand(2, 2, -1), tuple(t.double() for t in tables[0])
        with ops.use("cpu"):
            out = run(x, blocks, pasts, table, starts[0].to(torch.int32))
        results.append([*out, *rows_of(cache)])
    assert len(results[0]) == len(results[1]) > 1 + len(model.layers)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_blocks_that_are_not_whole_calls_are_refused() -> None:
    model, run = model_of("wide"), build.library().blocks
    attention, _, past, table, starts = next(layers(model, filled(model, [9], torch.float32), 1))
    call, held = steps._attention_call(torch.randn(1, 1, model.config.dim), attention, past, table, starts)
    header, packed = steps._packed("attention", call)
    whole = header + packed
    assert run(whole, len(whole)) == 0 and run(b"", 0) == 0
    for wrong in (whole[:-1], whole[:7], whole + b"x", whole + header, header):
        assert run(wrong, len(wrong)) != 0
    for number, size in ((0, len(packed)), (4, len(packed)), (6, len(packed)), (3, len(packed) - 8), (3, -1)):
        assert run(build.HEADER.pack(number, size) + packed, len(whole)) != 0
    assert held[0].isfinite().all()


def test_threads_change_no_bit(every_isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("wide", "bfloat16")
    x = torch.randn(5, model.config.dim)
    part = parts_of(model.layers[1])
    assert part is not None
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(steps, "n_threads", lambda n=threads: n)
        results.append(
            [
                *attended(cpu.attention_step, model, [300, 7], 2, torch.bfloat16),
                *cpu.feed_forward_step(x, part[1]),
                cpu.linear(x, model.head.weight),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_of_python_share_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one call holds the team, others run alone, with the same bits."""
    monkeypatch.setattr(steps, "n_threads", lambda: 2)
    x, weight = torch.randn(1, 700), torch.randn(900, 700)
    want = cpu.linear(x, weight)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(lambda: [cpu.linear(x, weight) for _ in range(50)]) for _ in range(8)]
        assert all(torch.equal(y, want) for future in futures for y in future.result())


def test_a_child_after_a_fork_has_threads_of_its_own() -> None:
    """The parent's threads are lost in a fork, and nobody waits for them."""
    code = """
import os, torch
from dsmini_kernels import cpu
torch.set_num_threads(2)
x, weight = torch.randn(1, 700), torch.randn(900, 700)
want = cpu.linear(x, weight)
child = os.fork()
same = all(torch.equal(cpu.linear(x, weight), want) for _ in range(200))
if child == 0:
    os._exit(not same)
print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "True 0\n", done.stderr


def test_stored_rows_have_the_bits_of_the_cache(every_isa: str) -> None:
    """The same numbers are stored in FP32, and rounded as the cache rounds them."""
    for name in ("blocks", "wide"):
        model = model_of(name)
        exact = attended(cpu.attention_step, model, [7], 2, torch.float32)[len(model.layers) :]
        for dtype in CACHES[1:]:
            torch.manual_seed(3)
            cache = filled(model, [7], dtype)
            x = torch.randn(1, 2, model.config.dim)
            for attention, _, past, table, starts in layers(model, cache, 2):
                cpu.attention_step(x, attention, past, table, starts)
            for store, rows in zip(cache.stores, exact, strict=True):
                assert torch.equal(store.data[:, 7:9].view(torch.uint8), store._encode(rows[:, 7:9]).view(torch.uint8))


def test_tiny_numbers_keep_the_eps_and_the_scales(every_isa: str) -> None:
    """A norm divides by sqrt(eps) there, and a tile of the cache is stored with a scale of its own."""
    model = model_of("blocks")
    for attention, feed_forward, past, table, starts in layers(model, filled(model, [9], "fp8"), 1):
        x = torch.randn(1, 1, model.config.dim) * 1e-4
        with ops.use("reference"):
            want = feed_forward_step(x[0], feed_forward)[0]
        assert relative_error(cpu.feed_forward_step(x[0], feed_forward)[0] - x[0], want - x[0]) < STEP
        attention.kv_norm.mul_(1e-9)
        cpu.attention_step(x, attention, past, table, starts)
        rows = past.store.read(10, torch.float32)[:, 9, : attention.latent]
        assert 0 < rows.abs().max() < 1e-8 and len(rows.unique()) > attention.latent // 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_visible(every_isa: str, bad: float) -> None:
    model = model_of("odd")
    for attention, feed_forward, past, table, starts in layers(model, filled(model, [70], torch.float32), 1):
        x = torch.randn(1, 1, model.config.dim)
        x[0, 0, 3] = bad
        assert cpu.attention_step(x, attention, past, table, starts).isnan().all()
        assert cpu.feed_forward_step(x[0], feed_forward)[0].isnan().all()
        past.store.data[0, 5] = bad
        y = cpu.attention_step(torch.randn(1, 1, model.config.dim), attention, past, table, starts)
        assert y.isnan().all()


@pytest.mark.parametrize("column", [5, 129])
def test_a_code_of_nan_stays_visible(every_isa: str, column: int) -> None:
    """Both where whole vectors are read and in the rest of a row."""
    model = model_of("blocks", "fp8")
    for row in (0, model.config.qk_nope_head_dim):  # of W_UK, and of W_UV
        module = model.layers[0].attn.wkv_b
        codes = module.weight.data.view(torch.uint8)
        before, codes[row, column] = codes[row, column].clone(), 0xFF
        attention, _, past, table, starts = next(layers(model, filled(model, [70], torch.float32), 1))
        assert cpu.attention_step(torch.randn(1, 1, model.config.dim), attention, past, table, starts).isnan().all()
        codes[row, column] = before


def test_hidden_rows_do_not_matter(every_isa: str) -> None:
    """Rows after a sequence's end may hold anything, and other sequences' rows are not read."""
    model = model_of("odd")
    for attention, _, past, table, starts in layers(model, filled(model, [70, 3], torch.float32), 2):
        x = torch.randn(2, 2, model.config.dim)
        want = cpu.attention_step(x, attention, past, table, starts)
        past.store.data[0, 72:], past.store.data[1, 5:] = math.nan, math.nan
        assert torch.equal(cpu.attention_step(x, attention, past, table, starts), want)


def test_what_is_not_served_says_why() -> None:
    model = model_of("odd", "fp8")
    x, one = torch.randn(1, 1, 24), NormPart(torch.ones(24), 0.0)
    cache = filled(model, [3], torch.float32)
    attention, feed_forward, past, table, starts = next(layers(model, cache, 1))
    for call, reason in (
        (lambda: cpu.attention_step(x.double(), attention, past, table, starts), "tokens of torch.float64"),
        (lambda: cpu.attention_step(x.expand(1, 33, 24), attention, past, table, starts), r"\[1, 33, 24\] tokens"),
        (lambda: cpu.feed_forward_step(x[0].expand(33, 24), feed_forward), "33 tokens"),
        (lambda: cpu.normed(x.half(), one), "numbers of torch.float16"),
        (lambda: cpu.normed(x, NormPart(torch.ones(24).double(), 0.0)), "a norm or gate in torch.float64"),
        (lambda: cpu.normed(x, one, x[0], one), r"\[1, 24\] numbers of torch.float32 next to"),
        (lambda: cpu.linear(x.half(), torch.randn(300, 300)), "x of torch.float16"),
        (lambda: cpu.linear(torch.randn(1, 300), torch.randn(300, 301).half()), "a weight of torch.float16"),
        (lambda: cpu.linear(torch.randn(1, 300), torch.randn(300, 301)), r"x of shape \[1, 300\] for a weight"),
        (lambda: cpu.linear(torch.randn(1, 301), torch.randn(301, 300).T), "strides"),
    ):
        with pytest.raises(Unserved, match=reason):
            call()
    with pytest.raises(Unserved, match=r"^$"):
        cpu.linear(torch.randn(steps.MOST_ROWS + 1, 300), torch.randn(300, 300))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Unserved, match="autocast"):
        cpu.linear(torch.randn(1, 300), torch.randn(300, 300))


@pytest.mark.parametrize("start", [-1, ROOM, ROOM - 1])
def test_tokens_beyond_the_cache_are_refused(start: int) -> None:
    model = model_of("odd")
    attention, _, past, table, _ = next(layers(model, filled(model, [3], torch.float32), 2))
    before = past.store.data.clone()
    with pytest.raises(RuntimeError, match="beyond their memory"):
        cpu.attention_step(torch.randn(1, 2, 24), attention, past, table, torch.tensor([start]))
    assert torch.equal(past.store.data, before)
