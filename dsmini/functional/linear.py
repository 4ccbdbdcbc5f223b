"""Matrix product with a weight: y = x W^T. The weight is a tensor, or FP8 codes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from dsmini import ops
from dsmini.numerics import QuantizedTensor, number_dtype, quantize

Weight = Tensor | QuantizedTensor


def _cost(x: Tensor, weight: Weight) -> ops.Cost:
    rows, (o, i) = math.prod(x.shape[:-1]), weight.shape
    return ops.Cost(x.nbytes + weight.nbytes, rows * o * x.element_size(), 2 * rows * o * i, rows, number_dtype(weight))


@ops.operation("linear", cost=_cost)
def linear(x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*batch o"]:
    """Return x W^T, computed in x's dtype. The weight may have another dtype."""
    _check(x, weight)
    return einsum(x, weight.to(x.dtype), "... i, o i -> ... o")


@linear.eager
def _(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return F.linear(x, weight.to(x.dtype))


@ops.operation("quantized_linear", cost=_cost)
def quantized_linear(x: Float[Tensor, "*batch i"], weight: QuantizedTensor) -> Float[Tensor, "*batch o"]:
    """Return x W^T for a weight that is held as codes: its values in x's dtype, multiplied in x's dtype."""
    return einsum(x, weight.dequantize(x.dtype), "... i, o i -> ... o")


@quantized_linear.eager
def _(x: Tensor, weight: QuantizedTensor) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype))


def quantize_once(x: Tensor | QuantizedTensor, *readers: nn.Module | None) -> Any:
    """Return x quantized for all that read it, if each of them multiplies codes; else as it is.

    Readers that are None do not count. Where another module takes the place of one of them, all get x itself, and the
    others quantize it on their own, to the same codes.
    """
    every = all(getattr(reader, "reads_codes", False) for reader in readers if reader is not None)
    return quantize(x) if every and isinstance(x, Tensor) else x


def _check(x: Tensor, weight: Tensor) -> None:
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            fix = f"multiply codes by nn.FP8Linear, or {name}.dequantize()"
            raise ValueError(f"{name} is a {type(given).__name__}, want a tensor; {fix}")
    if x.shape[-1:] != weight.shape[-1:]:
        raise ValueError(f"x is {tuple(x.shape)}, want [..., {weight.shape[-1]}], as wide as the layer's input")


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """Return x W^T in x's dtype."""
    return linear(x, weight) if isinstance(weight, Tensor) else quantized_linear(x, weight)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight's numbers in dtype."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)
