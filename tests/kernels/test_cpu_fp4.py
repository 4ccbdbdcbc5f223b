"""Products with E2M1 codes in C++, and experts that are such codes in a decoding step, agree with their references."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.inference.fused import feed_forward_step
from dsmini.measure.costs import cost_of
from dsmini.numerics import FP4_BLOCK, QuantizedTensor
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import steps
from tests.helpers.decoding import model_of
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, rounding
from tests.kernels.conftest import assert_threads_change_no_bit, weight_in
from tests.kernels.test_cpu_steps import layers_of_v4 as layers

pytestmark = pytest.mark.usefixtures("library", "poisoned_memory", "without_gradients")
SMALLEST = 2.0**-149
SHAPES = ((1, 1), (5, 31), (33, 32), (9, 96), (130, 200), (3, 513), (6, 777), (7, 4096))
ROWS = (1, 2, 3, 4, 7, 40)


def scaled(weight: QuantizedTensor, exponents: Tensor) -> QuantizedTensor:
    """Return the codes with these biased exponents as scales."""
    scales = exponents.expand(weight.scales.shape).to(torch.uint8).contiguous().view(torch.float8_e8m0fnu)
    return dataclasses.replace(weight, scales=scales)


def exact(weight: QuantizedTensor) -> Tensor:
    """Return the values in FP64, which holds also those that FP32 does not."""
    codes = (
        dataclasses.replace(weight, scales=torch.ones_like(weight.scales, dtype=torch.float32)).dequantize().double()
    )
    scales = torch.exp2(weight.scales.view(torch.uint8).double() - 127)
    return codes * scales.repeat_interleave(FP4_BLOCK, -1)[..., : codes.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "lowest", "highest"), [(1.0, 0, 240), (1e15, 1, 190), (1e-40, 110, 251)])
def test_products_agree_at_all_scales(isa: str, dtype: Any, size: float, lowest: int, highest: int) -> None:
    """Each row has scales of its own size, up to 2^6 apart. BF16 units take what is subnormal as zero."""
    if dtype == torch.bfloat16 and size < 1e-38:
        pytest.skip("subnormal numbers of BF16 units are zero")
    for o, i in SHAPES:
        base = torch.randint(lowest, highest - 5, (o, 1))
        weight = scaled(weight_in("fp4", o, i), base + torch.randint(7, (o, -(-i // FP4_BLOCK))))
        values = exact(weight)
        for n in ROWS if dtype == torch.float32 else ROWS[:-1]:
            x = (torch.randn(n, i) * size).to(dtype)
            got, want = cpu.quantized_linear(x, weight).double(), x.double() @ values.T
            of_sum = rounding(FP32_UNIT, terms=i + 4) * (x.double().abs() @ values.abs().T)
            largest = torch.exp2(base.double().T + 6 - 127).clamp(min=1)
            bound = of_sum + 2 * i * SMALLEST * largest + (BF16_UNIT * want.abs() if dtype == torch.bfloat16 else 0.0)
            assert ((got - want).abs() <= bound).all(), (o, i, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width", "at"), [(1, 40, 3), (3, 40, 38), (1, 700, 3), (1, 700, 697), (1, 33, 32)])
def test_every_code_has_its_value_under_every_scale(isa: str, dtype: Any, rows: int, width: int, at: int) -> None:
    """Also under that of NaN, and where FP32 has no number as large, or none as small but a subnormal one."""
    code = torch.arange(16).repeat(256)
    weight = weight_in("fp4", 16 * 256, width)
    codes = torch.zeros_like(weight.codes)
    codes[:, at // 2] = (code << at % 2 * 4).to(torch.uint8)
    exponents = torch.full(weight.scales.shape, 127)
    exponents[:, at // FP4_BLOCK] = torch.arange(256).repeat_interleave(16)
    weight = scaled(dataclasses.replace(weight, codes=codes), exponents)
    x = torch.zeros(rows, width, dtype=dtype)
    x[:, at] = 1
    got, want = cpu.quantized_linear(x, weight), weight.dequantize(dtype)[:, at]
    assert all(torch.equal(row.nan_to_num(nan=7e7), want.nan_to_num(nan=7e7)) for row in got)


def test_a_scale_of_nan_makes_its_row_nan_and_no_other(isa: str) -> None:
    weight = weight_in("fp4", 9, 200)
    exponents = weight.scales.view(torch.uint8).clone()
    exponents[4, 6] = 255
    bad = scaled(weight, exponents)
    for n in (1, 2, 40):
        got = cpu.quantized_linear(torch.randn(n, 200), bad).isnan()
        assert got[:, 4].all() and not got[:, :4].any() and not got[:, 5:].any()
    assert not cpu.quantized_linear(torch.full((1, 200), math.inf), weight).isfinite().any()


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(isa: str, products: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "THREADED", 0)
    weight, model = weight_in("fp4", 300, 777), model_of("v4, blocks", "fp4")
    parts = [part for _, _, part, *_ in layers(model, model.new_cache(1, 40), 1, None, products)]
    x, states = torch.randn(5, 777).to(products), torch.randn(7, model.config.dim)

    def run() -> list[Tensor]:
        return [cpu.quantized_linear(x, weight), *(cpu.feed_forward_step(states, part)[0] for part in parts)]

    assert_threads_change_no_bit(run, most=4)


def test_experts_in_other_formats_are_refused() -> None:
    model = model_of("v4", "fp4")
    *_, (_, _, part, *_) = layers(model, model.new_cache(1, 40), 1, None)
    x, w1 = torch.randn(1, 1, model.config.dim), part.weights["experts.w1"]
    for other, reason in (
        (dataclasses.replace(w1, scales=w1.scales.float()), "codes with the format"),
        (dataclasses.replace(w1, tile=(1, 16)), "codes with the format"),
        (w1.dequantize(), "w1 and w3 of different types"),
    ):
        changed = dataclasses.replace(part, weights=part.weights | {"experts.w1": other}, prepared={})
        with pytest.raises(Unserved, match=reason):
            cpu.feed_forward_step(x, changed)


def test_cost_of_a_step_counts_the_bytes_of_codes_and_scales() -> None:
    model = model_of("v4, all entries", "fp4")
    *_, (_, _, part, *_) = layers(model, model.new_cache(1, 40), 1, None)
    x = torch.randn(1, model.config.dim)
    with ops.use("reference"):
        result = feed_forward_step(x, part)
    c = model.config
    blocks = 2 * c.moe_inter_dim * -(-c.dim // FP4_BLOCK) + c.dim * -(-c.moe_inter_dim // FP4_BLOCK)
    expert = 2 * c.moe_inter_dim * -(-c.dim // 2) + c.dim * -(-c.moe_inter_dim // 2) + blocks
    shared = sum(w.nbytes for name, w in part.weights.items() if name.startswith("shared_experts."))
    read = cost_of(ops.Call("feed_forward_step", (x, part), {}, result)).read
    norms = part.weights["norm"].nbytes + part.weights["gate"].nbytes
    assert read == x.nbytes + norms + shared + c.n_activated_experts * expert
