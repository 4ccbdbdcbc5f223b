"""The chunked cross-entropy is torch's own, and no [n, vocab] tensor is made or kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsmini import Transformer
from dsmini.functional.cross_entropy import IGNORE
from dsmini.nn import linear_cross_entropy
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, relative_error, rounding

N, M, VOCAB = 23, 15, 1000
Model = Callable[..., Transformer]


def problem(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets, some of them ignored, the last id among them."""
    targets = torch.randint(0, VOCAB, (n,))
    targets[[0, 7, 8, n - 1]] = IGNORE
    targets[5] = VOCAB - 1
    hidden, weight = torch.randn(n, M).to(dtype), torch.randn(VOCAB, M) / M**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def torchs_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [1, 7, N, 1000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_those_of_torchs_cross_entropy(chunk_rows: int | None, dtype: torch.dtype) -> None:
    hidden, weight, targets = problem()
    hidden, weight = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    got, want = linear_cross_entropy(hidden, weight, targets, chunk_rows), torchs_own(hidden, weight, targets)
    assert got.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else rounding(FP32_UNIT, terms=VOCAB)
    assert relative_error(got, want) <= tolerance
    for a, b in zip(*(torch.autograd.grad(-3 * y, [hidden, weight]) for y in (got, want)), strict=True):
        assert a.dtype == dtype and relative_error(a, b) <= tolerance


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_bf16_hidden_states_meet_fp32_weights(chunk_rows: int | None) -> None:
    hidden, weight, targets = problem(torch.bfloat16)
    got = linear_cross_entropy(hidden, weight, targets, chunk_rows)
    assert got.dtype == torch.float32
    grads = torch.autograd.grad(got, [hidden, weight])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().bfloat16().double().requires_grad_()
    want = torchs_own(exact_hidden, exact_weight, targets)
    # logits, then their gradient, then the product are rounded to BF16
    tolerance = rounding(BF16_UNIT, chained=3)
    assert relative_error(got, want) <= tolerance
    for a, b in zip(grads, torch.autograd.grad(want, [exact_hidden, exact_weight]), strict=True):
        assert relative_error(a, b) <= tolerance


def test_ignored_targets_count_nothing() -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert loss == 0 and not any(g.any() for g in grads)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    assert torch.equal(grad.any(1), targets != IGNORE)


def test_model_with_nothing_to_predict_has_a_loss_of_zero(small_model: Model) -> None:
    tokens = torch.randint(0, 61, (2, 9))
    losses = small_model().losses(tokens, torch.full_like(tokens, IGNORE))
    assert losses.main == losses.mtp == 0


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_target_outside_the_vocabulary_is_refused(target: int) -> None:
    hidden, weight, targets = problem()
    targets[3] = target
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gave back, and how many operations were matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        self.products += func._opname == "mm"
        return out


@pytest.mark.parametrize("chunk_rows", [1, 7])
def test_no_more_than_a_chunk_of_logits_exists(chunk_rows: int) -> None:
    hidden, weight, targets = problem(n=130)
    with Largest() as largest:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk_rows), [hidden, weight])
    assert largest.numel == max(chunk_rows * VOCAB, VOCAB * M)
    with Largest() as largest:
        torch.autograd.grad(torchs_own(hidden, weight, targets), [hidden, weight])
    assert largest.numel == 130 * VOCAB


def test_chunks_bound_the_logits_without_being_asked_to() -> None:
    hidden, weight = torch.randn(150, 1), torch.randn(2**16, 1)
    with Largest() as largest, torch.no_grad():
        linear_cross_entropy(hidden, weight, torch.zeros(150, dtype=torch.int64))
    assert largest.numel * 4 == 16 * 2**20


def test_nothing_of_logits_is_kept_for_backward() -> None:
    hidden, weight, targets = problem(n=130)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, targets)
    assert sorted(kept) == [130 * M, VOCAB * M]


def test_losses_of_a_model_make_no_tensor_of_all_logits(small_model: Model) -> None:
    model = small_model(vocab_size=VOCAB)
    tokens, targets = torch.randint(0, VOCAB, (2, 4, 25)).unbind()
    with Largest() as largest:
        model.losses(tokens, targets, chunk_rows=8).total.backward()
    assert largest.numel == VOCAB * 24 < 4 * 25 * VOCAB


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, targets = problem()
    want = linear_cross_entropy(hidden, weight, targets, 7)
    with torch.no_grad(), Largest() as largest:
        got = linear_cross_entropy(hidden, weight, targets, 7)
    assert torch.equal(got, want) and not got.requires_grad
    assert largest.products == -(-N // 7), "only the logits need a product"


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_what_is_frozen_is_not_made(frozen: str) -> None:
    hidden, weight, targets = problem()
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 7), [hidden, weight])
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    with Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, targets, 7)
    assert largest.products == 2 * -(-N // 7)
    other = weight if frozen == "hidden" else hidden
    assert torch.equal(torch.autograd.grad(loss, other)[0], want[frozen == "hidden"])
