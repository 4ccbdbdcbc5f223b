"""The Hadamard transform, which spreads an outlier over a whole row before it is rounded to FP8."""

import torch
from jaxtyping import Float
from torch import Tensor

from dsmini.functional.fp32 import at_least_fp32


def hadamard(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return x H / sqrt(d), with Sylvester's matrix H of ones and minus ones. Computed in FP32, returned in x's dtype.

    H / sqrt(d) is orthogonal and its own inverse: two transformed rows have the product that they had before. With
    H_2n = [[H_n, H_n], [H_n, -H_n]] each of log2(d) steps adds and subtracts the halves of groups of 2n numbers.

    Raises: ValueError if d is not a power of two.
    """
    d = x.shape[-1]
    if d < 1 or d & (d - 1):
        raise ValueError(f"x is {tuple(x.shape)}; the Hadamard transform wants a power of two as its last dimension")
    y, n = at_least_fp32(x), 1
    while n < d:
        first, second = y.unflatten(-1, (-1, 2, n)).unbind(-2)
        y = torch.stack((first + second, first - second), -2).flatten(-3)
        n *= 2
    return (y * d**-0.5).to(x.dtype)
