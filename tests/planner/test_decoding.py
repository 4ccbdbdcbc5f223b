"""Decoding: the counts of dsmini.accounting on one GPU, printed limits on many, and every input acts."""

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsmini import ModelConfig
from dsmini.accounting import decode_bytes_per_token, decode_flops_per_token, expected_experts
from dsmini.planner.binding import Resource
from dsmini.planner.quantities.formula import evaluate, inputs
from dsmini.planner.quantities.quantity import FLOPS_PER_SECOND
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment import deployment, serving_workload, v3_decode
from dsmini.planner.serving.exchange import exchange_limit
from tests.helpers.serving_plans import (
    CHANGES,
    SETTINGS,
    V3,
    all_changes,
    check_gradients,
    check_inputs_act,
    check_numbers_are_small,
    check_sources,
    gb200,
    h800,
    model_of,
    planner_of,
    with_numbers,
)
from tests.helpers.strategies import model_configs


@given(config=model_configs(), batch=st.integers(1, 40), dtype=st.sampled_from(["bfloat16", "fp8"]), data=st.data())
def test_one_gpu_of_any_model_as_counted(config: ModelConfig, batch: int, dtype: Any, data: st.DataObject) -> None:
    """Equal up to rounding: the expected number of experts is a fraction, multiplied in another order."""
    assume(config.attention != "mla" or not config.qk_norm)
    context = data.draw(st.integers(1, config.max_seq_len))
    workload = serving_workload(sequences=batch, context=context)
    times = decode_plan(model_of(config), h800(), workload, deployment("decode", weight_dtype=dtype)).times
    moved = decode_bytes_per_token(config, context=context, batch=batch, dtype=dtype)
    weights = batch * (moved.weights - moved.by_part["embedding"])
    assert times.weights_read.value == pytest.approx(weights, rel=1e-12)
    assert times.cache_read is not None
    assert times.cache_read.value == pytest.approx(batch * moved.by_part["cache read"], rel=1e-12)
    flops = (times.matrix_flops + times.other_flops).value
    assert flops == batch * decode_flops_per_token(config, context=context).total
    assert times.experts_read.value == pytest.approx(expected_experts(config, batch), rel=1e-12)


def test_limit_of_the_links_as_printed() -> None:
    """INS, section 2.3.2: 120.96 us, 14.76 ms and 67 tokens/s, from a width of 7000."""
    limit = exchange_limit(model_of(V3), h800(), v3_decode(), serving_workload(sequences=32).sequences)
    assert limit is not None
    assert evaluate(limit.block_time, {"dim": 7000}) == pytest.approx(120.96e-6, rel=1e-12)
    assert evaluate(limit.token_time, {"dim": 7000}) == pytest.approx(14.76e-3, rel=1e-3)
    assert int(evaluate(limit.tokens_per_second, {"dim": 7000})) == 67
    assert limit.token_time.value == pytest.approx(15.11e-3, rel=1e-3)
    assert limit.block_time.value == 3 * 32 * 9 * 7168 / 50e9


def test_limit_of_gb200_as_printed() -> None:
    """The same section: 6.72 us, 0.82 ms and about 1200 tokens/s."""
    made = deployment("decode", expert_parallel=72, redundant_experts=32, micro_batches=2, shared_remote=True)
    limit = exchange_limit(model_of(V3), gb200(), made, serving_workload(sequences=32).sequences)
    assert limit is not None
    assert evaluate(limit.block_time, {"dim": 7000}) == pytest.approx(6.72e-6, rel=1e-12)
    assert evaluate(limit.token_time, {"dim": 7000}) == pytest.approx(0.82e-3, rel=1e-3)
    assert evaluate(limit.tokens_per_second, {"dim": 7000}) == pytest.approx(1200, rel=0.02)


def test_links_of_the_plan_are_the_limit_without_dense_layers_and_own_node() -> None:
    workload = serving_workload(sequences=32)
    plan = decode_plan(model_of(V3), h800(), workload, v3_decode())
    limit = exchange_limit(model_of(V3), h800(), v3_decode(), workload.sequences)
    assert limit is not None and plan.times.slow_time is not None
    share = 58 / 61 * (320 - 8) / 320
    assert plan.times.slow_time.value == pytest.approx(limit.token_time.value * share, rel=1e-12)


def test_one_gpu_sends_nothing() -> None:
    plan = decode_plan(model_of(V3), h800(), serving_workload(), deployment("decode"))
    assert exchange_limit(model_of(V3), h800(), deployment("decode"), serving_workload().sequences) is None
    assert plan.times.slow_time is None and plan.times.fast_time is None


def test_experts_of_one_node_use_the_fast_link() -> None:
    made = deployment("decode", expert_parallel=8)
    times = decode_plan(model_of(V3), h800(), serving_workload(sequences=32), made).times
    assert times.slow_time is None and times.fast_time is not None
    assert times.fast_time.value == pytest.approx(58 * 32 * 8 * 7168 * 3 * 7 / 8 / 160e9, rel=1e-12)


def test_step_is_the_slowest_and_in_turn_the_sum() -> None:
    times = decode_plan(model_of(V3), h800(), serving_workload(), v3_decode()).times
    assert times.cache_time is not None and times.slow_time is not None and times.fast_time is not None
    parts = [times.memory_time, times.compute_time, times.slow_time, times.fast_time]
    assert times.memory_time.value == times.weights_time.value + times.cache_time.value
    assert times.step.value == max(part.value for part in parts)
    assert times.in_turn.value == pytest.approx(sum(part.value for part in parts), rel=1e-12)
    compute = times.matrix_flops.value / 1979e12 + times.other_flops.value / 989e12
    assert times.compute_time.value == pytest.approx(compute, rel=1e-12)


def test_gpus_together_compute_what_their_tokens_need() -> None:
    """320 GPUs with two micro-batches of 32 sequences: nothing is computed twice, and nothing is left out."""
    times = decode_plan(model_of(V3), h800(), serving_workload(sequences=32), v3_decode()).times
    counted = decode_flops_per_token(V3, context=4096).total
    assert 320 * (times.matrix_flops + times.other_flops).value == 320 * 64 * counted


def test_imbalance_delays_the_busiest_gpu() -> None:
    """Half more tokens than the mean: half more products with routed experts, half more bytes between nodes."""
    workload = serving_workload(sequences=32)
    even = decode_plan(model_of(V3), h800(), workload, v3_decode()).times
    odd = decode_plan(model_of(V3), h800(), workload, with_numbers(v3_decode(), {"decode_imbalance": 1.5})).times
    experts = 2 * 64 * 58 * 8 * 3 * 7168 * 2048
    assert (odd.matrix_flops - even.matrix_flops).value == pytest.approx(experts / 2, rel=1e-9)
    assert odd.exchange.slow is not None and even.exchange.slow is not None
    assert odd.exchange.slow.value == 1.5 * even.exchange.slow.value


def test_fp32_model_computes_at_its_own_peak() -> None:
    peak = FLOPS_PER_SECOND(60e12, "fp32_peak", "FP32 peak", "a test")
    hardware = dataclasses.replace(h800(), peaks={"float32": peak})
    made = deployment("decode", weight_dtype="float32", cache_dtype="float32")
    times = decode_plan(model_of(V3), hardware, serving_workload(), made).times
    assert times.compute_time.value == pytest.approx((times.matrix_flops + times.other_flops).value / 60e12, rel=1e-12)
    assert times.cache_read is not None and times.cache_read.value == 32 * 4096 * 2 * 70_272


@pytest.mark.parametrize(
    ("context", "resource"), [(1600, Resource.LINKS_BETWEEN), (1700, Resource.MEMORY), (100_000, Resource.MEMORY)]
)
def test_long_contexts_move_the_binding_to_memory(context: int, resource: Resource) -> None:
    times = decode_plan(model_of(V3), h800(), serving_workload(context=context), v3_decode()).times
    assert times.binding.first.resource is resource
    assert times.binding.first.time.value == times.step.value


def test_tokens_a_second() -> None:
    plan = decode_plan(model_of(V3), h800(), serving_workload(sequences=32), v3_decode())
    assert plan.tokens_per_second.value == pytest.approx(1 / plan.times.step.value, rel=1e-12)
    assert plan.gpu_tokens_per_second.value == pytest.approx(64 / plan.times.step.value, rel=1e-12)
    assert plan.time_per_token.value == plan.times.step.value
    assert (plan.tokens_per_second.units, plan.time_per_token.units) == ("token/s", "s/token")


def test_more_sequences_give_a_gpu_more_and_each_fewer_tokens() -> None:
    plans = [
        decode_plan(model_of(V3), h800(), serving_workload(sequences=n, context=context), v3_decode())
        for n in (8, 64)
        for context in (1000, 8000)
    ]
    rates = [(plan.tokens_per_second.value, plan.gpu_tokens_per_second.value) for plan in plans]
    assert rates[0][0] > rates[1][0] > rates[3][0] and rates[0][0] > rates[2][0]
    assert rates[2][1] > rates[0][1]


def test_refusal_of_mla_that_cannot_be_absorbed() -> None:
    with pytest.raises(ValueError, match="qk_norm=False"):
        decode_plan(model_of(ModelConfig(qk_norm=True)), h800(), serving_workload(), deployment("decode"))


# --- inputs


@pytest.mark.parametrize("context", [500, 4096])
def test_every_input_of_decoding_acts(context: int) -> None:
    """Links bind at 500 tokens, memory at 4096: a maximum must follow whatever binds."""
    build = planner_of(decode_plan, v3_decode(), serving_workload(context=context))
    other = {"decode_expert_parallel": 160, "decode_redundant_experts": 384}
    changes = all_changes(v3_decode(), **other)
    idle = {"prompts", "prompt", "drafts", "acceptance", "n_limited_groups", "n_expert_groups"}
    check_inputs_act(build, changes, least=len(changes.keys() - idle))
    figures = list(build().figures().values())
    check_gradients(figures)
    check_numbers_are_small(figures)
    check_sources(figures)


def test_headline_figures_depend_on_what_they_must() -> None:
    figures = decode_plan(model_of(V3), h800(), serving_workload(), v3_decode()).figures()

    def needs(name: str) -> set[str]:
        return set(inputs(figures[name]))

    step = needs("decode_time_per_token")
    assert CHANGES.keys() - {"n_limited_groups", "n_expert_groups"} <= step
    assert SETTINGS.keys() - {"memory"} <= step
    deployed = {"tensor_parallel", "expert_parallel", "redundant_experts", "micro_batches", "imbalance"}
    assert {f"decode_{name}" for name in deployed} <= step
    assert {"sequences", "context", "bf16_size", "fp8_size", "fp32_size", "fp8_tile"} <= step
    limit = exchange_limit(model_of(V3), h800(), v3_decode(), serving_workload().sequences)
    assert limit is not None and set(inputs(limit.token_time)) == {
        *("dim", "n_layers", "n_activated_experts", "n_shared_experts", "sequences", "slow_link"),
        *("decode_dispatch_number", "decode_combine_number", "decode_micro_batches"),
    }
    assert {"memory", "context", "kv_lora_rank", "moe_inter_dim"} <= needs("decode_sequences_that_fit")
    assert "memory_bandwidth" not in needs("decode_memory_share")
