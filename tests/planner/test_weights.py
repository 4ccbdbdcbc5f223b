"""Weights by part, against the counts of dsmini.accounting."""

from typing import Any

import pytest
from hypothesis import given

from dsmini import ModelConfig
from dsmini.accounting import parameters, weight_bytes
from dsmini.planner.model.weights import weights
from dsmini.planner.quantities.formula import inputs
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
    for dtype in DTYPES:
        made = weights(model_of(config), dtype)
        assert made.total.value == weight_bytes(config, dtype, mtp=False).total
        assert made.active.value == parameters(config).active


@given(model_configs())
def test_weights_of_any_model_equal_the_count(config: ModelConfig) -> None:
    check_counts(config)


@pytest.mark.parametrize("config", ALL)
def test_weights_of_every_config_equal_the_count(config: ModelConfig) -> None:
    check_counts(config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_more_mtp_block_adds_a_block_and_its_projection(dtype: Any) -> None:
    made = weights(model_of(V3), dtype)
    block = made.head_matrices.bytes + made.latent_up.bytes + made.latent_down.bytes + made.norms.bytes
    experts = 256 * made.expert.bytes + made.shared.bytes + made.gate.bytes
    counted = weight_bytes(V3, dtype).total - weight_bytes(V3, dtype, mtp=False).total
    assert (block + experts + made.projection.bytes).value == counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_input_of_the_weights_acts(dtype: Any) -> None:
    def build(**change: Any) -> Any:
        config = V3
        for name, value in change.items():
            config = changed(config, name, value)
        return weights(model_of(config), dtype)

    check_inputs_act(build, CHANGES, least=15)
    figures = list(build().figures().values())
    check_gradients([build().total])
    check_numbers_are_small(figures)
    check_sources(figures)
    sizes = {"n_activated_experts", "n_limited_groups", "n_expert_groups"}
    assert "n_activated_experts" in inputs(build().active)
    assert CHANGES.keys() - sizes <= inputs(build().total).keys()


def test_refusal_of_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="use float32, bfloat16 or fp8"):
        weights(model_of(V3), "int8")  # pyright: ignore[reportArgumentType]
