"""Matrix product with a weight: y = x W^T."""

import math

import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from dsmini import ops


def _cost(x: Tensor, weight: Tensor) -> ops.Cost:
    rows, (o, i) = math.prod(x.shape[:-1]), weight.shape
    return ops.Cost(x.nbytes + weight.nbytes, rows * o * x.element_size(), 2 * rows * o * i)


@ops.operation("linear", cost=_cost)
def linear(x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*batch o"]:
    """Return x W^T, computed in x's dtype whatever dtype the weight is stored in."""
    _refuse_codes(x, weight)
    return einsum(x, weight.to(x.dtype), "... i, o i -> ... o")


@linear.eager
def _(x: Tensor, weight: Tensor) -> Tensor:
    _refuse_codes(x, weight)
    return F.linear(x, weight.to(x.dtype))


def _refuse_codes(x: Tensor, weight: Tensor) -> None:
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise ValueError(
                f"{name} is a {type(given).__name__}, want a tensor; multiply codes by nn.FP8Linear, or "
                f"{name}.dequantize()"
            )
