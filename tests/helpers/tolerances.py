"""Tolerances between two correct computations of the same value.

Errors are measured over a whole tensor, |got - want| / |want|. Rounding to a type moves a number by at most the type's
unit roundoff u, half a step: u = 2^-p for a significand of p bits. A sum of k terms rounds k times. The errors point in
random directions and grow with sqrt(k) (Higham and Mary 2019), also over chained operations. SAFETY covers the rest:
sums that cancel, a softmax that magnifies, a norm that divides.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BF16_UNIT = 2.0**-8
FP32_UNIT = 2.0**-24
FP64_UNIT = 2.0**-53
SAFETY = 4.0

# Tables of cos and sin are FP32 also in an FP64 model. A frequency theta^(-x) carries about (2 + x ln theta) u, at most
# 12 u; the first pair's is exactly 1 and the others' angles are smaller, so at position 40 an angle is off by
# less than 40 * 12 u / theta^(2/8) = 2.9e-6.
ROPE_TABLE = 3e-6

# An FP64 quantity counts as unmoved below this share of itself and as moved above MOVED: far from either side, sums of
# FP64 numbers differ by some 1e-14 and a changed token by 1e-3.
UNMOVED = 1e-11
MOVED = 1e-7


def rounding(unit: float, terms: int = 1, chained: int = 1) -> float:
    """Return the relative error of `chained` consecutive operations, each a sum of `terms` products."""
    return SAFETY * unit * math.sqrt(terms * chained)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want| in FP64, or |got| if want is zero."""
    got, want = got.detach().double(), want.detach().double()
    size = want.norm().item()
    return (got - want).norm().item() / (size or 1.0)


def assert_agree(got: Tensor, want: Tensor, wrt: Sequence[Tensor], tolerance: float) -> None:
    """Check that two results agree, and the gradients of a random projection of them."""
    assert relative_error(got, want) <= tolerance
    direction = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * direction).sum(), wrt) for y in (got, want)]
    for a, b in zip(*gradients, strict=True):
        # next to a single key a query has no gradient, but noise of 1e-16
        assert relative_error(a, b) <= tolerance or max(a.norm(), b.norm()) < 1e-9


def calc_diff(got: Tensor, want: Tensor) -> float:
    """Return DeepGEMM's measure 1 - 2 sum(xy) / sum(x^2 + y^2) in FP64, about half the squared relative error."""
    got, want = got.detach().double(), want.detach().double()
    return (1 - 2 * (got * want).sum() / (got.square() + want.square()).sum()).item()


# Two correct ways through a whole small model in FP32: sums of at most 48 terms, some 20 of them chained in each of its
# two blocks and up to two of multi-token prediction.
FP32_MODEL = rounding(FP32_UNIT, terms=48, chained=80)
# One layer reading a cache that was rounded once: its keys move the softmax, its values the sum.
BF16_CACHE = rounding(BF16_UNIT, chained=2)
E4M3_UNIT = 2.0**-4
E4M3_CACHE = rounding(E4M3_UNIT, chained=2)


def moved_codes(difference: float) -> float:
    """Return the relative error of an operand in E4M3 that had this relative error before rounding.

    Neighbouring codes are at most 2^-3 of their value apart. A share difference / 2^-3 of the codes moves, each by
    2^-3, and the error is the square root of the product.
    """
    return SAFETY * math.sqrt(difference * 2 * E4M3_UNIT)
