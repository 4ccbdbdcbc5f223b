"""Products of many rows in C++ agree with their references, on every instruction set."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ops
from dsmini.functional.experts import experts, quantized_experts
from dsmini.functional.trained_experts import trained_experts, trained_experts_gradients
from dsmini.numerics import WEIGHT_TILE, quantize
from dsmini_kernels import Unserved, cpu
from dsmini_kernels.cpu import build, panels, steps
from tests.helpers.decoding import WEIGHTS
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding

SHAPES = ((1, 33, 7, 4, 2), (40, 130, 63, 8, 3), (300, 64, 65, 5, 2), (130, 257, 31, 40, 4), (7, 1, 1, 1, 1))
"""Tokens, widths of the model and of an expert, experts, and those that a token chooses."""


@pytest.fixture(autouse=True)
def _serves_all(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[None]:
    """Serve calls of any size, without gradients, and fill outputs with NaN before a kernel writes them."""
    monkeypatch.setattr(panels, "LEAST", 0)
    with torch.no_grad():
        yield


def weight_in(dtype: str, *shape: int) -> Any:
    w = torch.randn(shape) / shape[-1] ** 0.5
    return quantize(w, WEIGHT_TILE) if dtype == "fp8" else w.to(getattr(torch, dtype))


def dense(w: Any) -> Tensor:
    return w.double() if isinstance(w, Tensor) else w.dequantize().double()


def a_call(n: int, m: int, f: int, e: int, k: int, dtype: torch.dtype, weights: str) -> tuple[Any, ...]:
    """Return the arguments of `experts`; with four experts or more the last is chosen by nobody."""
    chosen = torch.stack([torch.randperm(e - (e > 3))[:k] for _ in range(n)])
    matrices = (weight_in(weights, e, *shape) for shape in ((f, m), (m, f), (f, m)))
    return (
        *(torch.randn(n, m).to(dtype), chosen, torch.rand(n, k) - 0.3),
        *(chosen.flatten().bincount(minlength=e), *matrices),
    )


def exact(x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, *matrices: Any) -> Tensor:
    return experts.reference(x.double(), indices, weights.double(), counts, *map(dense, matrices))


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Return the error of three chained products, whose operands and results are rounded once each."""
    sums = rounding(FP32_UNIT, terms=terms, chained=3)
    return sums if dtype == torch.float32 else sums + rounding(BF16_UNIT, chained=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_agree(every_isa: str, shape: tuple[int, ...], weights: str, dtype: torch.dtype) -> None:
    call = a_call(*shape, dtype, weights)  # pyright: ignore[reportArgumentType]
    got, want = cpu.experts(*call), exact(*call)
    assert got.dtype == dtype and got.shape == want.shape
    assert relative_error(got, want) < tolerance(dtype, max(shape[1:3]))
    for token in range(shape[0]):  # each row by itself: a wrong small row would not show in the norm of all
        assert relative_error(got[token], want[token]) < 4 * tolerance(dtype, max(shape[1:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_of_many_rows_agrees(every_isa: str, weights: str, dtype: torch.dtype) -> None:
    for n, o, i in ((33, 1, 1), (16, 40, 31), (97, 130, 63), (200, 33, 257), (600, 50, 128)):
        x, w = torch.randn(2, n, i)[1].to(dtype), weight_in(weights, o, i)
        got, want = cpu.quantized_linear(x.view(1, n, i), w), x.double() @ dense(w).T
        assert got.shape == (1, n, o) and got.dtype == dtype
        assert relative_error(got[0], want) < rounding(FP32_UNIT, terms=i) + (dtype == torch.bfloat16) * rounding(
            BF16_UNIT
        )


def test_matrices_of_different_types_agree(every_isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = list(a_call(40, 130, 63, 5, 2, dtype, "float32"))
        for place, weights in ((4, "fp8"), (5, "bfloat16")):
            call[place] = weight_in(weights, *call[place].shape)
        assert relative_error(cpu.experts(*call), exact(*call)) < tolerance(dtype, 130)


def test_more_tokens_than_memory_take_turns(every_isa: str) -> None:
    """Beyond the memory of hidden numbers and of panels, tokens are computed in turns."""
    call = a_call(2000, 8, 4096, 3, 2, torch.float32, "float32")
    assert relative_error(cpu.experts(*call), exact(*call)) < tolerance(torch.float32, 4096)
    x, w = torch.randn(700, 9000), weight_in("bfloat16", 5, 9000)
    assert relative_error(cpu.quantized_linear(x, w), x.double() @ w.double().T) < rounding(FP32_UNIT, terms=9000)


def test_threads_change_no_bit(every_isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, weights in ((torch.bfloat16, "bfloat16"), (torch.float32, "fp8")):
        call, w, results = a_call(150, 96, 70, 6, 2, dtype, weights), weight_in("bfloat16", 70, 96), []
        for threads in (1, 2, 3):
            for module in (panels, steps):
                monkeypatch.setattr(module, "place", lambda lib, n=threads: (lib.isa, n))
            results.append((cpu.experts(*call), cpu.quantized_linear(call[0], w)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_stays_with_its_token(every_isa: str, bad: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = a_call(60, 40, 20, 4, 2, dtype, "bfloat16")
        call[0][17, 3] = bad
        rows = cpu.experts(*call).isfinite().all(-1)
        assert rows.sum() == 59 and not rows[17]
        rows = cpu.quantized_linear(call[0], weight_in("bfloat16", 9, 40)).isfinite().all(-1)
        assert rows.sum() == 59 and not rows[17]


def test_every_code_is_decoded_for_many_rows(every_isa: str) -> None:
    w = quantize(torch.randn(256, 40), WEIGHT_TILE)
    w.codes.view(torch.uint8)[:, 3] = torch.arange(256).to(torch.uint8)
    x = torch.zeros(32, 40)
    x[:, 3] = 1
    for dtype in (torch.float32, torch.bfloat16):
        want = w.dequantize(dtype)[:, 3]
        assert torch.equal(cpu.quantized_linear(x.to(dtype), w)[5].nan_to_num(7e7), want.nan_to_num(7e7))


def test_experts_of_a_model_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("experts", "quantized_experts"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, n=name, k=kernel: called.append(n) or k(*args))
    ops._load.cache_clear()
    with ops.use("cpu"):
        for weights, op in (("bfloat16", experts), ("fp8", quantized_experts)):
            call = a_call(50, 40, 20, 4, 2, torch.bfloat16, weights)
            assert relative_error(op(*call), exact(*call)) < tolerance(torch.bfloat16, 40)
    assert called == ["experts", "quantized_experts"]


def gradients(call: tuple[Any, ...], grad: Tensor) -> list[Tensor]:
    """Return y and the gradients of x, weights, w1, w2 and w3 in FP64, by autograd from the reference."""
    x, indices, weights, counts, *matrices = call
    leaves = [t.detach().double().requires_grad_() for t in (x, weights, *matrices)]
    with torch.enable_grad():
        y = experts.reference(leaves[0], indices, leaves[1], counts, *leaves[2:])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (500, 100, 40, 2, 1)])
def test_trained_experts_agree(every_isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    call = a_call(*shape, dtype, "float32")  # pyright: ignore[reportArgumentType]
    grad = torch.randn(call[0].shape).to(dtype)
    y, gate, up = cpu.trained_experts(*call)
    got = [y, *cpu.trained_experts_gradients(grad, *call[:4], gate, up, *call[4:])]
    want = gradients(call, grad)
    # sums are over the model's width, the expert's or the tokens; g and u are kept in x's dtype and rounded once more
    limit = tolerance(dtype, max(shape[:3])) + (dtype == torch.bfloat16) * rounding(BF16_UNIT, chained=2)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < limit
    for a, b in zip(got[3:], want[3:], strict=True):  # an expert with few tokens, or none, by itself
        for i in range(len(a)):
            assert relative_error(a[i], b[i]) < 4 * limit
    assert got[0].dtype == got[1].dtype == dtype and all(t.dtype == torch.float32 for t in got[2:])


def test_trained_experts_agree_with_their_references() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = a_call(70, 33, 20, 5, 2, dtype, "float32")
        grad, limit = torch.randn(70, 33).to(dtype), 2 * tolerance(dtype, 70)
        y, *kept = cpu.trained_experts(*call)
        for a, b in zip((y, *kept), trained_experts.reference(*call), strict=True):
            assert relative_error(a, b) < limit
        arguments = (grad, *call[:4], *kept, *call[4:])
        want = trained_experts_gradients.reference(*arguments)
        for a, b in zip(cpu.trained_experts_gradients(*arguments), want, strict=True):
            assert relative_error(a, b) < limit
        for a, b in zip((y, *want), gradients(call, grad), strict=True):
            assert relative_error(a, b) < 2 * limit


def test_training_reaches_the_kernel_and_its_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.functional.trained_experts.LEAST", 0)
    call = a_call(90, 40, 20, 4, 2, torch.bfloat16, "float32")
    leaves = [call[0], call[2], *call[4:]]
    for t in leaves:
        t.requires_grad_()
    grad, results = torch.randn(90, 40).bfloat16(), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(panels, "place", lambda lib, n=threads: (lib.isa, n))
        with torch.enable_grad():
            y = experts(*call)
        assert "TrainedExperts" in type(y.grad_fn).__name__
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with ops.use("eager"), torch.enable_grad():
        y = experts(*call)
        want = [y, *torch.autograd.grad(y, leaves, grad)]
    for a, b in zip(results[0], want, strict=True):
        assert relative_error(a, b) < 4 * tolerance(torch.bfloat16, 90)
    with torch.enable_grad(), pytest.raises(ValueError, match="second derivatives"):
        torch.autograd.grad(experts(*call), leaves, grad, create_graph=True)


def test_what_is_not_served_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, chosen, weights, counts, w1, w2, w3 = a_call(20, 40, 20, 4, 2, torch.float32, "float32")
    for call, reason in (
        ((x.half(), chosen, weights, counts, w1, w2, w3), "x of torch.float16"),
        ((x, chosen, weights.double(), counts, w1, w2, w3), "weights of torch.float64"),
        ((x, chosen, weights, counts, w1.mT.contiguous().mT, w2, w3), "strides"),
    ):
        with pytest.raises(Unserved, match=reason):
            cpu.experts(*call)
    monkeypatch.setattr(panels, "LEAST", 1 << 20)
    with pytest.raises(Unserved, match=r"^$"):
        cpu.experts(x, chosen, weights, counts, w1, w2, w3)
    monkeypatch.setattr(panels, "LEAST", 0)
    with torch.enable_grad(), pytest.raises(Unserved, match="gradient"):
        cpu.experts(x, chosen, weights, counts, w1.requires_grad_(), w2, w3)


def test_wrong_calls_are_refused_before_memory_is_touched() -> None:
    x, y, chosen, weights = torch.randn(3, 8), torch.empty(3, 8), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    matrices = [steps.matrix(torch.randn(2, *shape)) for shape in ((5, 8), (8, 5), (5, 8))]

    def raw(sizes: tuple[int, ...] = (3, 8, 5, 2, 2, 0), less: int = 0, w1: tuple[int, ...] = matrices[0]) -> int:
        spans = [number for t in (x, y, chosen, weights) for number in (steps.span(t)[0], steps.span(t)[1] - less)]
        call = (0, 1, *sizes, *spans, *w1, *matrices[1], *matrices[2])
        return build.library().experts(build.EXPERTS.pack(*call), build.EXPERTS.size)

    assert raw() == 0
    assert raw(less=1) != 0
    beyond = ((4, 8, 5, 2, 2, 0), (3, 9, 5, 2, 2, 0), (3, 8, 6, 2, 2, 0), (3, 8, 5, 3, 2, 0), (3, 8, 5, 2, 3, 0))
    senseless = (
        (-1, 8, 5, 2, 2, 0),
        (3, 0, 5, 2, 2, 0),
        (3, 8, 5, 2, 0, 0),
        (2**62, 8, 5, 2, 2, 0),
        (3, 8, 5, 2, 2, 2),
    )
    for sizes in beyond + senseless:
        assert raw(sizes) != 0
    assert raw(w1=(*matrices[0][:2], 3, *matrices[0][3:])) != 0, "a type that there is not"
    assert raw(w1=(*matrices[0][:2], 2, *matrices[0][3:])) != 0, "codes without scales"
    for index in (-1, 2):
        chosen[1, 1] = index
        assert raw() != 0
