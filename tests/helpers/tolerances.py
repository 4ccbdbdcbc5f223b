"""How far apart two right computations of the same thing may be.

Errors are measured over a whole tensor, |got - want| / |want|. Rounding to a type moves a number by at most the type's
unit roundoff u, half a step: u = 2^-p for a significand of p bits. A sum of k terms rounds k times; the errors point
in random directions and grow with sqrt(k) (Higham and Mary 2019), and so do those of chained operations. SAFETY covers
what this leaves out: sums that cancel, a softmax that magnifies, a norm that divides.
"""

import math

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
    """Relative error of `chained` operations after one another, each a sum of `terms` products."""
    return SAFETY * unit * math.sqrt(terms * chained)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in FP64; |got| where want is zero."""
    got, want = got.detach().double(), want.detach().double()
    size = want.norm().item()
    return (got - want).norm().item() / (size or 1.0)


def calc_diff(got: Tensor, want: Tensor) -> float:
    """DeepGEMM's measure, 1 - 2 sum(xy) / sum(x^2 + y^2), in FP64: about half the square of the relative error."""
    got, want = got.detach().double(), want.detach().double()
    return (1 - 2 * (got * want).sum() / (got.square() + want.square()).sum()).item()


# Two right ways through a whole small model in FP32: sums of at most 48 terms, some 20 of them chained in each of its
# two blocks and up to two of multi-token prediction.
FP32_MODEL = rounding(FP32_UNIT, terms=48, chained=80)
# One layer reading a cache that was rounded once: its keys move the softmax, its values the sum.
BF16_CACHE = rounding(BF16_UNIT, chained=2)
E4M3_UNIT = 2.0**-4
E4M3_CACHE = rounding(E4M3_UNIT, chained=2)


def moved_codes(difference: float) -> float:
    """Relative error of an operand in E4M3 that had this relative error before it was rounded.

    A code is a step from its neighbour, 2^-3 at most of its value. So the share difference / 2^-3 of the codes moves,
    each by 2^-3, and the error is the square root of the product.
    """
    return SAFETY * math.sqrt(difference * 2 * E4M3_UNIT)
