"""Muon's update in C++ agrees with its reference, on every instruction set."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.training.muon import HALLEY, JORDAN, V4, MuonMatrices, NewtonSchulz, muon_update
from dsmini_kernels import Unserved, cpu
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.kernels.conftest import assert_threads_change_no_bit

STEPS = {"jordan": JORDAN, "halley": HALLEY, "v4": V4}
ONES: list[list[tuple[int, ...]]] = [[(1, 1)], [(1, 7)], [(7, 1)], [(5, 17)], [(17, 5)], [(64, 64)], [(33, 65)]]
SHAPES: list[list[tuple[int, ...]]] = [
    *ONES,
    [(63, 130), (130, 63), (2, 63, 130), (3, 130, 63)],
    [(4, 40, 16), (16, 40), (1, 16, 40), (40, 16)],
]
pytestmark = pytest.mark.usefixtures("library", "without_gradients")
HOW: dict[str, Any] = {"lr": 0.07, "momentum": 0.9, "weight_decay": 0.3}


def matrices_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, k: int = 0) -> MuonMatrices:
    """Return matrices whose singular values spread over two powers of ten; in the k-th a stack has an idle expert."""
    draw = torch.Generator().manual_seed(k)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=draw) * torch.logspace(0, -2, shape[-1])

    grads = [numbers(shape) for shape in shapes]
    for grad in grads:
        if grad.dim() > 2 and len(grad) > 1:
            grad[k % len(grad)] = 0
    params, momenta = ([numbers(shape).to(dtype) for shape in shapes] for _ in range(2))
    return MuonMatrices(params=params, grads=[grad.to(dtype) for grad in grads], momenta=momenta)


def copy_of(given: MuonMatrices, dtype: torch.dtype | None = None) -> MuonMatrices:
    def copies(all_of: Any) -> list[Tensor]:
        return [x.clone().to(dtype or x.dtype) for x in all_of]

    return MuonMatrices(params=copies(given.params), grads=copies(given.grads), momenta=copies(given.momenta))


def updated(
    given: MuonMatrices, steps: NewtonSchulz, backend: str = "cpu", dtype: torch.dtype = torch.float32
) -> MuonMatrices:
    """Return the matrices after one update, in products of this dtype."""
    new = copy_of(given)
    with ops.use(backend):
        muon_update(new, steps, **HOW, matmul_dtype=dtype)
    return new


def exactly(given: MuonMatrices, steps: NewtonSchulz) -> MuonMatrices:
    return updated(copy_of(given, torch.float64), steps, "reference", torch.float64)


def moves(after: MuonMatrices, before: MuonMatrices) -> list[Tensor]:
    return [a.double() - b.double() * (1 - 0.07 * 0.3) for a, b in zip(after.params, before.params, strict=True)]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_fp32_update_is_the_reference(isa: str, shapes: list[tuple[int, ...]], steps: str) -> None:
    given = matrices_of(shapes)
    got, want = updated(given, STEPS[steps]), exactly(given, STEPS[steps])
    # three products a step, and small singular values are magnified by at most the product of all a, errors with them
    magnified = math.prod(a for a, _, _ in STEPS[steps].coefficients)
    if STEPS[steps].rational and shapes[0][-1] == shapes[0][-2]:
        # singular values near 0, whose squares FP32 does not hold: a square is magnified by that of the first a
        magnified = STEPS[steps].coefficients[0][0] ** 2 / 15**0.5
    products = magnified * rounding(
        FP32_UNIT, terms=max(max(shape[-2:]) for shape in shapes), chained=max(15, 3 * len(STEPS[steps].coefficients))
    )
    for a, b in zip(moves(got, given), moves(want, given), strict=True):
        assert relative_error(a, b) <= products
    for m, wanted in zip(got.momenta, want.momenta, strict=True):
        assert relative_error(m, wanted) <= rounding(FP32_UNIT, chained=3)


@pytest.mark.parametrize("steps", ["jordan", "halley"])  # V4's ten steps bring rounding errors to 1 too
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_matrices_of_low_rank_keep_their_directions(isa: str, rank: int, steps: str) -> None:
    """An expert with few tokens has such a momentum. Rounding, magnified a thousand times, stays small next to them."""
    torch.manual_seed(rank)
    for sizes in (((96, 130), (130, 96)), ((64, 64),)):
        grads = [torch.randn(o, rank) @ torch.randn(rank, i) for o, i in sizes]
        zeros = [torch.zeros_like(grad) for grad in grads]
        given = MuonMatrices(params=zeros, grads=grads, momenta=[grad.clone() for grad in grads])
        got, want = updated(given, STEPS[steps]), exactly(given, STEPS[steps])
        for a, b in zip(got.params, want.params, strict=True):
            assert relative_error(a, b) < 2e-3


def test_halley_brings_singular_values_near_1(isa: str) -> None:
    """Singular values above a thousandth of the norm end between 0.96 and 1, also next to a few 1000 times larger."""
    torch.manual_seed(0)
    for o, i in ((33, 66), (128, 192)):
        left, right = (torch.linalg.qr(torch.randn(n, o, dtype=torch.float64))[0] for n in (o, i))
        for low, large in ((1.001e-3, 1), (1.001e-3, 2), (2e-3, 1), (1e-2, o // 2)):
            values = torch.full((o,), low, dtype=torch.float64)
            values[:large] = ((1 - (o - large) * low**2) / large) ** 0.5
            grad = (left * values @ right.T).float()
            new = MuonMatrices(params=[torch.zeros(o, i)], grads=[grad], momenta=[torch.zeros(o, i)])
            with ops.use("cpu"):
                muon_update(new, HALLEY, lr=1, momentum=0, weight_decay=0, matmul_dtype=torch.float32)
            got = torch.linalg.svdvals(new.params[0].double())
            assert got.min() > 0.96 and got.max() < 1.001, (o, i, low, large)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shapes", [s for s in SHAPES if min(s[0]) > 1], ids=str)
def test_bf16_update_is_as_exact_as_torchs(isa: str, shapes: list[tuple[int, ...]], steps: str) -> None:
    """Its operands are BF16, or FP32 where the CPU multiplies no BF16. Matrices of one row are too few numbers for
    comparing errors, which are chance.
    """
    given = matrices_of(shapes)
    want = moves(exactly(given, STEPS[steps]), given)
    got = moves(updated(given, STEPS[steps], dtype=torch.bfloat16), given)
    torchs = moves(updated(given, STEPS[steps], "eager", torch.bfloat16), given)
    for a, b, wanted in zip(got, torchs, want, strict=True):
        assert relative_error(a, wanted) <= 2 * relative_error(b, wanted) + rounding(BF16_UNIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_stay_apart(isa: str, dtype: torch.dtype) -> None:
    """A matrix moves as it does alone, bit for bit, whatever is next to it and however many threads there are."""
    shapes = [(3, 65, 96), (65, 96), (96, 65), (40, 96, 65)]  # enough for all threads to join
    given = matrices_of(shapes)

    def update() -> list[Tensor]:
        new = updated(given, HALLEY, dtype=dtype)
        return [*new.params, *new.momenta, *new.grads]

    together = assert_threads_change_no_bit(update)
    for j in range(len(shapes)):
        lone = MuonMatrices(params=[given.params[j]], grads=[given.grads[j]], momenta=[given.momenta[j]])
        alone = updated(lone, HALLEY, dtype=dtype)
        for got, want in zip(together[j :: len(shapes)], (*alone.params, *alone.momenta, *lone.grads), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_spoils_its_matrix_alone(isa: str, bad: float, dtype: torch.dtype) -> None:
    given = matrices_of([(3, 33, 40), (40, 33)], k=2)
    before = updated(given, HALLEY, dtype=dtype)
    given.grads[0][1, 32, 39] = bad
    got = updated(given, HALLEY, dtype=dtype)
    assert not got.params[0][1].isfinite().any()
    for where in ((0, 0), (0, 2)):
        assert torch.equal(got.params[0][where[1]], before.params[0][where[1]])
    assert torch.equal(got.params[1], before.params[1])


def test_zeros_move_nothing(isa: str) -> None:
    """A matrix of its own without gradient and momentum, and experts of a stack without gradient."""
    zero = MuonMatrices(params=[torch.randn(5, 9)], grads=[torch.zeros(5, 9)], momenta=[torch.zeros(5, 9)])
    idle = MuonMatrices(params=[torch.randn(2, 5, 9)], grads=[torch.zeros(2, 5, 9)], momenta=[torch.randn(2, 5, 9)])
    for given in (zero, idle):
        got = updated(given, HALLEY)
        assert relative_error(got.params[0], given.params[0] * (1 - 0.07 * 0.3)) <= rounding(FP32_UNIT, chained=2)
        assert relative_error(got.momenta[0], given.momenta[0] * 0.9) <= rounding(FP32_UNIT, chained=2)


def test_without_running_nothing_moves() -> None:
    """Steps are counted so, for a forecast."""
    given = matrices_of([(4, 6)])
    with cpu.without_running():
        assert torch.equal(updated(given, JORDAN).params[0], given.params[0])
    assert not torch.equal(updated(given, JORDAN).params[0], given.params[0])


def test_a_graph_of_old_parameters_is_refused() -> None:
    """As after a step of torch's own optimizers: its gradient would mix old activations and new parameters."""
    given, x = matrices_of([(4, 6)], torch.float32), torch.randn(6, requires_grad=True)
    with torch.enable_grad():
        y = (given.params[0].requires_grad_() @ x).sum()
    cpu.muon_update(given, JORDAN, **HOW, matmul_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_rest_of_momentum_moves_a_matrix_of_its_own(isa: str) -> None:
    given = MuonMatrices(params=[torch.randn(5, 9)], grads=[torch.zeros(5, 9)], momenta=[torch.randn(5, 9)])
    assert moves(updated(given, JORDAN), given)[0].norm() > 0.07


def test_what_is_not_served_says_why() -> None:
    def call(dtype: torch.dtype = torch.float32, products: torch.dtype = torch.float32, **changes: Any) -> None:
        given = matrices_of([(4, 6)], dtype)
        cpu.muon_update(dataclasses.replace(given, **changes), JORDAN, **HOW, matmul_dtype=products)

    call()
    large = torch.zeros(513, 512)
    for reason, options in (
        (r"products in torch.float64", {"products": torch.float64}),
        (r"torch.float64 on cpu", {"dtype": torch.float64}),
        (r"not contiguous", {"grads": [torch.randn(6, 4).T]}),
        (r"shape \[4, 5\] for a parameter of \[4, 6\]", {"momenta": [torch.randn(4, 5)]}),
        (r"^$", {"params": [large], "grads": [large], "momenta": [large]}),
        (r"a matrix of 2 x 65537", {key: [torch.zeros(2, 65537)] for key in ("params", "grads", "momenta")}),
    ):
        with pytest.raises(Unserved, match=reason):
            call(**options)
