"""An accumulator of few bits loses bits of a sum, and promotion into FP32 mends that."""

import torch
from torch import Tensor

from dsmini.numerics import Accumulator, fp8_matmul, quantize
from tests.helpers.fp8 import varied
from tests.helpers.tolerances import FP32_UNIT, SAFETY, relative_error, rounding


def test_14_bits_without_promotion_lose_two_percent() -> None:
    """Check sections 3.3.2 and 3.5.2: an error of nearly 2 % at K = 4096."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 4096, generator=generator), torch.randn(128, 4096, generator=generator)
    a, b = (quantize(t).dequantize() for t in (a, b))
    exact = a.double() @ b.double().T

    def error(y: Tensor) -> float:
        return ((y.double() - exact).abs().max() / exact.abs().mean()).item()

    assert 0.01 < error(Accumulator(bits=14, promote_every=None).matmul(a, b)) < 0.03
    assert error(Accumulator(bits=14, promote_every=128).matmul(a, b)) < 0.002
    assert error(Accumulator(bits=24, promote_every=None).matmul(a, b)) < 5e-6


def test_accumulator_serves_all_three_products() -> None:
    x, w = varied(70, 256).requires_grad_(), varied(40, 256, seed=1).requires_grad_()
    dy = varied(70, 40, seed=2)

    def run(accumulator: Accumulator | None) -> list[Tensor]:
        y = fp8_matmul(x, w, accumulator=accumulator)
        return [y, *torch.autograd.grad(y, [x, w], dy)]

    short = Accumulator(bits=8, promote_every=None)
    for plain, wide, narrow in zip(run(None), run(Accumulator(bits=24)), run(short), strict=True):
        assert relative_error(wide, plain) < rounding(FP32_UNIT, terms=256)
        # truncation to 8 bits loses up to 2^-7 of a partial sum, again and again
        assert 2.0**-10 < relative_error(narrow, plain) < SAFETY * 2.0**-7 * 8


LAST, LOST = 2.0**-13, 2.0**-14
"""The last of 14 bits next to 1, and the bit below it."""
SMALL, SMALLER = 3 * 2.0**-15, 2.0**-15
"""Lost next to 1, but not in another partial sum."""
# the numbers of a row by their places, the sum that the accumulator makes of it, and its options
SUMS = [
    # the last of the first n is lost next to 1, and the first of the next n is not
    *(({0: 1.0, n - 1: SMALLER, n: SMALL}, 1 + SMALL, {"promote_every": n}) for n in (32, 64, 96, 128)),
    ({64: 1.0, 127: SMALLER, 128: SMALL}, 1 + SMALL, {"promote_every": 64}),
    # the rest at the end is added too, also for a width that is not a multiple of 32
    ({0: 1.0, 69: SMALL}, 1 + SMALL, {"promote_every": 64, "width": 70}),
    ({0: 1.0, 64: SMALL}, 1, {}),
    # two together would count, each alone is lost: the products next to a large partial sum,
    ({0: 1.0, 32: LOST, 33: LOST}, 1, {}),
    ({0: 1.0, 32: LAST, 33: LOST}, 1 + LAST, {}),
    # the partial sum next to a large product,
    ({0: LOST, 32: 1.0, 33: LAST}, 1 + LAST, {}),
    ({0: LAST + LOST, 32: 1.0, 64: LOST}, 1 + LAST, {}),
    ({0: LOST, 32: 1.0, 33: -1.0}, 0, {}),
    # and both lose the last bit of a sum that grows by one: truncation towards zero for both signs
    ({0: 1.0, 32: 1.0, 33: LAST}, 2, {"width": 64}),
    ({0: 1.0, 1: 1.0, 2: 2 * LAST}, 2 + 2 * LAST, {}),
    ({0: -1.0, 32: -LOST, 33: -LOST}, -1, {}),
    ({0: -1.0, 32: -1.0, 33: -LAST}, -2, {}),
]


def test_bits_are_lost_next_to_the_largest_of_32_products_and_of_a_partial_sum() -> None:
    for values, want, options in SUMS:
        a = torch.zeros(1, options.get("width", 160))
        for place, value in values.items():
            a[0, place] = value
        accumulator = Accumulator(bits=14, promote_every=options.get("promote_every"))
        assert accumulator.matmul(a, torch.ones_like(a)).item() == want, (values, options)
