"""An accumulator of few bits loses bits of a sum, and promotion into FP32 mends that."""

import tomllib
from pathlib import Path

import torch
from torch import Tensor

from docs.tutorials.accumulator import Accumulator
from dsmini.numerics import quantize
from tests.helpers.configs import refusal

SUMS = tomllib.loads(Path(__file__).with_name("sums.toml").read_text())["sum"]


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


def test_bits_are_lost_next_to_the_largest_of_32_products_and_of_a_partial_sum() -> None:
    for row in SUMS:
        a = torch.zeros(1, row.get("width", 160))
        for place, value in row["of"]:
            a[0, place] = value * 2.0**-15
        accumulator = Accumulator(bits=14, promote_every=row.get("promote_every"))
        assert accumulator.matmul(a, torch.ones_like(a)).item() == row["is"] * 2.0**-15, row


def test_a_width_or_shape_that_cannot_be_is_refused() -> None:
    x, w = torch.randn(4, 128), torch.randn(8, 128)
    for bits, every in ((14.5, 128), (1, 128), (14, 100)):
        said = refusal(Accumulator, bits=bits, promote_every=every)
        assert said.startswith(f"promote_every={every}" if bits == 14 else f"bits={bits}")
    for a, b in ((x, w[:, :1]), (x[:, :33], w[:, :64])):  # torch would stretch a single column
        want = f"a is {list(a.shape)}, b is {list(b.shape)}; want [n, k] and [m, k]"
        assert refusal(Accumulator().matmul, a, b) == want
