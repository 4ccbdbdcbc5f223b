"""Matrix product with a weight: y = x W^T. The weight is a tensor, or FP8 codes."""

import math

import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from dsmini import ops
from dsmini.numerics import QuantizedTensor


def _cost(x: Tensor, weight: Tensor | QuantizedTensor) -> ops.Cost:
    rows, (o, i) = math.prod(x.shape[:-1]), weight.shape
    return ops.Cost(x.nbytes + weight.nbytes, rows * o * x.element_size(), 2 * rows * o * i)


@ops.operation("linear", cost=_cost)
def linear(x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*batch o"]:
    """Return x W^T, computed in x's dtype. The weight may have another dtype."""
    _refuse_codes(x, weight)
    return einsum(x, weight.to(x.dtype), "... i, o i -> ... o")


@linear.eager
def _(x: Tensor, weight: Tensor) -> Tensor:
    _refuse_codes(x, weight)
    return F.linear(x, weight.to(x.dtype))


@ops.operation("quantized_linear", cost=_cost)
def quantized_linear(x: Float[Tensor, "*batch i"], weight: QuantizedTensor) -> Float[Tensor, "*batch o"]:
    """Return x W^T for a weight that is held as codes: its values in x's dtype, multiplied in x's dtype."""
    return einsum(x, weight.dequantize(x.dtype), "... i, o i -> ... o")


@quantized_linear.eager
def _(x: Tensor, weight: QuantizedTensor) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype))


def _refuse_codes(x: Tensor, weight: Tensor) -> None:
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise ValueError(
                f"{name} is a {type(given).__name__}, want a tensor; multiply codes by nn.FP8Linear, or "
                f"{name}.dequantize()"
            )
