"""Muon's iterations bring singular values near 1, and the versions of the update agree."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini.measure.costs import cost_of
from dsmini.ops import Call
from dsmini.training.muon import HALLEY, JORDAN, MuonMatrices, NewtonSchulz, orthogonalize

STEPS = pytest.mark.parametrize("steps", [JORDAN, HALLEY], ids=["jordan", "halley"])


def test_each_halley_step_is_the_best_on_what_the_one_before_leaves() -> None:
    """It maps the interval [low, 1] onto [new low, 1], touches 1 inside, and ends at 1."""
    low = 1e-3
    for a, b, c in HALLEY.coefficients:
        x = torch.logspace(math.log10(low), 0, 100_001, dtype=torch.float64)
        y = x * (a + b * x**2) / (1 + c * x**2)
        assert y.max() <= 1 + 1e-9 and abs(y[-1] - 1) < 1e-9
        assert y[:50_000].max() > 1 - 1e-6
        assert abs(y.min() - y[0]) < 1e-9, "the ends of the interval are its worst places"
        low = y[0].item()
    assert low > 0.96


def spectrum(steps: NewtonSchulz, values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the singular values that the steps make of these."""
    n = len(values)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2))
    g = ((u * values) @ v).to(dtype)
    return torch.linalg.svdvals(orthogonalize(g[None], steps)[0].double())


def test_steps_bring_singular_values_near_1() -> None:
    """Two of Halley's steps come closer than five of Jordan's, for singular values whose squares add up to 1."""
    for steps, low, least in ((JORDAN, 0.0021, 0.68), (JORDAN, 0.003, 0.68), (HALLEY, 0.001, 0.96)):
        small = torch.logspace(math.log10(low), -1, 39, dtype=torch.float64)
        values = spectrum(steps, torch.cat([small, (1 - small.square().sum()).sqrt()[None]]))
        assert values.min() >= least and values.max() <= (1.21 if steps is JORDAN else 1 + 1e-9)


def test_halley_in_fp32_holds_its_bound_where_it_is_hardest() -> None:
    """One or some large values, and all others at the lower end of the interval, where X X^T rounds most."""
    for n, large, low in ((4, 1, 1e-3), (33, 1, 1.001e-3), (64, 2, 1e-3), (192, 1, 1e-3), (96, 48, 2e-3)):
        small = torch.full((n - large,), low, dtype=torch.float64)
        values = torch.cat([((1 - small.square().sum()) / large).sqrt().expand(large), small])
        got = spectrum(HALLEY, values, torch.float32)
        assert got.min() >= 0.96 and got.max() <= 1 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_singular_values_stay_equal(dtype: torch.dtype) -> None:
    """All at the upper end of the interval, where rounding may lead beyond it."""
    one = torch.cat([torch.ones(1), torch.full((39,), 1e-3)]).double()
    for values in (torch.ones(40, dtype=torch.float64), one):
        assert spectrum(HALLEY, values, dtype).max() <= 1.02


@STEPS
def test_zeros_and_tiny_numbers_stay_finite(steps: NewtonSchulz) -> None:
    for size in (0.0, 1e-30, 1e-12, 1e12):
        got = orthogonalize(size * torch.randn(2, 3, 4), steps)
        assert got.isfinite().all() and bool(got.any()) == bool(size)


def test_cost_counts_half_of_the_symmetric_products() -> None:
    p = torch.zeros(2, 5, 3)
    matrices = MuonMatrices(params=[p], grads=[p], momenta=[p])
    options: Any = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "matmul_dtype": torch.float32}
    cost = cost_of(Call("muon_update", (matrices, NewtonSchulz(((1.0, 0.0, 0.0),))), options, None))
    # 3 x 3 entries, 6 of them different: sums of 5 and of 3 terms; then 3 x 5 sums of 3
    assert cost.flops == 2 * 2 * (6 * 5 + 6 * 3 + 15 * 3)
    assert (cost.read, cost.written) == (3 * p.nbytes, 2 * p.nbytes)
    cost = cost_of(Call("muon_update", (matrices, HALLEY), options, None))
    # X X^T and X's product as above, two inverses of 3 x 3, and of S and of all factors one product of 6 entries each
    assert cost.flops == 2 * 2 * (6 * 5 + 15 * 3 + 2 * 6 * 3) + 2 * 2 * 27
