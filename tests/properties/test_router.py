"""The gate against tests/reference_model.py on random logits, biases and groups, ties included."""

from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsmini import Gate
from dsmini.nn import Routing, route
from tests import reference_model as reference
from tests.helpers.tolerances import FP32_UNIT, FP64_UNIT, relative_error, rounding


class Case(NamedTuple):
    logits: Tensor
    bias: Tensor
    options: dict[str, Any]

    def routed(self, bias: Tensor | None, **changes: Any) -> Routing:
        return route(self.logits, bias, **self.options | changes)


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


def assert_follows_the_text(case: Case, bias: Tensor | None) -> None:
    got, c = case.routed(bias), SimpleNamespace(**case.options)
    indices, weights, scores = reference.route(case.logits, bias, c)
    assert torch.equal(got.indices, indices)
    unit = FP32_UNIT if case.logits.dtype == torch.float32 else FP64_UNIT
    near = rounding(unit, terms=case.logits.shape[1])
    exact = case.logits.double()
    exact = exact.sigmoid() if c.score_func == "sigmoid" else exact.exp() / exact.exp().sum(-1, keepdim=True)
    assert torch.allclose(got.scores.double(), exact, rtol=near, atol=0)
    assert relative_error(got.weights, weights) <= near and relative_error(got.scores, scores) <= near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False], ids=["v3", "v2"])
def test_route_follows_the_text(dtype: torch.dtype, biased: bool) -> None:
    @given(cases(dtype))
    def check(case: Case) -> None:
        assert_follows_the_text(case, case.bias if biased else None)

    check()


@given(cases(), st.floats(1e-3, 1e6))
def test_negative_biases_of_any_size_let_no_excluded_group_in(case: Case, size: float) -> None:
    bias = -size * (1 + case.bias.sub(case.bias.min()).div(case.bias.abs().max() + 1))
    assert_follows_the_text(case, bias)


@given(cases())
def test_every_token_gets_k_distinct_experts_of_few_groups(case: Case) -> None:
    routing, in_group = case.routed(case.bias), case.logits.shape[1] // case.options["n_expert_groups"]
    for row in routing.indices.tolist():
        assert len(set(row)) == len(row) == case.options["n_activated_experts"]
        assert len({i // in_group for i in row}) <= case.options["n_limited_groups"]
    count = Counter(routing.indices.flatten().tolist())
    assert routing.counts.tolist() == [count[i] for i in range(case.logits.shape[1])]


@given(cases())
def test_bias_steers_selection_but_not_weights(case: Case) -> None:
    routing = case.routed(case.bias)
    weights = case.routed(None).scores.gather(1, routing.indices)
    if case.options["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdim=True)
    assert torch.allclose(routing.weights, weights * case.options["route_scale"], rtol=1.3e-6)


@given(cases())
def test_normalised_weights_sum_to_route_scale(case: Case) -> None:
    total = case.routed(case.bias, norm_topk_prob=True).weights.sum(-1)
    assert torch.allclose(total, torch.full_like(total, case.options["route_scale"]), rtol=1.3e-6)


def v3(logits: Tensor, bias: Tensor | None, k: int = 4, groups: int = 1, limited: int = 1) -> Routing:
    return route(logits, bias, n_activated_experts=k, n_expert_groups=groups, n_limited_groups=limited)


@pytest.mark.parametrize("e", [8, 64, 256])
def test_lower_expert_wins_among_equal_scores(e: int) -> None:
    tied = v3(torch.zeros(33, e), torch.zeros(e), k=8)
    assert (tied.indices == torch.arange(8)).all()
    grouped = v3(torch.zeros(33, e), torch.full((e,), -1.0), k=4, groups=4, limited=2)
    assert (grouped.indices == torch.arange(4)).all()


def test_group_score_is_best_two_with_bias_else_best_one() -> None:
    one_star_and_a_pair = torch.tensor([[0.9, 0.1, 0.6, 0.6]]).logit()
    assert v3(one_star_and_a_pair, torch.zeros(4), k=1, groups=2).indices.item() == 2
    assert v3(one_star_and_a_pair, None, k=1, groups=2).indices.item() == 0


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
