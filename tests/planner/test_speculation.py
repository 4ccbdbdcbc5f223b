"""Speculation: accepted tokens as printed, and the cost of drafts and of verifying them."""

import dataclasses
from typing import Any

import pytest

from dsmini.planner.quantities.formula import evaluate, inputs
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment import deployment, serving_workload, v3_decode
from dsmini.planner.serving.speculation import accepted_tokens, speculation_plan
from tests.helpers.serving_plans import (
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


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.85, 1.85), (0.9, 1.9)])
def test_one_draft_as_printed(acceptance: float, tokens: float) -> None:
    """DeepSeek-V3 report, section 5.4.3: 85 to 90 % accepted, 1.8 times the tokens a second."""
    found = accepted_tokens(serving_workload(acceptance=acceptance))
    assert found.value == pytest.approx(tokens, rel=1e-12)
    assert found.value == pytest.approx(1.8, rel=0.06)


@pytest.mark.parametrize("drafts", [1, 2, 5])
@pytest.mark.parametrize("p", [0.0, 0.5, 0.9])
def test_tokens_of_several_drafts_by_cases(drafts: int, p: float) -> None:
    """Sum over how many drafts in a row are accepted: each case gives one token more than that."""
    cases = [p**n * (1 - p) * (n + 1) for n in range(drafts)] + [p**drafts * (drafts + 1)]
    found = accepted_tokens(serving_workload(drafts=drafts, acceptance=p))
    assert found.value == pytest.approx(sum(cases), rel=1e-12)


def test_verifying_reads_the_cache_once_and_computes_twice() -> None:
    workload = serving_workload(drafts=1)
    plain = decode_plan(model_of(V3), h800(), workload, v3_decode()).times
    verify = speculation_plan(model_of(V3), h800(), workload, v3_decode()).verify
    assert plain.cache_read is not None and verify.cache_read is not None
    assert verify.cache_read.value == plain.cache_read.value
    assert verify.matrix_flops.value == 2 * plain.matrix_flops.value
    assert verify.other_flops.value == 2 * plain.other_flops.value
    assert plain.exchange.slow is not None and verify.exchange.slow is not None
    assert verify.exchange.slow.value == 2 * plain.exchange.slow.value


def test_verifying_a_few_sequences_reads_more_experts() -> None:
    plan = speculation_plan(model_of(V3), h800(), serving_workload(sequences=1), deployment("decode"))
    assert plan.verify.experts_read.value == pytest.approx(16 - 8 * 8 / 256, rel=1e-12), "two draws of 8 of 256"
    assert plan.draft.experts_read.value == pytest.approx(8, rel=1e-12)


def test_draft_is_one_block_with_projection_and_head() -> None:
    """One sequence on one GPU, so that the block's parts can be added up by hand."""
    workload = serving_workload(sequences=1, context=100)
    draft = speculation_plan(model_of(V3), h800(), workload, deployment("decode")).draft
    swiglu = 3 * 7168 * 2048
    attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 16384 * 7168
    assert draft.matrix_flops.value == pytest.approx(2 * (attention + 9 * swiglu), rel=1e-12)
    rest = 512 * 32768 + 256 * 7168 + 2 * 7168 * 7168 + 129280 * 7168 + 100 * 128 * (2 * 512 + 64)
    assert draft.other_flops.value == pytest.approx(2 * rest, rel=1e-12)
    assert draft.cache_read is not None and draft.cache_read.value == 100 * 1152


def test_gain_is_what_the_steps_say() -> None:
    workload = serving_workload(drafts=2, acceptance=0.8)
    plain = decode_plan(model_of(V3), h800(), workload, v3_decode()).times
    plan = speculation_plan(model_of(V3), h800(), workload, v3_decode())
    step = plan.verify.step.value + 2 * plan.draft.step.value
    assert plan.step.value == pytest.approx(step, rel=1e-12)
    assert plan.gain.value == pytest.approx((1 + 0.8 + 0.64) * plain.step.value / step, rel=1e-12)
    assert plan.tokens_per_second.value == pytest.approx((1 + 0.8 + 0.64) / step, rel=1e-12)


def test_gain_is_large_where_memory_binds_and_none_where_links_do() -> None:
    """Long contexts share the read of the cache; where links bind a verifying step takes twice the time."""
    long = speculation_plan(model_of(V3), h800(), serving_workload(context=8192), v3_decode())
    assert 1.7 < long.gain.value < 1.85
    short = speculation_plan(model_of(V3), h800(), serving_workload(context=100), v3_decode())
    assert short.gain.value < 1
    assert evaluate(short.gain, {"slow_link": 1e15, "fast_link": 1e15}) > 1.5


def test_refusal_of_a_model_without_drafts() -> None:
    config = dataclasses.replace(V3, n_mtp_layers=0)
    with pytest.raises(ValueError, match="n_mtp_layers=0 leaves no block to draft with"):
        speculation_plan(model_of(config), h800(), serving_workload(), v3_decode())


def test_drafts_of_a_dense_model() -> None:
    config = dataclasses.replace(V3, n_dense_layers=62)
    plan = speculation_plan(model_of(config), h800(), serving_workload(), deployment("decode"))
    dense = 3 * 7168 * 18432
    attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 16384 * 7168
    assert plan.draft.matrix_flops.value == pytest.approx(2 * 32 * (attention + dense), rel=1e-12)


# --- inputs


@pytest.mark.parametrize("context", [500, 8192])
def test_every_input_of_speculation_acts(context: int) -> None:
    build = planner_of(speculation_plan, v3_decode(), serving_workload(context=context))
    other = {"decode_expert_parallel": 160, "decode_redundant_experts": 384}
    changes = all_changes(v3_decode(), **other)
    idle = {"prompts", "prompt", "n_limited_groups", "n_expert_groups", "memory"}
    check_inputs_act(build, changes, least=len(changes.keys() - idle))
    figures = list(build().figures().values())
    check_gradients(figures)
    check_numbers_are_small(figures)
    check_sources(figures)
    gain: Any = build().figures()["speculation_gain"]
    assert {"acceptance", "drafts", "context", "slow_link", "memory_bandwidth", "vocab_size"} <= inputs(gain).keys()
