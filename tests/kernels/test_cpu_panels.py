"""Products of many rows and routed experts in C++ agree with their references: values, gradients, where they serve."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.nn.layers import linear
from dsmini.nn.moe import experts
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import panels
from tests.helpers.decoding import WEIGHTS
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.kernels.conftest import assert_threads_change_no_bit, dense, weight_in

pytestmark = pytest.mark.usefixtures("library", "serves_all")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 33, 7, 4, 2), (40, 130, 63, 8, 3), (300, 64, 65, 5, 2), (130, 257, 31, 40, 4), (7, 1, 1, 1, 1))
"""Tokens, widths of the model and of an expert, experts, and those that a token chooses."""


def a_call(n: int, m: int, f: int, e: int, k: int, dtype: torch.dtype, weights: str) -> tuple[Any, ...]:
    """Return the arguments of `experts`; with four experts or more the last is chosen by nobody."""
    chosen = torch.stack([torch.randperm(e - (e > 3))[:k] for _ in range(n)])
    matrices = (weight_in(weights, e, *shape) for shape in ((f, m), (m, f), (f, m)))
    return torch.randn(n, m).to(dtype), chosen, torch.rand(n, k) - 0.3, *matrices


def exact(x: Tensor, indices: Tensor, weights: Tensor, *matrices: Any) -> Tensor:
    return experts.reference(x.double(), indices, weights.double(), *map(dense, matrices))


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Return the error of three chained products, whose operands and results are rounded once each."""
    sums = rounding(FP32_UNIT, terms=terms, chained=3)
    return sums if dtype == torch.float32 else sums + rounding(BF16_UNIT, chained=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_agree(isa: str, shape: tuple[int, ...], weights: str, dtype: torch.dtype) -> None:
    call = a_call(*shape, dtype, weights)  # pyright: ignore[reportArgumentType]
    got, want = cpu.experts(*call), exact(*call)
    assert got.dtype == dtype and got.shape == want.shape
    assert relative_error(got, want) < tolerance(dtype, max(shape[1:3]))
    for token in range(shape[0]):  # each row by itself: a wrong small row would not show in the norm of all
        assert relative_error(got[token], want[token]) < 4 * tolerance(dtype, max(shape[1:3]))


def test_more_tokens_than_memory_take_turns(isa: str) -> None:
    """Beyond the memory of hidden numbers and of panels, tokens are computed in turns."""
    call = a_call(2000, 8, 4096, 3, 2, torch.float32, "float32")
    assert relative_error(cpu.experts(*call), exact(*call)) < tolerance(torch.float32, 4096)
    x, w = torch.randn(700, 9000), weight_in("bfloat16", 5, 9000)
    assert relative_error(cpu.quantized_linear(x, w), x.double() @ w.double().T) < rounding(FP32_UNIT, terms=9000)


def test_threads_change_no_bit(isa: str) -> None:
    for dtype, weights in ((torch.bfloat16, "bfloat16"), (torch.float32, "fp8")):
        call = a_call(150, 96, 70, 6, 2, dtype, weights)
        held = [weight_in(kind, 370, 96) for kind in WEIGHTS]  # rows of some are converted, in memory of the thread

        def run(call: Any = call, held: Any = held) -> list[Tensor]:
            return [cpu.experts(*call), *(cpu.quantized_linear(call[0], w) for w in held)]

        assert_threads_change_no_bit(run)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_with_its_token(isa: str, bad: float) -> None:
    for dtype in DTYPES:
        call = a_call(60, 40, 20, 4, 2, dtype, "bfloat16")
        call[0][17, 3] = bad
        rows = cpu.experts(*call).isfinite().all(-1)
        assert rows.sum() == 59 and not rows[17]
        rows = cpu.quantized_linear(call[0], weight_in("bfloat16", 9, 40)).isfinite().all(-1)
        assert rows.sum() == 59 and not rows[17]


def test_a_row_ends_where_it_ends(isa: str) -> None:
    """With an odd width the numbers after a row's last are the next row's."""
    for dtype in DTYPES:
        call = list(a_call(60, 41, 21, 4, 2, dtype, str(dtype).removeprefix("torch.")))
        call[3][:, 9], call[4][:, 9] = math.nan, math.inf
        x, w = call[0], call[3][0]
        assert cpu.quantized_linear(x, w).isfinite().all(0).tolist() == [i != 9 for i in range(21)]
        call[3][:, 9] = 0
        assert cpu.experts(*call).isfinite().all(0).tolist() == [i != 9 for i in range(41)]


def test_nan_of_a_weight_stays_where_it_is(isa: str) -> None:
    """Also in rows that are converted to BF16, and NaN of any sign and payload."""
    w = torch.randn(20, 40)
    w.view(torch.int32)[7, 3], w.view(torch.int32)[9, 5] = 0x7FFFFFFF, -1
    for dtype in DTYPES:
        bad = cpu.quantized_linear(torch.ones(40, 40, dtype=dtype), w).isnan().all(0)
        assert bad.nonzero().flatten().tolist() == [7, 9]


def test_what_is_not_served_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, chosen, weights, w1, w2, w3 = a_call(20, 40, 20, 4, 2, torch.float32, "float32")
    for call, reason in (
        ((x, chosen, weights, w1, torch._neg_view(w2), w3), "sign"),
        ((x, chosen, weights, w1[:, :1].expand(w1.shape), w2, w3), "strides"),
        ((x.half(), chosen, weights, w1, w2, w3), "x of torch.float16"),
        ((x, chosen, weights.double(), w1, w2, w3), "weights of torch.float64"),
        ((x, chosen, weights, w1.mT.contiguous().mT, w2, w3), "strides"),
    ):
        with pytest.raises(Unserved, match=reason):
            cpu.experts(*call)
    monkeypatch.setattr(panels, "LEAST", 1 << 20)
    with pytest.raises(Unserved, match=r"^$"):
        cpu.experts(x, chosen, weights, w1, w2, w3)
    monkeypatch.setattr(panels, "LEAST", 0)
    with torch.enable_grad(), pytest.raises(Unserved, match="gradient"):
        cpu.experts(x, chosen, weights, w1.requires_grad_(), w2, w3)


def test_weights_that_are_not_their_memory_run_in_torch() -> None:
    x, w = torch.randn(20, 300), torch.randn(300, 300)
    for odd in (torch._neg_view(w), w[:1].expand(300, 300)):
        assert relative_error(linear(x, odd), x @ odd.T) < rounding(FP32_UNIT, terms=300)
    assert not linear(torch.randn(20, 0), torch.randn(5, 0).bfloat16()).any()


def gradients(call: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    """Return y and the gradients of x, weights, w1, w2 and w3 in FP64, by autograd from the reference."""
    x, indices, weights, *matrices = call
    leaves = [t.detach().double().requires_grad_() for t in (x, weights, *matrices)]
    with torch.enable_grad():
        y = experts.reference(leaves[0], indices, leaves[1], *leaves[2:])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (500, 100, 40, 2, 1)])
def test_trained_experts_agree(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call = a_call(*shape, dtype, "float32")  # pyright: ignore[reportArgumentType]
    grad = torch.randn(call[0].shape).to(dtype)
    y, gate, up = cpu.trained_experts(*call)
    got = [y, *cpu.trained_experts_gradients(grad, *call[:3], gate, up, *call[3:])]
    want = gradients(call, grad)
    # sums are over the model's width, the expert's or the tokens; g and u are kept in x's dtype and rounded once more
    limit = tolerance(dtype, max(shape[:3])) + (dtype == torch.bfloat16) * rounding(BF16_UNIT, chained=2)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < limit
    for a, b in zip(got[3:], want[3:], strict=True):  # an expert with few tokens, or none, by itself
        for i in range(len(a)):
            assert relative_error(a[i], b[i]) < 4 * limit
    assert got[0].dtype == got[1].dtype == dtype and all(t.dtype == torch.float32 for t in got[2:])
    plain, plain_gradients = (ops.find(f"trained_experts{name}").reference for name in ("", "_gradients"))
    y, *kept = plain(*call)
    references = [y, *plain_gradients(grad, *call[:3], *kept, *call[3:]), *kept]
    for a, b in zip(references, [*want, gate, up], strict=True):
        assert a.shape == b.shape and relative_error(a, b) < 4 * limit


@pytest.fixture
def trained_call(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Return a call whose matrices are trained, by kernels although it is small."""
    monkeypatch.setattr("dsmini.functional.experts.KERNEL_FROM", 0)
    call = a_call(90, 40, 20, 8, 2, torch.float32, "float32")
    for w in call[3:]:
        w.requires_grad_()
    return call


def test_training_reaches_the_kernel_and_its_threads_change_no_bit(trained_call: tuple[Any, ...]) -> None:
    call = (trained_call[0].bfloat16(), *trained_call[1:])
    leaves = [call[0].requires_grad_(), call[2].requires_grad_(), *call[3:]]
    grad = torch.randn(90, 40).bfloat16()

    def run() -> list[Tensor]:
        with torch.enable_grad():
            y = experts(*call)
        assert ops.chosen() == "eager" or "TrainedExperts" in type(y.grad_fn).__name__
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    got = assert_threads_change_no_bit(run)
    with ops.use("eager"):
        want = run()
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 4 * tolerance(torch.bfloat16, 90)
    with torch.enable_grad(), pytest.raises(ValueError, match="second derivatives"):
        torch.autograd.grad(experts(*call), leaves, grad, create_graph=True)


def trained_by(call: Any, **changes: Any) -> str:
    """Return the name of the autograd function of y, with some arguments of the call changed."""
    names = ("x", "indices", "weights", "w1", "w2", "w3")
    arguments = dict(zip(names, call, strict=True)) | changes
    with torch.enable_grad():
        return type(experts(*arguments.values()).grad_fn).__name__


def test_training_takes_the_kernel_only_where_it_serves(
    trained_call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = trained_call
    assert "TrainedExperts" in trained_by(call)
    with monkeypatch.context() as patch:
        patch.setattr("dsmini.functional.experts.KERNEL_FROM", 1 << 20)
        assert "TrainedExperts" not in trained_by(call), "little work"
    w1 = call[3]
    for w in (w1.detach(), w1.detach().mT.contiguous().mT.requires_grad_(), w1.detach().bfloat16().requires_grad_()):
        assert "TrainedExperts" not in trained_by(call, w1=w), "frozen, not contiguous, not FP32"
    with ops.use("eager"):
        assert "TrainedExperts" not in trained_by(call)
    with torch.autocast("cpu", torch.bfloat16):
        assert "TrainedExperts" not in trained_by(call)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert "TrainedExperts" not in trained_by(call), "an expert is one thread's"


def test_backward_uses_the_forwards_backend_and_no_autocast(
    trained_call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = trained_call
    with torch.enable_grad(), ops.use("cpu"):
        total = experts(*call).sum()
    want = torch.autograd.grad(total, call[3:], retain_graph=True)
    seen: list[str | None] = []
    gradient = cpu.trained_experts_gradients
    monkeypatch.setattr(cpu, "trained_experts_gradients", lambda *a: seen.append(ops.chosen()) or gradient(*a))
    with torch.autocast("cpu", torch.bfloat16), ops.use("eager"):
        got = torch.autograd.grad(total, call[3:])
    assert seen == ["cpu"] and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
