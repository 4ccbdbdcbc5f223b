"""Cache of a token as a formula, against the counts of dsmini.accounting and against print."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given

from dsmini import ModelConfig
from dsmini.accounting import kv_bytes_per_token, mha_kv_bytes_per_token
from dsmini.planner.model.kv_cache import (
    all_layers,
    cache_plan,
    cache_saving,
    longest_context,
    memory_left,
    row_numbers,
    sequences_that_fit,
)
from dsmini.planner.model.sizes_files import renamed
from dsmini.planner.quantities.formula import evaluate, gradient, inputs
from dsmini.planner.quantities.quantity import BYTES, COUNT, TOKENS
from tests.helpers.configs import released
from tests.helpers.serving_plans import (
    ALL,
    CHANGES,
    DTYPES,
    V3,
    changed,
    check_gradients,
    check_inputs_act,
    check_numbers_are_small,
    check_sources,
    model_of,
)
from tests.helpers.strategies import model_configs


def check_counts(config: ModelConfig) -> None:
    for dtype in DTYPES if config.is_mla else DTYPES[:2]:
        plan = cache_plan(model_of(config), dtype)
        assert plan.per_token.value == kv_bytes_per_token(config, dtype=dtype)
        assert plan.baseline.value == mha_kv_bytes_per_token(config, 4 if dtype == "float32" else 2)


@given(model_configs())
def test_cache_of_any_model_equals_the_count(config: ModelConfig) -> None:
    check_counts(config)


@pytest.mark.parametrize("config", ALL)
def test_cache_of_every_config_equals_the_count(config: ModelConfig) -> None:
    check_counts(config)


def gqa(n_layers: int, n_heads: int) -> ModelConfig:
    """Return a model with 8 groups of keys and values of 128, as LLaMA and Qwen have."""
    heads: dict[str, Any] = {"qk_nope_head_dim": 128, "v_head_dim": 128, "n_heads": n_heads, "n_kv_heads": 8}
    return ModelConfig(attention="gqa", n_layers=n_layers, **heads)


@pytest.mark.parametrize(
    ("config", "printed"),
    [(V3, 70_272), (gqa(80, 64), 327_680), (gqa(126, 128), 516_096)],
    ids=["DeepSeek-V3", "Qwen-2.5 72B", "LLaMA-3.1 405B"],
)
def test_cache_as_printed(config: ModelConfig, printed: int) -> None:
    """ "Insights into DeepSeek-V3", table 1: 70.272, 327.680 and 516.096 KB."""
    assert cache_plan(model_of(config), "bfloat16").per_token.value == printed


def test_v3_stores_as_much_as_two_and_a_quarter_groups() -> None:
    plan = cache_plan(model_of(V3), "bfloat16")
    assert plan.groups.value == 2.25
    assert f"{plan.saving.value:.2%}" == "98.24%"
    assert cache_plan(model_of(V3), "fp8").row.value == 656


def test_v2_saves_the_printed_share_of_deepseek_67b() -> None:
    """DeepSeek-V2 report, abstract: 93.3 % less than DeepSeek 67B, with numbers of 6 bits on average."""
    v2 = model_of(released("deepseek-v2"))
    older = renamed(model_of(gqa(95, 64)), "older_")
    bits = BYTES(0.75, "v2_cache_number", "Number in V2's cache: 6 bits", "V2 report: 6 bits an element on average")
    saved = cache_saving(all_layers(v2, row_numbers(v2) * bits), cache_plan(older, "bfloat16").per_token)
    assert saved.value == pytest.approx(0.933, abs=0.001)
    assert {"n_layers", "older_n_layers", "older_n_kv_heads"} <= inputs(saved).keys()


def test_what_fits_is_whole_and_fits() -> None:
    """208 sequences of 4096 tokens fill 60 GB: 208 * 4096 * 70,272 = 59.87e9, and 209 are 60.16e9."""
    per_token = cache_plan(model_of(V3), "bfloat16").per_token
    memory = BYTES(80e9, "memory", "Memory", "a test")
    left = memory_left(memory, BYTES(20e9, "weights", "Weights", "a test"))
    context = TOKENS(4096, "context", "Context", "a test")
    assert sequences_that_fit(left, context, per_token).value == 208
    assert 208 * 4096 * 70_272 <= 60e9 < 209 * 4096 * 70_272
    longest = longest_context(left, COUNT(208, "sequences", "Sequences", "a test"), per_token)
    assert longest.units == "token"
    assert 208 * longest.value * 70_272 <= 60e9 < 208 * (longest.value + 1) * 70_272
    assert evaluate(longest, {"memory": 140e9}) > longest.value


def test_nothing_fits_beside_weights_that_do_not_fit() -> None:
    left = memory_left(BYTES(80e9), BYTES(673e9))
    assert left.value == 0
    assert sequences_that_fit(left, TOKENS(4096), cache_plan(model_of(V3), "bfloat16").per_token).value == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_input_of_the_cache_acts(dtype: Any) -> None:
    def build(**change: Any) -> Any:
        config = V3
        for name, value in change.items():
            config = changed(config, name, value)
        return cache_plan(model_of(config), dtype)

    check_inputs_act(build, CHANGES, least=6)
    figures = list(build().figures().values())
    check_gradients(figures)
    check_numbers_are_small(figures)
    check_sources(figures)
    size = {"float32": {"fp32_size"}, "bfloat16": {"bf16_size"}, "fp8": {"fp8_size", "bf16_size", "fp32_size"}}
    sizes = {"n_layers", "kv_lora_rank", "qk_rope_head_dim", *size[dtype], *(["fp8_tile"] if dtype == "fp8" else [])}
    assert inputs(build().per_token).keys() == sizes


def test_slope_of_the_cache_is_what_one_more_rank_costs() -> None:
    plan = cache_plan(model_of(V3), "bfloat16")
    assert gradient(plan.per_token)["kv_lora_rank"] == 2 * 61


@pytest.mark.parametrize("kind", ["mha", "gqa", "mqa"])
def test_heads_of_a_baseline_act(kind: Any) -> None:
    config = dataclasses.replace(V3, attention=kind, n_kv_heads=8 if kind == "gqa" else None)
    plan = cache_plan(model_of(config), "bfloat16")
    assert ("n_heads" in inputs(plan.per_token)) == (kind == "mha")
    assert ("n_kv_heads" in inputs(plan.per_token)) == (kind == "gqa")


def test_refusal_of_caches_without_a_layout() -> None:
    with pytest.raises(ValueError, match="use bfloat16"):
        cache_plan(model_of(ModelConfig(attention="mha")), "fp8")
    with pytest.raises(ValueError, match="use float32, bfloat16 or fp8"):
        cache_plan(model_of(V3), "int8")  # pyright: ignore[reportArgumentType]
