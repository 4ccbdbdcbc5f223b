"""Closed forms of a model against the counts of dsmini.accounting, tensor by tensor, and against print."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from dsmini import ModelConfig
from dsmini.accounting import flops_per_token, parameters
from dsmini.planner.model.parameters import ModelFigures, dense_training_flops, model_figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, TOKENS
from tests.helpers.configs import CONFIGS, released
from tests.helpers.strategies import model_configs


def figures_of(config: ModelConfig, seq_len: int = 4096) -> ModelFigures:
    return model_figures(ModelInputs.of(config, "a test"), TOKENS(seq_len, "seq_len", "Tokens of a sequence", "a test"))


def check_against_accounting(config: ModelConfig, seq_len: int) -> None:
    figures, counted = figures_of(config, seq_len), parameters(config)
    layer, all_, flops = figures.layer, figures.parameters, figures.operations
    assert all_.parameters_main.value == counted.main
    assert all_.mtp_parameters.value == counted.mtp
    assert all_.parameters_total.value == counted.total
    assert all_.parameters_active.value == counted.active
    assert all_.routing_biases.value == counted.buffers
    assert all_.mtp_projection_parameters.value == counted.by_module.get("mtp projection", 0)
    assert all_.mtp_active.value == sum(n for k, n in counted.active_by_module.items() if k.startswith("mtp "))

    dense, moe = layer.dense_layers.value, layer.moe_layers.value
    assert (dense, moe) == (sum(not config.is_moe(i) for i in range(config.n_layers)), config.n_layers - dense)
    modules = {
        "embedding": all_.vocabulary_parameters.value,
        "head": all_.vocabulary_parameters.value,
        "attention": config.n_layers * layer.attention_parameters.value - counted.by_module.get("indexer", 0),
        "dense feed-forward": dense * layer.dense_parameters.value,
        "gates": moe * layer.gate_parameters.value,
        "routed experts": moe * config.n_routed_experts * layer.expert_parameters.value,
        "shared experts": moe * layer.shared_parameters.value,
        "norms": config.n_layers * layer.norm_parameters.value + config.dim * (2 if config.embed_norm else 1),
    }
    main = {k: n for k, n in counted.by_module.items() if not k.startswith("mtp ") and k != "indexer"}
    assert {k: n for k, n in modules.items() if n} == main

    def near(count: int) -> Any:
        # the mean of picked keys is not a whole number, and accounting rounds three products a layer down
        rounded = 9 * (config.n_layers + config.n_mtp_layers) if config.attention == "dsa" else 0
        return pytest.approx(count, rel=1e-12, abs=rounded)

    assert flops.forward_flops.value == near(flops_per_token(config, seq_len).total)
    learning = flops_per_token(config, seq_len, training=True, mtp=False)
    assert flops.training_flops.value == near(learning.total)
    assert flops.training_flops_mtp.value == near(flops_per_token(config, seq_len, training=True).total)
    whole = flops_per_token(config, seq_len, causal=False, training=True, mtp=False)
    assert flops.training_flops_full_square.value == near(whole.total)
    assert flops.attention_flops.value == near(flops_per_token(config, seq_len).by_module["attention over the context"])
    of_indexer = sum(n for name, n in learning.by_module.items() if name.endswith(" of the indexer"))
    assert (flops.indexer_flops.value if flops.indexer_flops else 0) == near(of_indexer)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_closed_forms_equal_the_counts_of_each_config(path: Path) -> None:
    check_against_accounting(ModelConfig.from_file(path), 4096)


@given(config=model_configs())
def test_closed_forms_equal_the_counts_of_any_model(config: ModelConfig) -> None:
    check_against_accounting(config, 7)


def test_v3_parameters_as_printed() -> None:
    """671B, 37B active, MTP 11.5B of its own and 2.4B active (V3 report and README)."""
    v3 = figures_of(released("deepseek-v3")).parameters
    assert v3.parameters_main.value == 671_026_404_352
    assert v3.routing_biases.value == 14_848 + 256  # and the MTP block's
    assert round(v3.parameters_active.value / 1e9, 2) == 36.62
    assert round(v3.parameters_active_with_embedding.value / 1e9, 2) == 37.55
    assert round(v3.mtp_parameters.value / 1e9, 3) == 11.610
    assert v3.mtp_parameters_without_projection.value == pytest.approx(11.5e9, rel=0.005)
    assert v3.mtp_active_printed.value == pytest.approx(2.4e9, rel=0.02)


@pytest.mark.parametrize(("name", "printed"), [("deepseek-v3", 250e9), ("deepseek-v2", 155e9)])
def test_training_flops_as_printed(name: str, printed: float) -> None:
    """Operations of a token in training at 4096 tokens: INS, table 2."""
    assert figures_of(released(name)).operations.training_flops.value == pytest.approx(printed, rel=0.005)


def test_training_flops_of_llama_as_printed() -> None:
    """3.8e25 for 405B parameters and 15.6T tokens: LL3."""
    parameters_ = COUNT(405e9, "llama_parameters", "Parameters", "LL3")
    found = dense_training_flops(parameters_, TOKENS(15.6e12, "llama_tokens", "Tokens", "LL3"))
    assert found.value == pytest.approx(3.8e25, rel=0.01)
    assert found.units == "FLOP"


def test_every_figure_of_a_model_is_named_once() -> None:
    found = figures_of(released("deepseek-v3")).figures()
    assert len(found) == 1 + 10 + 11 + 6
    assert all(figure.title and figure.op in ("name", "input") for figure in found.values())
