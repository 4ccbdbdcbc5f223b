"""The gate against the paper's text in plain Python, on random logits, biases and groups, ties included."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini import Gate
from dsmini.nn import Routing, route
from tests.helpers.tolerances import FP32_UNIT, FP64_UNIT, relative_error, rounding


class Case(NamedTuple):
    logits: Tensor
    bias: Tensor
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Case:
    """Logits on a coarse grid, so that ties are common, and biases of any sign and size."""
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


def group_of(expert: int, case: Case) -> int:
    return expert // (case.logits.shape[1] // case.options["n_expert_groups"])


def scores_by_the_text(logits: list[float], score_func: str) -> list[float]:
    exps = np.exp(np.array(logits, dtype=np.float64))
    return list(exps / (1 + exps) if score_func == "sigmoid" else exps / exps.sum())


def chosen_by_the_text(scores: np.ndarray, bias: np.ndarray | None, case: Case) -> list[int]:
    """Experts by descending biased score from the best groups; the lower index first among equals."""
    value = scores if bias is None else scores + bias
    e, g = len(value), case.options["n_expert_groups"]

    def group_score(group: int) -> float:
        best = sorted((value[i] for i in range(e) if group_of(i, case) == group), reverse=True)
        return best[0] if bias is None else best[0] + best[1]

    kept = sorted(range(g), key=lambda group: (-group_score(group), group))[: case.options["n_limited_groups"]]
    allowed = [i for i in range(e) if group_of(i, case) in kept]
    return sorted(allowed, key=lambda i: (-value[i], i))[: case.options["n_activated_experts"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False], ids=["v3", "v2"])
def test_route_follows_the_text(dtype: torch.dtype, biased: bool) -> None:
    unit = FP32_UNIT if dtype == torch.float32 else FP64_UNIT

    @given(cases(dtype))
    def check(case: Case) -> None:
        got = route(case.logits, case.bias if biased else None, **case.options)
        bias = case.bias.numpy() if biased else None
        for row, logits in enumerate(case.logits.tolist()):
            scores = scores_by_the_text(logits, case.options["score_func"])
            torch.testing.assert_close(
                got.scores[row].double(), torch.tensor(scores), rtol=rounding(unit, terms=len(scores)), atol=0
            )
            want = chosen_by_the_text(got.scores[row].numpy(), bias, case)
            assert got.indices[row].tolist() == want

            weights = torch.tensor([scores[i] for i in want])
            if case.options["norm_topk_prob"]:
                weights = weights / weights.sum()
            weights = weights * case.options["route_scale"]
            assert relative_error(got.weights[row], weights) <= rounding(unit, terms=len(scores))

    check()


@given(cases())
def test_every_token_gets_k_distinct_experts_of_few_groups(case: Case) -> None:
    for row in route(case.logits, case.bias, **case.options).indices.tolist():
        assert len(set(row)) == len(row) == case.options["n_activated_experts"]
        assert len({group_of(i, case) for i in row}) <= case.options["n_limited_groups"]


@given(cases(), st.floats(1e-3, 1e6))
def test_negative_biases_of_any_size_let_no_excluded_group_in(case: Case, size: float) -> None:
    bias = -size * (1 + case.bias.sub(case.bias.min()).div(case.bias.abs().max() + 1))
    routing = route(case.logits, bias, **case.options)
    for row, scores in zip(routing.indices.tolist(), routing.scores.numpy(), strict=True):
        assert row == chosen_by_the_text(scores, bias.numpy(), case)


@given(cases())
def test_bias_steers_selection_but_not_weights(case: Case) -> None:
    routing = route(case.logits, case.bias, **case.options)
    weights = route(case.logits, None, **case.options).scores.gather(1, routing.indices)
    if case.options["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights, weights * case.options["route_scale"])


@given(cases())
def test_normalised_weights_sum_to_route_scale(case: Case) -> None:
    routing = route(case.logits, case.bias, **case.options | {"norm_topk_prob": True})
    scale = torch.full((len(routing.weights),), case.options["route_scale"])
    torch.testing.assert_close(routing.weights.sum(-1), scale)


@given(cases())
def test_counts_are_those_of_a_plain_count(case: Case) -> None:
    routing = route(case.logits, case.bias, **case.options)
    count = Counter(routing.indices.flatten().tolist())
    assert routing.counts.tolist() == [count[i] for i in range(case.logits.shape[1])]


def v3(logits: Tensor, bias: Tensor | None, k: int = 4, groups: int = 1, limited: int = 1) -> Routing:
    return route(logits, bias, n_activated_experts=k, n_expert_groups=groups, n_limited_groups=limited)


@pytest.mark.parametrize("e", [8, 64, 256])
def test_lower_expert_wins_among_equal_scores(e: int) -> None:
    tied = v3(torch.zeros(33, e), torch.zeros(e), k=8)
    assert (tied.indices == torch.arange(8)).all()

    grouped = v3(torch.zeros(33, e), torch.full((e,), -1.0), k=4, groups=4, limited=2)
    assert (grouped.indices == torch.arange(4)).all()


def test_identical_rows_get_identical_experts() -> None:
    row = (torch.randn(256) * 4).round() / 4
    routing = v3(row.expand(130, -1), torch.zeros(256), k=8, groups=8, limited=4)
    assert (routing.indices == routing.indices[0]).all()
    assert len(row.unique()) < 60


def test_group_score_is_best_two_with_bias_else_best_one() -> None:
    one_star_and_a_pair = torch.tensor([[0.9, 0.1, 0.6, 0.6]]).logit()
    assert v3(one_star_and_a_pair, torch.zeros(4), k=1, groups=2).indices.item() == 2
    assert v3(one_star_and_a_pair, None, k=1, groups=2).indices.item() == 0


@given(cases())
def test_bias_of_zero_equals_no_bias_without_groups(case: Case) -> None:
    options = case.options | {"n_expert_groups": 1, "n_limited_groups": 1}
    zero, none = (route(case.logits, bias, **options) for bias in (torch.zeros_like(case.bias), None))
    assert all(torch.equal(a, b) for a, b in zip(zero, none, strict=True))


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


def test_gates_weights_carry_gradient_to_the_chosen_scores_only() -> None:
    logits = torch.randn(5, 8, requires_grad=True)
    routing = route(logits, -torch.rand(8), n_activated_experts=3, norm_topk_prob=False)
    (grad,) = torch.autograd.grad(routing.weights.sum(), logits)
    scores = routing.scores.detach()
    chosen = torch.zeros(5, 8).scatter(1, routing.indices, 1.0)
    torch.testing.assert_close(grad, scores * (1 - scores) * chosen)
