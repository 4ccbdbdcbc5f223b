"""V4's gates: the score function, experts looked up by token ids, and the table's making."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dsmini.nn import Context, MoE, route
from dsmini.nn.gate import HashGate, hash_table
from tests.helpers.configs import refusal

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


def test_hash_gate_refuses_another_width() -> None:
    forward: Any = inspect.unwrap(HashGate.logits)
    assert f"want [n, {M}], a row for each token" in refusal(forward, HashGate(**SIZES), torch.zeros(3, M - 1))


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
