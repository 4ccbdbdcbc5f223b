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
    assert error(a @ b.T) < 5e-6


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


def test_products_are_aligned_to_the_largest_of_32() -> None:
    a = torch.zeros(1, 64)
    a[0, 0], a[0, 1], a[0, 40] = 1.0, 2.0**-14, 2.0**-14
    ones = torch.ones(1, 64)
    assert Accumulator(bits=14, promote_every=None).matmul(a, ones).item() == 1.0
    assert Accumulator(bits=14, promote_every=32).matmul(a, ones).item() == 1.0 + 2.0**-14
    assert Accumulator(bits=15, promote_every=None).matmul(a, ones).item() == 1.0 + 2.0**-13


def summed(values: dict[int, float], bits: int = 14, promote_every: int | None = None, width: int = 160) -> float:
    """Return the sum that an accumulator gives for a row with these values at these places, and zeros elsewhere."""
    a = torch.zeros(1, width)
    for place, value in values.items():
        a[0, place] = value
    return Accumulator(bits=bits, promote_every=promote_every).matmul(a, torch.ones(1, width)).item()


def test_partial_sum_is_promoted_after_n_products() -> None:
    """Check that 1 with 14 bits loses 3 x 2^-15, which counts only in another partial sum."""
    small, smaller = 3 * 2.0**-15, 2.0**-15
    # the last of the first 64 is lost next to 1, and the first of the next 64 is not
    assert summed({0: 1.0, 63: smaller, 64: small}, promote_every=64) == 1 + small
    assert summed({64: 1.0, 127: smaller, 128: small}, promote_every=64) == 1 + small
    assert summed({0: 1.0, 95: smaller, 96: small}, promote_every=96) == 1 + small
    assert summed({0: 1.0, 127: smaller, 128: small}, promote_every=128) == 1 + small
    assert summed({0: 1.0, 31: smaller, 32: small}, promote_every=32) == 1 + small
    # the rest at the end is added too, also for a width that is not a multiple of 32
    assert summed({0: 1.0, 69: small}, promote_every=64, width=70) == 1 + small
    assert summed({0: 1.0, 64: small}, promote_every=None) == 1


def test_products_and_partial_sum_align_to_the_largest() -> None:
    last, lost = 2.0**-13, 2.0**-14  # the last of 14 bits next to 1, and the bit below it
    # two together would count, each alone is lost: the products next to a large partial sum,
    assert summed({0: 1.0, 32: lost, 33: lost}) == 1
    assert summed({0: 1.0, 32: last, 33: lost}) == 1 + last
    # the partial sum next to a large product,
    assert summed({0: lost, 32: 1.0, 33: last}) == 1 + last
    assert summed({0: last + lost, 32: 1.0}) == 1 + last
    assert summed({0: last + lost, 32: 1.0, 64: lost}) == 1 + last
    assert summed({0: lost, 32: 1.0, 33: -1.0}) == 0
    # and both lose the last bit of a sum that grows by one: truncation towards zero for both signs
    assert summed({0: 1.0, 32: 1.0, 33: last}, width=64) == 2
    assert summed({0: 1.0, 1: 1.0, 2: 2 * last}) == 2 + 2 * last
    assert summed({0: -1.0, 32: -lost, 33: -lost}) == -1
    assert summed({0: -1.0, 32: -1.0, 33: -last}) == -2
