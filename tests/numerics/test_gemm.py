"""The simulated FP8 product and its gradients, of one matrix and of experts, next to the same computation in FP64."""

from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini import ops
from dsmini.numerics import AMAX_MIN, SMALLEST_AMAX, fp8_matmul, fp8_swiglu_matmul, quantize, round_tiles
from tests.conftest import require_cpu_kernels
from tests.helpers.configs import refusal
from tests.helpers.fp8 import QUANTISED, SIMULATED, Scale, rounded, varied
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, calc_diff, relative_error, rounding
from tests.helpers.watching import saved_for_backward, storage_bytes

# N, K of DeepSeek-V3's smaller products: wq_a with wkv_a, wkv_a, wkv_b, and w2 of an expert
RELEASED = [(2112, 7168), (576, 7168), (32768, 512), (7168, 2048)]
MANY_TOKENS = [(4096, 128, 7168), (4001, 576, 1536), (8001, 512, 576)]


@pytest.mark.parametrize(("m", "n", "k"), [*((m, n, k) for n, k in RELEASED for m in (1, 128)), *MANY_TOKENS])
def test_the_released_shapes(m: int, n: int, k: int) -> None:
    """Check a sample of rows and columns, since FP64 is slow.

    DeepGEMM's bound on the error of quantization holds for normally distributed numbers. If a few tiles outweigh the
    others, the error depends on those.
    """
    rows, tiles = torch.randperm(m)[:64], torch.arange(n).split(128)
    # whole tiles in their order, so that they are rounded alike without the rest of w
    columns = torch.cat([tiles[i] for i in torch.randperm(len(tiles))[:2].sort().values])
    several = varied(m, k, dtype=torch.bfloat16, seed=1), varied(n, k, seed=2)
    normal = torch.randn(m, k).bfloat16(), torch.randn(n, k)
    for x, w in (several, normal):
        y = fp8_matmul(x, w)
        assert y.shape == (m, n) and y.dtype == torch.bfloat16
        got = y[rows][:, columns]
        rounded_w = round_tiles(w[columns], (128, 128), "ue8m0", "e4m3", AMAX_MIN, torch.float32).double()
        assert calc_diff(got, rounded(x[rows], (1, 128)) @ rounded_w.T) < SIMULATED
        if x is normal[0]:
            assert calc_diff(got, x[rows].double() @ w[columns].double().T) < QUANTISED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
def test_dtypes_and_scales(dtype: torch.dtype, scale: Scale) -> None:
    x, w = varied(3, 65, 576, dtype=dtype), varied(300, 576, seed=1)
    for out_dtype in (None, torch.float32, torch.bfloat16):
        y = fp8_matmul(x, w, scale=scale, out_dtype=out_dtype)
        assert y.dtype == (out_dtype or dtype)
        want = rounded(x, (1, 128), scale) @ rounded(w, (128, 128), scale).T
        unit = FP32_UNIT if y.dtype == torch.float32 else BF16_UNIT
        assert relative_error(y, want) < rounding(unit) + rounding(FP32_UNIT, terms=576)
        if scale == "fp32":  # operands that BF16 does not hold: the result alone is rounded to it
            assert torch.equal(y, fp8_matmul(x, w, scale=scale, out_dtype=torch.float32).to(y.dtype))


@pytest.mark.parametrize("n", [1, 576])
def test_zeros_in_poisoned_memory(n: int, poisoned_memory: None) -> None:
    x, w = varied(130, 576), varied(n, 576, seed=1)
    x[:, :128], x[5], w[:, 128:256] = 0, 0, 0
    y = fp8_matmul(x, w)
    assert y.isfinite().all() and (y[5] == 0).all()
    assert calc_diff(y, rounded(x, (1, 128)) @ rounded(w, (128, 128)).T) < SIMULATED


def test_nan_and_infinity_reach_the_results() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x, w = varied(4, 256), varied(300, 256, seed=1).requires_grad_()
        x[1, 200] = bad
        x.requires_grad_()
        y = fp8_matmul(x, w)
        assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
        dx, dw = torch.autograd.grad(y, [x, w], torch.ones_like(y))
        assert dx.isfinite().all() and dw[:, 128:].isnan().all() and dw[:, :128].isfinite().all()


@pytest.mark.parametrize("product", ["matmul", "swiglu"])
def test_backward_runs_on_the_backend_of_forward(product: str) -> None:
    require_cpu_kernels()
    x, w, kernels = varied(4, 128).requires_grad_(), varied(4, 128).requires_grad_(), list[str]()
    with ops.use("cpu"):
        y = fp8_matmul(x, w) if product == "matmul" else fp8_swiglu_matmul(x, x, w)
    counter = SimpleNamespace(kernel_ran=lambda call: kernels.append(call.name))
    with ops.use("eager"), ops.counting(counter):
        y.sum().backward()
    assert kernels, "eager is in force, and the forward's backend runs"


def test_a_weight_may_have_tiles_and_a_format_of_its_own() -> None:
    """Such as blocks of 32 along the contraction."""
    x = varied(5, 200, dtype=torch.bfloat16).requires_grad_()
    for tile, format in (((1, 32), "e4m3"), ((128, 128), "e5m2"), ((128, 128), "e5m6")):
        w = quantize(varied(63, 200, seed=1), tile, format=format)
        values, dy = w.dequantize(), varied(5, 63, dtype=torch.bfloat16, seed=2)
        y = fp8_matmul(x, w)
        assert relative_error(y, quantize(x.detach()).dequantize() @ values.T) < 2 * BF16_UNIT
        (dx,) = torch.autograd.grad(y, x, dy)
        assert relative_error(dx, rounded(dy, (1, 128), amax_min=SMALLEST_AMAX).float() @ values) < 2 * BF16_UNIT


@pytest.mark.parametrize("ends", [None, torch.tensor([5, 12])])
def test_autocast_leaves_fp32_products_alone(ends: Tensor | None) -> None:
    """Their operands have FP32 scales, which BF16 does not hold. Backward runs inside of autocast here, too."""
    x, w = torch.randn(12, 200, requires_grad=True), torch.randn(*([] if ends is None else [2]), 7, 200)

    def outcome() -> list[Tensor]:
        y = fp8_matmul(x, w.requires_grad_(), scale="fp32", ends=ends)
        return [y.detach(), *torch.autograd.grad(y.sum(), (x, w))]

    want = outcome()
    with torch.autocast("cpu", torch.bfloat16):
        got = outcome()
    assert all(map(torch.equal, got, want))


def test_sizes_of_zero_and_a_vector() -> None:
    for m, n, k in ((0, 8, 128), (4, 0, 128), (4, 8, 0)):
        x, w = torch.randn(m, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
        y = fp8_matmul(x, w)
        assert y.shape == (m, n) and (y == 0).all()
        dx, dw = torch.autograd.grad(y.sum(), [x, w])
        assert dx.shape == (m, k) and dw.shape == (n, k)
    x, w = torch.randn(300, requires_grad=True), torch.randn(8, 300)
    y = fp8_matmul(x, w)
    assert y.shape == (8,) and torch.equal(y, fp8_matmul(x[None], w)[0])
    assert torch.autograd.grad(y.sum(), x)[0].shape == (300,)


def test_what_cannot_be_multiplied_is_refused() -> None:
    x, w = torch.randn(4, 128, requires_grad=True), torch.randn(8, 128)
    for words, operands, options in (
        ("x is torch.float64; want float32, bfloat16 or float16", (x.double(), w), {}),
        ("w is torch.int64", (x, w.long()), {}),
        ("x is [4, 64], w [8, 128], ends None; want x [..., k] and w [o, k]", (x[:, :64], w), {}),
        ("want x [..., k] and w [o, k]", (x, w[None]), {}),
        ("with ends [e]", (x, w[None]), {"ends": torch.tensor([2, 4])}),
        ("scale='e8m0' is unknown", (x, w), {"scale": "e8m0"}),
        ("grad_format='e3m4' is unknown", (x, w), {"grad_format": "e3m4"}),
        ("saved_format='e5m7' is unknown", (x, w), {"saved_format": "e5m7"}),
        ("x is quantized in tiles of 128x128; want 1x128: quantize(x)", (quantize(x, (128, 128)), w), {}),
        *(("are on cpu, meta; want one device", (x, other), {}) for other in (w.to("meta"), quantize(w.to("meta")))),
        *(
            ("do not cut 4 rows", (x, w.expand(len(ends), -1, -1)), {"ends": torch.tensor(ends)})
            for ends in ([2, 3], [3, 2, 4], [-1, 4, 4])
        ),
    ):
        assert words in refusal(fp8_matmul, *operands, **options)
    for other in (x[:2], x.to("meta")):
        assert "want equal shapes on one device" in refusal(fp8_swiglu_matmul, other, x, w)
    for y in (fp8_matmul(x, w), fp8_swiglu_matmul(x, x, w)):
        with pytest.raises(ValueError, match="create_graph=True wants second derivatives"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)


# --- gradients next to the same computation written out


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
    # rows of every other expert are small: in one tile with the large ones of another they would be flushed to zero
    share = (1e-5 ** (torch.arange(e) % 2)).repeat_interleave(torch.tensor(sizes))[:, None].to(dtype)
    x = (varied(rows, k, dtype=dtype, seed=seed) * share).requires_grad_()
    w = varied(e, n, k, seed=seed + 1).requires_grad_()
    dy = varied(rows, n, dtype=dtype, seed=seed + 2) * share
    y = fp8_matmul(x, w, ends=ends)
    dx, dw = torch.autograd.grad(y, [x, w], dy)
    alone = [
        (part, *torch.autograd.grad(part, [rows_in, w_in], g))
        for rows_in, w_in, g in zip(x.split(sizes), w, dy.split(sizes), strict=True)
        for part in [fp8_matmul(rows_in, w_in)]
    ]
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    tolerance = rounding(unit) + rounding(FP32_UNIT, terms=200)
    for size, *got, want in zip(sizes, y.split(sizes), dx.split(sizes), dw, alone, strict=True):
        for a, b in zip(got, want, strict=True) if size else ():
            assert relative_error(a, b) < tolerance
        assert size or not got[2].any()


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
