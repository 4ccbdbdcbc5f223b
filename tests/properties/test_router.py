"""The gate against tests/reference_model.py on random logits, biases and groups, ties included."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmini import Gate
from dsmini.nn import route
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
