"""RMSNorm of training in C++ agrees with its reference: values, gradients, rows apart in memory, where it serves."""

import pytest
import torch
from torch import Tensor

from dsmini import RMSNorm, ops
from dsmini.functional.layers import trained_norm, trained_norm_gradients
from dsmini.nn.layers import rms_norm
from dsmini_kernels import Unserved, cpu
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding
from tests.kernels.conftest import assert_threads_change_no_bit

pytestmark = pytest.mark.usefixtures("library", "poisoned_memory", "without_gradients")
EPS = 0.1


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return rows of unlike sizes."""
    return (torch.randn(shape) * torch.rand(*shape[:-1], 1).exp2()).to(dtype)


def exact(grad: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    with torch.enable_grad():
        y = rms_norm.reference(*leaves, EPS)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (63,), (5, 64), (2, 3, 37), (1, 96), (2, 1100, 19), (1100, 4, 8)])
def test_values_and_gradients_agree(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, weight = draw(dtype, *shape), draw(dtype, *shape), torch.rand(shape[-1]) + 0.5
    y, inverse = cpu.trained_norm(x, weight, EPS)
    got = [y, *cpu.trained_norm_gradients(grad, x, weight, inverse)]
    plain, plain_inverse = trained_norm.reference(x, weight, EPS)
    references = [plain, *trained_norm_gradients.reference(grad, x, weight, plain_inverse)]
    assert inverse.shape == plain_inverse.shape
    torch.testing.assert_close(inverse, plain_inverse, rtol=4e-7, atol=0)
    for i, (a, reference, want) in enumerate(zip(got, references, exact(grad, x, weight), strict=True)):
        assert (a.dtype, a.shape) == (reference.dtype, reference.shape)
        rows = x.numel() // shape[-1]
        unit = FP32_UNIT if i == 2 or dtype == torch.float32 else BF16_UNIT
        most = rounding(unit, terms=max(rows, shape[-1]) if unit == FP32_UNIT else 1)
        assert relative_error(a, want) <= most and relative_error(reference, want) <= most


def test_rows_may_be_apart_and_columns_too(isa: str) -> None:
    wide, weight = draw(torch.float32, 2, 40, 50), torch.rand(30) + 0.5
    grad = draw(torch.float32, 2, 30, 40).mT
    for x in (wide[..., 7:37], wide[:, ::2, 7:37], wide[0, :, :30], wide.mT[:, :30, :30], wide[:, :1, :30]):
        part = grad[tuple(slice(0, n) for n in x.shape)] if x.dim() == 3 else grad[0]
        results = []
        for a, g in ((x, part), (x.contiguous(), part.contiguous())):
            y, inverse = cpu.trained_norm(a, weight, EPS)
            results.append([y, *cpu.trained_norm_gradients(g, a, weight, inverse)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_change_no_bit() -> None:
    x, grad, weight = draw(torch.float32, 1100, 37), draw(torch.float32, 1100, 37), torch.rand(37)

    def run() -> list[Tensor]:
        y, inverse = cpu.trained_norm(x, weight, EPS)
        return [y, inverse, *cpu.trained_norm_gradients(grad, x, weight, inverse)]

    assert_threads_change_no_bit(run)


def test_default_dtype_changes_nothing() -> None:
    x, grad, weight = torch.randn(9, 37), torch.randn(9, 37), torch.rand(37)
    try:
        results = []
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            y, inverse = cpu.trained_norm(x, weight, EPS)
            results.append([y, inverse, *cpu.trained_norm_gradients(grad, x, weight, inverse)])
    finally:
        torch.set_default_dtype(torch.float32)
    for other in results[:2]:
        for a, b in zip(other, results[2], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_training_is_served_and_other_numbers_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, served = RMSNorm(37), list[str]()

    class Counter:
        def kernel_ran(self, call: ops.Call) -> None:
            served.append(call.name)

    def train(x: Tensor) -> None:
        with torch.enable_grad(), ops.counting(Counter()):
            norm(x.requires_grad_()).sum().backward()

    train(draw(torch.float32, 3, 37))
    assert served == [], "little work"
    monkeypatch.setattr("dsmini.functional.layers.KERNEL_FROM", 1)
    train(draw(torch.float32, 3, 37))
    assert served == ["trained_norm", "trained_norm_gradients"]
    with ops.use("cpu"):  # where no kernel is asked, a forced backend refuses nothing
        for dtype in (torch.float64, torch.half):
            train(draw(dtype, 3, 37))
        train(torch.empty(0, 37))
    assert len(served) == 2
    with pytest.raises(RuntimeError, match="size"):
        train(draw(torch.float32, 3, 32))
    x, weight = torch.randn(3, 37), torch.rand(37)
    for wrong in (
        (x.double(), weight),
        (x.half(), weight),
        (x, weight.bfloat16()),
        (x[:0], weight),
        (x[:, :30], weight),
    ):
        with pytest.raises(Unserved):
            cpu.trained_norm(*wrong, EPS)
    with pytest.raises(Unserved):
        cpu.trained_norm_gradients(x.bfloat16(), x, weight, torch.ones(3, 1))
