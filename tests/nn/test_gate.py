"""The gate: routes on random scores, the balance of loads, and experts that are looked up by token ids."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmini import Gate, Transformer
from dsmini.nn import Context, MoE, max_violation, route, sequence_balance_loss
from dsmini.nn.gate import HashGate, hash_table
from tests import reference_model as reference
from tests.helpers.configs import refusal
from tests.helpers.tolerances import FP32_UNIT, FP64_UNIT, relative_error, rounding


class Case(NamedTuple):
    logits: Tensor
    bias: Tensor
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Case:
    """Draw logits on a coarse grid, so that ties are common, and biases of any sign and size."""
    groups, in_group, n = draw(st.integers(1, 4)), draw(st.integers(2, 5)), draw(st.integers(1, 6))
    limited = draw(st.integers(1, groups))
    k = draw(st.integers(1, limited * in_group))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    step = draw(st.sampled_from([2.0, 0.5, 1e-3]))
    logits = (torch.randn(n, groups * in_group, generator=generator, dtype=dtype) / step).round() * step
    size = draw(st.sampled_from([0.0, 0.05, 1.0, 30.0, 1e6]))
    offset = draw(st.sampled_from([0.0, -0.5, -1.0]))
    bias = (torch.rand(groups * in_group, generator=generator, dtype=dtype) - 0.5 + offset) * size
    options = {
        "n_activated_experts": k,
        "n_expert_groups": groups,
        "n_limited_groups": limited,
        "score_func": draw(st.sampled_from(["sigmoid", "softmax"])),
        "norm_topk_prob": draw(st.booleans()),
        "route_scale": draw(st.sampled_from([1.0, 2.5, 16.0])),
    }
    return Case(logits, bias, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False], ids=["v3", "v2"])
def test_route_follows_the_text(dtype: torch.dtype, biased: bool) -> None:
    """Experts in order, groups, ties, weights from the unbiased scores, their sum, and counts."""

    @settings(max_examples=200)
    @given(cases(dtype))
    def check(case: Case) -> None:
        bias, c = case.bias if biased else None, SimpleNamespace(**case.options)
        got = route(case.logits, bias, **case.options)
        indices, weights, scores = reference.route(case.logits, bias, c)
        assert torch.equal(got.indices, indices)
        near = rounding(FP32_UNIT if dtype == torch.float32 else FP64_UNIT, terms=case.logits.shape[1])
        exact = case.logits.double()
        exact = exact.sigmoid() if c.score_func == "sigmoid" else exact.exp() / exact.exp().sum(-1, keepdim=True)
        assert torch.allclose(got.scores.double(), exact, rtol=near, atol=0)
        assert relative_error(got.weights, weights) <= near and relative_error(got.scores, scores) <= near
        assert torch.equal(got.counts, got.indices.flatten().bincount(minlength=case.logits.shape[1]))

    check()


@pytest.mark.parametrize("dim", [7, 192, 7168])
def test_bias_exists_at_any_width_and_only_with_noaux_tc(dim: int) -> None:
    sizes = {"dim": dim, "n_routed_experts": 8, "n_expert_groups": 1, "n_limited_groups": 1}
    gate = Gate(**sizes)
    assert gate.bias is not None
    assert gate.bias.shape == (8,) and gate.bias.dtype == torch.float32
    gate.bias[5] = 10.0
    assert (gate(torch.randn(9, dim)).indices[:, 0] == 5).all()
    assert Gate(**sizes, topk_method="greedy").bias is None


def test_scores_are_fp32_whatever_the_input_is(randomise: Any) -> None:
    gate = randomise(Gate(dim=63))
    x = torch.randn(130, 63).bfloat16()
    routing = gate(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    exact = (x.double() @ gate.weight.double().T).sigmoid()
    assert relative_error(routing.scores, exact) <= rounding(FP32_UNIT, terms=63)
    assert torch.equal(gate(x.float()).indices, routing.indices)


def test_what_cannot_be_routed_is_refused() -> None:
    logits = torch.zeros(3, 10)
    assert "groups of 5, 0 left over; want" in refusal(route, logits, None, n_activated_experts=6, n_expert_groups=2)
    assert "groups of 3, 1 left over; want" in refusal(route, logits, None, n_activated_experts=2, n_expert_groups=3)
    unchecked: Any = getattr(route, "__wrapped__", route)  # without the type checks of these tests
    assert "score_func='relu'" in refusal(unchecked, logits, None, n_activated_experts=2, score_func="relu")


# --- balance: the sequence-wise loss against its formula, the bias update by hand, and counts that add up

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


# --- V4's gates: the score function, experts looked up by token ids, and the table's making

E, K, V, M = 6, 2, 11, 8
SIZES: dict[str, Any] = {
    **{"n_routed_experts": E, "n_activated_experts": K, "vocab_size": V, "dim": M, "moe_inter_dim": 5},
    **{"n_expert_groups": 1, "n_limited_groups": 1, "n_layers": 2, "n_dense_layers": 0, "n_hash_layers": 1},
    **{"score_func": "sqrtsoftplus", "route_scale": 1.5},
}


def test_scores_are_the_root_of_softplus_with_finite_gradients() -> None:
    """Logits of -200 have a softplus of 0, whose root has an infinite derivative."""
    logits = torch.tensor([[-200.0, -30.0, 0.0, 30.0]], requires_grad=True)
    routing = route(logits, None, n_activated_experts=3, score_func="sqrtsoftplus")
    torch.testing.assert_close(routing.scores[0, 1:], logits[0, 1:].exp().log1p().sqrt())
    routing.scores.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_table_chooses_experts_and_scores_weigh_them() -> None:
    gate, x, tokens = HashGate(**SIZES), torch.randn(7, M), torch.randint(V, (7,))
    routing = gate(x, tokens)
    assert torch.equal(routing.indices, gate.tid2eid[tokens].long())
    scores = F.softplus(x @ gate.weight.T).sqrt()
    chosen = torch.stack([scores[i, of] for i, of in enumerate(routing.indices)])
    torch.testing.assert_close(routing.weights, 1.5 * chosen / chosen.sum(-1, keepdim=True))
    assert torch.equal(routing.counts, routing.indices.flatten().bincount(minlength=E))
    short = gate(x.bfloat16(), tokens)
    assert short.weights.dtype == short.scores.dtype == torch.float32


def test_hash_layer_has_no_bias_and_no_part_in_the_balance_loss() -> None:
    gate = HashGate(**SIZES, topk_method="noaux_tc")
    assert gate.bias is None and set(gate.state_dict()) == {"weight", "tid2eid"}
    routing = gate(torch.randn(4, M), torch.arange(4))
    gate.update_bias(routing.counts, 0.1)
    assert not routing.scores.requires_grad and routing.weights.requires_grad


def test_table_is_saved_and_stays_int32_in_bf16() -> None:
    gate, again = HashGate(**SIZES), HashGate(**SIZES)
    gate.make_table(torch.arange(V))
    again.load_state_dict(gate.state_dict())
    assert torch.equal(again.bfloat16().tid2eid, gate.tid2eid)
    assert again.tid2eid.dtype == torch.int32


def test_table_of_a_large_vocabulary_is_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: (made.append(1), real(*args, **options))[1])
    assert hash_table(torch.arange(500), 8, 3).shape == (500, 3) and len(made) == 1


def test_wrong_table_is_refused() -> None:
    gate = HashGate(**SIZES)
    for table, message in (
        ([[0, 0]] * V, "tid2eid names the experts [0, 0] for a token; want 2 different ones"),
        ([[0, E]] * V, f"tid2eid names the experts [0, {E}]"),
        ([[0, 1]] * (V - 1), f"tid2eid is [{V - 1}, 2]"),
    ):
        gate.tid2eid = torch.tensor(table, dtype=torch.int32)
        assert message in refusal(gate, torch.randn(1, M), torch.tensor([3]))


def test_hash_layer_without_ids_is_refused() -> None:
    moe = MoE(gate_class=HashGate, **SIZES)
    assert "token ids and got none" in refusal(moe, torch.randn(1, 3, M))
    context = Context(positions=torch.arange(3)[None], tokens=torch.arange(6).view(2, 3))
    y, routing = moe(torch.randn(2, 3, M), context)
    assert y.shape == (2, 3, M) and routing.indices.shape == (6, K)


@pytest.mark.parametrize("skew", [0.0, 1.0], ids=["even", "Zipf"])
def test_table_spreads_the_tokens_of_a_text(skew: float) -> None:
    """256 ids with frequencies of 1 / rank^skew on 16 experts, 4 each: no expert has 2 % more than the mean."""
    counts = (1e6 / torch.arange(1, 257) ** skew).long()[torch.randperm(256)]
    tables = [hash_table(counts, 16, 4, layer) for layer in range(2)]
    for table in tables:
        assert bool((table.sort(-1).values.diff(dim=-1) > 0).all())
        load = torch.zeros(16, dtype=torch.int64).index_add(0, table.flatten().long(), counts.repeat_interleave(4))
        assert load.max() < 1.02 * load.sum() / 16
        assert len({frozenset(of) for of in table.tolist()}) > 25  # far more than 16 / 4 fixed groups
    assert (tables[0] != tables[1]).any(-1).float().mean() > 0.8
    assert torch.equal(tables[0], hash_table(counts, 16, 4, 0))


def test_unseen_tokens_are_spread_too() -> None:
    """After four tokens of different counts two experts have the least load: not all unseen ones go there."""
    table = hash_table(torch.tensor([1000, 900, 800, 700] + [0] * 996), 8, 2)
    assert table[4:].flatten().bincount(minlength=8).max() < 2 * 996 * 2 / 8


def test_table_is_made_in_main_memory_whatever_the_default_device() -> None:
    """On a GPU each token would take two operations, and a vocabulary minutes. Meta tensors have no numbers at all."""
    counts = torch.tensor([3, 0, 5, 1])
    want = hash_table(counts, E, K)
    with torch.device("meta"):
        assert torch.equal(hash_table(counts, E, K), want)
