"""FP8 products, FP8 experts and products with held codes: every backend against the reference."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.nn.fp8 import fp8_experts, quantized_experts, quantized_linear
from dsmini.numerics import WEIGHT_TILE, Accumulator, fp8_matmul, fp8_swiglu_matmul, quantize
from tests.functional.conftest import SIZES, forced
from tests.helpers.fp8 import varied
from tests.helpers.operations import routed, tied
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, moved_codes, relative_error, rounding

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EVERY_SIZE = pytest.mark.parametrize("n", SIZES)
K, O = 200, 63  # noqa: E741
"""A whole tile and a ragged one, and less than one."""


def unit_of(dtype: torch.dtype) -> float:
    return FP32_UNIT if dtype == torch.float32 else BF16_UNIT


class Layer(NamedTuple):
    """A function of floating-point tensors, what it is called with, and the relative error that it may have."""

    name: str
    run: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    tolerance: float


def layers(n: int, dtype: torch.dtype) -> list[Layer]:
    """Return every way through FP8 at n tokens."""
    single = rounding(unit_of(dtype), chained=2) + rounding(FP32_UNIT, terms=max(n, K))
    x, w = varied(n, K, dtype=dtype), varied(O, K, seed=1)
    gate, up = varied(n, K, dtype=dtype, seed=2), varied(n, K, dtype=dtype, seed=3)
    tied_codes = (torch.randint(-31, 32, (n, K)) | 1).index_fill(1, torch.tensor([0, 128]), 448).to(dtype)
    held, short = quantize(w, WEIGHT_TILE, "fp32"), Accumulator(bits=10, promote_every=None)
    found = [
        Layer("x and w", fp8_matmul, (x, w), single),
        Layer("x that lies between two codes", fp8_matmul, (tied_codes, w), single),
        Layer("quantized x", lambda x, w: fp8_matmul(quantize(x), w), (x, w), single),
        Layer("quantized w", lambda x: fp8_matmul(x, held), (x,), single),
        Layer("x kept in e5m6", lambda x, w: fp8_matmul(x, w, saved_format="e5m6"), (x, w), single),
        Layer("swiglu", fp8_swiglu_matmul, (gate, up, w), single),
        Layer("clamped swiglu", lambda *t: fp8_swiglu_matmul(*t, limit=0.5), (gate, up, w), single),
        Layer("emulated accumulator", lambda x, w: fp8_matmul(x, w, accumulator=short), (x, w), single),
        Layer("held codes", lambda x: quantized_linear(x, held), (x,), single),
    ]
    for kind, routing in routings(n).items():
        found += [layer._replace(name=f"{layer.name}, {kind}") for layer in expert_layers(n, dtype, routing)]
    return found


def routings(n: int) -> dict[str, tuple[Tensor, Tensor]]:
    few = {"few of many": routed(n, 3, 40)} if n == 1 else {}  # which are asked in turn without gradients
    return few | {
        "some experts empty": routed(n, 2, 6, empty=(0, 3, 5)),
        "one expert": routed(n, 1, 6, empty=(0, 1, 3, 4, 5)),
        "tied scores": tied(n, 2),
    }


def stacked(m: int = 200, f: int = 136, e: int = 6) -> list[Tensor]:
    return [torch.randn(e, *size).mul(size[1] ** -0.5) for size in ((f, m), (m, f), (f, m))]


def expert_layers(n: int, dtype: torch.dtype, routing: tuple[Tensor, Tensor]) -> list[Layer]:
    indices, weights = routing
    matrices, x = stacked(e=40 if int(indices.max()) > 5 else 6), torch.randn(n, 200).to(dtype)
    held = [quantize(w, WEIGHT_TILE, "fp32") for w in matrices]
    mixed = [held[0], matrices[1].to(dtype), held[2]]
    sums = rounding(unit_of(dtype), chained=8) + rounding(FP32_UNIT, terms=max(n, 200), chained=8)
    # FP32 sums of another order move a code of the next product here and there: of hidden, of its gradient, and again
    moved = 3 * moved_codes(rounding(FP32_UNIT, terms=200))

    def native(x: Tensor, weights: Tensor) -> Tensor:
        return quantized_experts(x, indices, weights, *held)

    def some_held(x: Tensor, weights: Tensor) -> Tensor:
        return quantized_experts(x, indices, weights, *mixed)

    def fp8(x: Tensor, weights: Tensor, *w: Tensor) -> Tensor:
        return fp8_experts(quantize(x), indices, weights, *w)

    def fp8_held(x: Tensor, weights: Tensor) -> Tensor:
        return fp8_experts(quantize(x), indices, weights, *held)

    return [
        Layer("experts with held codes", native, (x, weights), sums),
        Layer("experts with some held codes", some_held, (x, weights), sums),
        Layer("FP8 experts", fp8, (x, weights, *matrices), sums + moved),
        Layer("FP8 experts with held codes", fp8_held, (x, weights), sums + moved),
    ]


def result(layer: Layer) -> list[Tensor]:
    """Return the result, and the gradient of a fixed random projection for every leaf."""
    leaves = [t.detach().requires_grad_() for t in layer.leaves]
    y = layer.run(*leaves)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    grads = torch.autograd.grad((y * direction).sum(), leaves)
    assert all(g.dtype == t.dtype for g, t in zip(grads, leaves, strict=True))
    return [y.detach(), *grads]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@EVERY_SIZE
@DTYPES
def test_layers_equal_reference(dtype: torch.dtype, n: int, backend: str) -> None:
    for layer in layers(n, dtype):
        with ops.use("reference"):
            want = result(layer)
        with forced(backend):
            got = result(layer)
            with torch.no_grad():  # some versions take another way there
                got_without = layer.run(*layer.leaves)
        for part, (a, b) in enumerate(zip(got, want, strict=True)):
            # a routing weight's gradient is the product of y and the direction: one number, which may be near zero
            cancels = part == 2 and "experts" in layer.name
            error = relative_error(a, b) * (b.norm() / max(b.norm(), want[0].norm())).item() ** cancels
            assert error <= layer.tolerance, f"{layer.name}, part {part}: {error:.1e} > {layer.tolerance:.1e}"
        assert relative_error(got_without, want[0]) <= layer.tolerance, layer.name
