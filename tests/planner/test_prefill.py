"""Prefill: the counts of dsmini.accounting on one GPU, routes between GPUs, and every input acts."""

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini import ModelConfig
from dsmini.accounting import prefill_bytes_per_token, step_flops
from dsmini.planner.binding import Resource
from dsmini.planner.quantities.formula import inputs
from dsmini.planner.serving.deployment import deployment, serving_workload, v3_prefill
from dsmini.planner.serving.prefill import prefill_plan
from tests.helpers.serving_plans import (
    CHANGES,
    V3,
    all_changes,
    check_gradients,
    check_inputs_act,
    check_numbers_are_small,
    check_sources,
    h800,
    model_of,
    planner_of,
)
from tests.helpers.strategies import model_configs


@given(
    config=model_configs(),
    batch=st.integers(1, 5),
    seq_len=st.integers(1, 99),
    dtype=st.sampled_from(["bfloat16", "fp8"]),
)
def test_one_gpu_of_any_model_as_counted(config: ModelConfig, batch: int, seq_len: int, dtype: Any) -> None:
    """FLOPs exactly; weights up to rounding, as the expected number of experts is a fraction."""
    workload = serving_workload(prompts=batch, prompt=seq_len)
    plan = prefill_plan(model_of(config), h800(), workload, deployment("prefill", weight_dtype=dtype))
    counted = step_flops(config, batch_size=batch, seq_len=seq_len, training=False, last_logits=True)
    assert (plan.times.matrix_flops + plan.times.other_flops).value == counted.total
    moved = prefill_bytes_per_token(config, seq_len=seq_len, batch=batch, dtype=dtype)
    weights = batch * seq_len * (moved.weights - moved.by_part["embedding"])
    assert plan.times.weights_read.value == pytest.approx(weights, rel=1e-12)
    assert plan.times.cache_read is None


def test_time_to_first_token_and_rate() -> None:
    plan = prefill_plan(model_of(V3), h800(), serving_workload(prompts=2, prompt=1000), v3_prefill())
    assert plan.time_to_first_token.value == plan.times.step.value
    assert plan.gpu_tokens_per_second.value == pytest.approx(2 * 2 * 1000 / plan.times.step.value, rel=1e-12)


def test_compute_binds_on_one_gpu_and_links_on_many() -> None:
    alone = prefill_plan(model_of(V3), h800(), serving_workload(prompts=2), deployment("prefill"))
    assert alone.times.binding.first.resource is Resource.COMPUTE
    many = prefill_plan(model_of(V3), h800(slow_link=40e9), serving_workload(), v3_prefill())
    assert many.times.binding.first.resource is Resource.LINKS_BETWEEN


def drawn(places: int, chosen: int, trials: int = 20_000) -> float:
    """Return the mean number of places that this many different experts of 256 are on, drawn."""
    source = random.Random(0)
    return sum(len({e % places for e in source.sample(range(256), chosen)}) for _ in range(trials)) / trials


def test_copies_that_two_hops_send() -> None:
    """Once to each chosen node but the own one, then once to each chosen GPU, but for the one that received it.

    A drawn mean of 20,000 has a standard error of 0.004 nodes and 0.006 GPUs: 1 % is more than four of them.
    """
    plan = prefill_plan(model_of(V3), h800(), serving_workload(prompts=1, prompt=1000), v3_prefill())
    sent = plan.times.exchange
    assert sent.slow is not None and sent.fast is not None
    copy = 58 * 2 * 1000 * 7168 * 3
    assert sent.slow.value == pytest.approx(copy * drawn(4, 8) * 3 / 4, rel=0.01)
    heads = 61 * 2 * 1000 * 7168 * 2 * 2 * 3
    assert sent.fast.value - heads == pytest.approx(copy * drawn(32, 8) * 7 / 8, rel=0.01)


@pytest.mark.parametrize(("limited", "reached"), [(1, 1), (2, 2), (3, 3), (8, 3.614)])
def test_groups_limit_the_nodes_of_a_token(limited: int, reached: float) -> None:
    config = dataclasses.replace(V3, n_limited_groups=limited)
    plan = prefill_plan(model_of(config), h800(), serving_workload(prompts=1, prompt=1000), v3_prefill())
    assert plan.times.exchange.slow is not None
    assert plan.times.exchange.slow.value == pytest.approx(58 * 2 * 1000 * 7168 * 3 * reached * 3 / 4, rel=1e-3)


def test_a_group_that_spans_nodes_reaches_all_of_its_own() -> None:
    """Two groups of two nodes each, one group a token: two nodes."""
    config = dataclasses.replace(V3, n_expert_groups=2, n_limited_groups=1)
    plan = prefill_plan(model_of(config), h800(), serving_workload(prompts=1, prompt=1000), v3_prefill())
    assert plan.times.exchange.slow is not None
    assert plan.times.exchange.slow.value == pytest.approx(58 * 2 * 1000 * 7168 * 3 * 2 * 3 / 4, rel=1e-9)


# --- inputs


@pytest.mark.parametrize("limited", [2, 4])
def test_every_input_of_prefill_acts(limited: int) -> None:
    def plan(model: Any, *rest: Any) -> Any:
        if model.config.n_limited_groups == V3.n_limited_groups:
            model = model_of(dataclasses.replace(model.config, n_limited_groups=limited))
        return prefill_plan(model, *rest)

    changes = all_changes(v3_prefill(), prefill_imbalance=1.25)
    check_inputs_act(planner_of(plan, v3_prefill()), changes, least=len(changes) - 4)
    figures = list(planner_of(plan, v3_prefill())().figures().values())
    check_gradients(figures)
    check_numbers_are_small(figures)
    check_sources(figures)


def test_headline_figures_depend_on_what_they_must() -> None:
    figures = prefill_plan(model_of(V3), h800(), serving_workload(), v3_prefill()).figures()
    first = set(inputs(figures["prefill_time_to_first_token"]))
    assert CHANGES.keys() <= first
    rates = {"bf16_peak", "fp8_peak", "memory_bandwidth", "fast_link", "slow_link", "gpus_per_node"}
    assert rates | {"prompts", "prompt", "prefill_tensor_parallel", "prefill_expert_parallel"} <= first
    assert not {"sequences", "context", "acceptance"} & first
