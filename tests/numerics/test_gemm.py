"""The simulated FP8 product against its operands multiplied in FP64, and against the unquantized product."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.numerics import AMAX_MIN, SMALLEST_AMAX, Accumulator, fp8_matmul, fp8_swiglu_matmul, quantize, round_tiles
from tests.conftest import require_cpu_kernels
from tests.helpers.configs import refusal
from tests.helpers.fp8 import QUANTISED, SIMULATED, Scale, rounded, varied
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, calc_diff, relative_error, rounding

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
    for words, given, options in (
        ("x is torch.float64; want float32, bfloat16 or float16", (x.double(), w), {}),
        ("w is torch.int64", (x, w.long()), {}),
        ("x is [4, 64], w [8, 128], ends None; want x [..., k] and w [o, k]", (x[:, :64], w), {}),
        ("want x [..., k] and w [o, k]", (x, w[None]), {}),
        ("with ends [e]", (x, w[None]), {"ends": torch.tensor([2, 4])}),
        ("scale='e8m0' is unknown", (x, w), {"scale": "e8m0"}),
        ("grad_format='e3m4' is unknown", (x, w), {"grad_format": "e3m4"}),
        ("saved_format='e5m7' is unknown", (x, w), {"saved_format": "e5m7"}),
        ("x is quantized in tiles of 128x128; want 1x128: quantize(x)", (quantize(x, (128, 128)), w), {}),
        ("not with ends", (x, w[None]), {"ends": torch.tensor([4]), "accumulator": Accumulator()}),
        *(("are on cpu, meta; want one device", (x, other), {}) for other in (w.to("meta"), quantize(w.to("meta")))),
        *(
            ("do not cut 4 rows", (x, w.expand(len(ends), -1, -1)), {"ends": torch.tensor(ends)})
            for ends in ([2, 3], [3, 2, 4], [-1, 4, 4])
        ),
    ):
        assert words in refusal(fp8_matmul, *given, **options)
    for other in (x[:2], x.to("meta")):
        assert "want equal shapes on one device" in refusal(fp8_swiglu_matmul, other, x, w)
    for bits, every in ((14.5, 128), (1, 128), (14, 100)):
        said = refusal(Accumulator, bits=bits, promote_every=every)
        assert said.startswith(f"promote_every={every}" if bits == 14 else f"bits={bits}")
    for a, b in ((x, w[:, :1]), (x[:, :33], w[:, :64])):  # torch would stretch a single column
        want = f"a is {list(a.shape)}, b is {list(b.shape)}; want [n, k] and [m, k]"
        assert refusal(Accumulator().matmul, a, b) == want
    for y in (fp8_matmul(x, w), fp8_swiglu_matmul(x, x, w)):
        with pytest.raises(ValueError, match="create_graph=True wants second derivatives"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)
