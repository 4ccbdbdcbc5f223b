"""Gradients of simulated FP8 products against the same computation written out, of one matrix and of experts."""

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini.numerics import SMALLEST_AMAX, fp8_matmul, fp8_swiglu_matmul, quantize
from tests.helpers.fp8 import QUANTISED, Scale, rounded, varied
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, calc_diff, relative_error, rounding
from tests.helpers.watching import saved_for_backward, storage_bytes


@pytest.mark.parametrize("grad_format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 1e-9])
def test_gradients_equal_the_written_out_computation(
    magnitude: float, dtype: torch.dtype, scale: Scale, grad_format: Literal["e4m3", "e5m2"]
) -> None:
    x = varied(2, 150, 576, dtype=dtype).requires_grad_()
    w = varied(300, 576, seed=1).requires_grad_()
    given = quantize(x, scale=scale) if magnitude == 1 else x  # gradients take the scale of a quantized input
    y = fp8_matmul(given, w, scale=scale, grad_format=grad_format)
    dy = varied(2, 150, 300, dtype=dtype, seed=2) * magnitude
    y.backward(dy)

    flat, kept = dy.flatten(0, 1), rounded(x.flatten(0, 1), (1, 128), scale).float()
    along = rounded(flat, (1, 128), scale, grad_format, SMALLEST_AMAX)
    down = rounded(flat, (128, 1), scale, grad_format, SMALLEST_AMAX)
    dx = along @ rounded(w, (128, 128), scale)
    dw = down.T @ rounded(kept, (128, 1), scale)
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    tolerance = rounding(unit) + rounding(FP32_UNIT, terms=576)
    assert x.grad is not None and x.grad.dtype == dtype
    assert w.grad is not None and w.grad.dtype == torch.float32
    assert relative_error(x.grad.flatten(0, 1), dx) < tolerance
    assert relative_error(w.grad, dw) < tolerance
    # and both are near the unquantized gradients: small ones are not flushed
    loss = QUANTISED if grad_format == "e4m3" else 4 * QUANTISED  # one bit less doubles the error
    assert calc_diff(x.grad.flatten(0, 1), flat.double() @ w.double()) < loss
    assert calc_diff(w.grad, flat.double().T @ x.flatten(0, 1).double()) < loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_format_e5m6_is_what_backward_reads(dtype: torch.dtype) -> None:
    """An input that is quantized so already is multiplied in E4M3, and saved as it is."""
    x, w = varied(150, 200, dtype=dtype).requires_grad_(), varied(130, 200, seed=1).requires_grad_()
    dy = varied(150, 130, dtype=dtype, seed=2)
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    for format in ("e4m3", "e5m2", "e5m6"):
        q = quantize(x, format=format)
        values = quantize(x.detach(), format=format).dequantize()
        want = rounded(dy, (128, 1), amax_min=SMALLEST_AMAX).T @ rounded(values, (128, 1))
        with saved_for_backward() as saved:
            y = fp8_matmul(q, w)
        assert saved[0].data_ptr() == q.codes.data_ptr()
        assert torch.equal(y, fp8_matmul(values, w, out_dtype=dtype))
        products = [y] if format == "e5m2" else [y, fp8_matmul(x, w, saved_format=format)]
        for product in products:
            (dw,) = torch.autograd.grad(product, w, dy)
            assert relative_error(dw, want) < rounding(unit) + rounding(FP32_UNIT, terms=150), format
    assert torch.equal(products[1], fp8_matmul(x, w)), "it changes backward alone"
    with saved_for_backward() as saved:
        fp8_matmul(x, w.detach(), saved_format="e5m6")
    assert saved[0].dtype == torch.float8_e4m3fn, "a frozen weight has no gradient to read it"


def test_shared_quantized_input_is_saved_once_and_gradients_add_up() -> None:
    x = varied(64, 256, dtype=torch.bfloat16).requires_grad_()
    w = [varied(n, 256, seed=n).requires_grad_() for n in (128, 200)]
    dy = [varied(64, n, dtype=torch.bfloat16, seed=n + 1) for n in (128, 200)]

    def gradients(shared: bool) -> tuple[list[Tensor], list[int]]:
        q = quantize(x) if shared else x
        with saved_for_backward() as saved:
            y = [fp8_matmul(q, weight) for weight in w]
        return list(torch.autograd.grad(y, [x, *w], dy)), storage_bytes(saved)

    alone, _ = gradients(shared=False)
    together, bytes_kept = gradients(shared=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    # one storage of codes and one of scales for x, and for each weight
    assert bytes_kept == sorted([64 * 256, 64 * 2 * 4, 128 * 256, 2 * 4, 200 * 256, 2 * 2 * 4])


def test_weights_with_fp32_scales_are_not_rounded_to_bf16() -> None:
    """Check that a BF16 result, and the input's gradient, is the FP32 one rounded once."""
    x = varied(64, 256, dtype=torch.bfloat16).requires_grad_()
    w = quantize(varied(200, 256, seed=1), (128, 128), "fp32")
    gate, up = (varied(64, 256, dtype=torch.bfloat16, seed=s) for s in (3, 4))
    y, exact = fp8_matmul(x, w), fp8_matmul(x, w, out_dtype=torch.float32)
    assert torch.equal(y, exact.bfloat16())
    dy = varied(64, 200, dtype=torch.bfloat16, seed=2)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(exact, x, dy.float())[0])
    hidden = F.silu(gate) * up
    assert torch.equal(fp8_swiglu_matmul(gate, up, w), fp8_matmul(hidden, w, out_dtype=torch.float32).bfloat16())


GROUPS = st.lists(st.integers(0, 200), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0)


@given(GROUPS, st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 99))
def test_groups_equal_each_expert_alone(sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    ends = torch.tensor(sizes).cumsum(0)
    rows, e, n, k = sum(sizes), len(sizes), 48, 144
    x = varied(rows, k, dtype=dtype, seed=seed).requires_grad_()
    w = varied(e, n, k, seed=seed + 1).requires_grad_()
    dy = varied(rows, n, dtype=dtype, seed=seed + 2)
    y = fp8_matmul(x, w, ends=ends)
    dx, dw = torch.autograd.grad(y, [x, w], dy)
    alone = [
        (part, *torch.autograd.grad(part, [rows_in, w_in], g))
        for rows_in, w_in, g in zip(x.split(sizes), w, dy.split(sizes), strict=True)
        for part in [fp8_matmul(rows_in, w_in)]
    ]
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    tolerance = rounding(unit) + rounding(FP32_UNIT, terms=200)
    assert relative_error(y, torch.cat([a[0] for a in alone])) < tolerance
    assert relative_error(dx, torch.cat([a[1] for a in alone])) < tolerance
    assert relative_error(dw, torch.stack([a[2] for a in alone])) < tolerance
    assert all((dw[j] == 0).all() for j, size in enumerate(sizes) if not size)


@pytest.mark.parametrize(("of_x", "of_dy"), [(1e-4, 1.0), (1.0, 1e-6)])
def test_weight_gradient_tiles_hold_one_expert_each(of_x: float, of_dy: float) -> None:
    sizes = [100, 28, 128]
    x, dy = torch.randn(256, 128), torch.randn(256, 64)
    x[100:128] *= of_x  # in one tile with the large tokens of the first expert these would be flushed
    dy[100:128] *= of_dy
    w = varied(3, 64, 128, seed=1).requires_grad_()
    fp8_matmul(x, w, ends=torch.tensor(sizes).cumsum(0)).backward(dy)
    assert w.grad is not None
    for grad, tokens, g in zip(w.grad, x.split(sizes), dy.split(sizes), strict=True):
        assert calc_diff(grad, g.double().T @ tokens.double()) < 2 * QUANTISED  # both are rounded


# --- SwiGLU


@pytest.mark.parametrize(("ends", "limit"), [(None, None), ((0, 40, 150), None), (None, 0.2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu_is_recomputed_from_its_saved_inputs(
    dtype: torch.dtype, ends: tuple[int, ...] | None, limit: float | None
) -> None:
    at = None if ends is None else torch.tensor(ends)
    gate, up = (varied(150, 256, dtype=dtype, seed=s).div(4).to(dtype).requires_grad_() for s in (0, 1))
    shape = (100, 256) if ends is None else (3, 100, 256)
    w = varied(*shape, seed=2).requires_grad_()
    dy = varied(150, 100, dtype=dtype, seed=3)

    def activate(g: Tensor, u: Tensor) -> Tensor:
        if limit is None:
            return F.silu(g) * u
        wide = F.silu(g.float().clamp(max=limit)) * u.float().clamp(-limit, limit)  # V4's, which is rounded once
        return (wide * weighed[0]).to(dtype)

    weighed = [] if limit is None else [torch.rand(150, 1).requires_grad_()]
    y = fp8_swiglu_matmul(gate, up, w, ends=at, limit=limit, weights=weighed[0] if weighed else None)
    assert torch.equal(y, fp8_matmul(activate(gate, up), w, ends=at))
    got = torch.autograd.grad(y, [gate, up, w, *weighed], dy)

    sizes = [150] if ends is None else torch.tensor(ends).diff(prepend=torch.zeros(1)).int().tolist()
    weights = [w] if ends is None else list(w)
    want: list[list[Tensor]] = []
    for g0, u0, d0, w0 in zip(gate.split(sizes), up.split(sizes), dy.split(sizes), weights, strict=True):
        g, u = (rounded(t, (1, 128)).to(dtype).requires_grad_() for t in (g0, u0))
        hidden = activate(g, u)
        dh = rounded(d0, (1, 128), amax_min=SMALLEST_AMAX) @ rounded(w0, (128, 128))
        dg, du, *of_shares = torch.autograd.grad(hidden, [g, u, *weighed], dh.to(dtype))
        dw = rounded(d0, (128, 1), amax_min=SMALLEST_AMAX).T @ rounded(hidden, (128, 1))
        want.append([dg, du, dw, *of_shares])
    dgate, dup = (torch.cat([part[i] for part in want]) for i in (0, 1))
    dw = want[0][2] if ends is None else torch.stack([part[2] for part in want])
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    tolerance = rounding(unit, chained=4) + rounding(FP32_UNIT, terms=256)
    for a, b in zip(got, (dgate, dup, dw, *want[0][3:]), strict=True):
        assert relative_error(a, b) < tolerance
