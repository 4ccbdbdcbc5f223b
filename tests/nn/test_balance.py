"""Balance: the sequence-wise loss against its formula, the bias update by hand, and counts that add up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Gate, Transformer
from dsmini.nn import max_violation, sequence_balance_loss
from tests.helpers.tolerances import FP64_UNIT, relative_error, rounding

B, S, VOCAB = 2, 13, 61
Model = Callable[..., Transformer]
EITHER = pytest.mark.parametrize("counts", ["published", "routed"])


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(0, VOCAB, (2, B, S)).unbind()  # pyright: ignore[reportReturnType]


def by_the_report(scores: Tensor, chosen: Tensor, batch_size: int) -> Tensor:
    """Equations 17 to 20, sequence by sequence, then the mean."""
    losses = []
    for s, indices in zip(scores.chunk(batch_size), chosen.chunk(batch_size), strict=True):
        f = torch.bincount(indices.flatten(), minlength=s.shape[1]).double() * s.shape[1] / indices.numel()
        losses.append((f * (s / s.sum(-1, keepdim=True)).mean(0)).sum())
    return torch.stack(losses).mean()


@EITHER
@pytest.mark.parametrize(("batch_size", "e", "k"), [(1, 7, 3), (3, 16, 4)])
def test_loss_follows_the_report_over_either_selection(counts: Any, batch_size: int, e: int, k: int) -> None:
    scores = torch.randn(batch_size * 11, e, dtype=torch.float64).sigmoid()
    indices = torch.rand(batch_size * 11, e).argsort()[:, :k]
    want = by_the_report(scores, scores.topk(k).indices if counts == "published" else indices, batch_size)
    got = sequence_balance_loss(scores, indices, batch_size, counts)
    assert relative_error(got, want) < rounding(FP64_UNIT, terms=11 * e)


@EITHER
def test_balance_loss_of_a_model_is_the_sum_over_gates(small_model: Model, counts: Any) -> None:
    model = small_model().double()
    losses = model.losses(*batch(), balance_counts=counts)
    want = sum(sequence_balance_loss(r.scores, r.indices, B, counts) for r in losses.routing)
    assert relative_error(losses.balance, want) <= rounding(FP64_UNIT, terms=3)
    grads = torch.autograd.grad(losses.balance, [gate.weight for gate in model.gates()])
    assert all(grad.norm() > 1e-3 for grad in grads)


def gate_with(bias: list[float]) -> Gate:
    gate = Gate(dim=8, n_routed_experts=len(bias), n_activated_experts=1, n_expert_groups=1, n_limited_groups=1)
    assert gate.bias is not None
    gate.bias.copy_(torch.tensor(bias))
    return gate


def test_bias_moves_towards_the_mean_load() -> None:
    gate = gate_with([0.0, 0.5, -0.25, 1.0])
    gate.update_bias(torch.tensor([4, 0, 2, 2]), 0.125)
    assert gate.bias.tolist() == [-0.125, 0.625, -0.25, 1.0]
    gate.update_bias(torch.tensor([0, 3, 1, 3]), 0.125)
    assert gate.bias.tolist() == [0.0, 0.5, -0.125, 0.875]
    gate.update_bias(torch.tensor([9, 0, 0, 0]), 0.0)
    assert gate.bias.tolist() == [0.0, 0.5, -0.125, 0.875]


def test_bias_sees_one_token_more_among_many() -> None:
    gate, many = gate_with([0.0] * 3), 2**26
    gate.update_bias(torch.tensor([many + 1, many, many - 1]), 0.5)
    assert gate.bias.tolist() == [-0.5, 0.0, 0.5]
    without = Gate(topk_method="greedy", n_expert_groups=1, n_limited_groups=1)
    without.update_bias(torch.arange(16), 1e-3)
    assert without.bias is None


def test_gates_come_in_the_order_of_routing_mtp_last(small_model: Model) -> None:
    model = small_model(n_layers=3, n_dense_layers=1)
    blocks = [model.layers[1], model.layers[2], model.mtp[0].block, model.mtp[1].block]
    assert all(gate is block.ffn.gate for gate, block in zip(model.gates(), blocks, strict=True))


def test_max_violation_by_hand() -> None:
    """Only the busiest expert counts, not the idlest."""
    counts = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [3, 3, 2, 0]])
    assert max_violation(counts).tolist() == [0.0, 3.0, 0.5]
    assert max_violation(counts[1]).item() == 3.0
