"""The routed experts are trained by kernels: values, gradients, and where they serve."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.functional.experts import experts
from dsmini.functional.trained_experts import trained_experts, trained_experts_gradients
from dsmini_kernels import cpu
from dsmini_kernels.cpu import panels
from tests.helpers.expert_calls import SHAPES, a_call, tolerance
from tests.helpers.tolerances import BF16_UNIT, relative_error, rounding


@pytest.fixture(autouse=True)
def _serves_all(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[None]:
    """Serve calls of any size, without gradients, and fill outputs with NaN before a kernel writes them."""
    monkeypatch.setattr(panels, "LEAST", 0)
    with torch.no_grad():
        yield


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
        monkeypatch.setattr(panels, "n_threads", lambda n=threads: n)
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


def trained_by(call: Any, **changes: Any) -> str:
    """Return the name of the autograd function of y, with some arguments of the call changed."""
    names = ("x", "indices", "weights", "counts", "w1", "w2", "w3")
    arguments = dict(zip(names, call, strict=True)) | changes
    with torch.enable_grad():
        return type(experts(*arguments.values()).grad_fn).__name__


def test_training_takes_the_kernel_only_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    call = a_call(90, 40, 20, 8, 2, torch.float32, "float32")
    for w in call[4:]:
        w.requires_grad_()
    assert "TrainedExperts" not in trained_by(call), "little work"
    monkeypatch.setattr("dsmini.functional.trained_experts.LEAST", 0)
    assert "TrainedExperts" in trained_by(call)
    w1 = call[4]
    for w in (w1.detach(), w1.detach().mT.contiguous().mT.requires_grad_(), w1.detach().bfloat16().requires_grad_()):
        assert "TrainedExperts" not in trained_by(call, w1=w), "frozen, not contiguous, not FP32"
    with ops.use("eager"):
        assert "TrainedExperts" not in trained_by(call)
    with torch.autocast("cpu", torch.bfloat16):
        assert "TrainedExperts" not in trained_by(call)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert "TrainedExperts" not in trained_by(call), "an expert is one thread's"


def test_backward_uses_the_forwards_backend_and_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.functional.trained_experts.LEAST", 0)
    call = a_call(90, 40, 20, 8, 2, torch.float32, "float32")
    for w in call[4:]:
        w.requires_grad_()
    with torch.enable_grad(), ops.use("cpu"):
        total = experts(*call).sum()
    want = torch.autograd.grad(total, call[4:], retain_graph=True)
    seen: list[str | None] = []
    gradient = cpu.trained_experts_gradients
    monkeypatch.setattr(cpu, "trained_experts_gradients", lambda *a: seen.append(ops.chosen()) or gradient(*a))
    with torch.autocast("cpu", torch.bfloat16), ops.use("eager"):
        got = torch.autograd.grad(total, call[4:])
    assert seen == ["cpu"] and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_model_without_numbers_still_runs() -> None:
    with torch.device("meta"), torch.enable_grad():
        model = Transformer(ModelConfig(n_layers=2))
        assert model(torch.zeros(2, 64, dtype=torch.long)).requires_grad
