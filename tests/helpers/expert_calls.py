"""Calls of the routed experts, their exact results, and the error that a kernel may have."""

from typing import Any

import torch
from torch import Tensor

from dsmini.functional.experts import experts
from dsmini.numerics import WEIGHT_TILE, quantize
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, rounding

SHAPES = ((1, 33, 7, 4, 2), (40, 130, 63, 8, 3), (300, 64, 65, 5, 2), (130, 257, 31, 40, 4), (7, 1, 1, 1, 1))
"""Tokens, widths of the model and of an expert, experts, and those that a token chooses."""


def weight_in(dtype: str, *shape: int) -> Any:
    w = torch.randn(shape) / shape[-1] ** 0.5
    return quantize(w, WEIGHT_TILE) if dtype == "fp8" else w.to(getattr(torch, dtype))


def dense(w: Any) -> Tensor:
    return w.double() if isinstance(w, Tensor) else w.dequantize().double()


def a_call(n: int, m: int, f: int, e: int, k: int, dtype: torch.dtype, weights: str) -> tuple[Any, ...]:
    """Return the arguments of `experts`; with four experts or more the last is chosen by nobody."""
    chosen = torch.stack([torch.randperm(e - (e > 3))[:k] for _ in range(n)])
    matrices = (weight_in(weights, e, *shape) for shape in ((f, m), (m, f), (f, m)))
    return (
        *(torch.randn(n, m).to(dtype), chosen, torch.rand(n, k) - 0.3),
        *(chosen.flatten().bincount(minlength=e), *matrices),
    )


def exact(x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, *matrices: Any) -> Tensor:
    return experts.reference(x.double(), indices, weights.double(), counts, *map(dense, matrices))


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Return the error of three chained products, whose operands and results are rounded once each."""
    sums = rounding(FP32_UNIT, terms=terms, chained=3)
    return sums if dtype == torch.float32 else sums + rounding(BF16_UNIT, chained=3)
