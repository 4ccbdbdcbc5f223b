"""Parameters, counted from the config, against the model that is built and against print."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given

from dsmini import ModelConfig, Transformer
from dsmini.accounting import parameters
from tests.helpers.configs import CONFIGS, released
from tests.helpers.strategies import model_configs

V3 = released("deepseek-v3")
V2 = released("deepseek-v2")

# A parameter's name, without its block's, to the module it is counted in.
MODULES = {
    r"embed\.weight": "embedding",
    r"head\.weight": "head",
    r"eh_proj\.weight": "projection",
    r"attn\.indexer\.k_norm\.(weight|bias)": "norms",
    r"attn\.indexer\.(wq_b|wk|weights_proj)\.weight": "indexer",
    r"([eh]|embed_|attn_|ffn_|attn\.q_|attn\.kv_|attn\.[qk]_head_)?norm\.weight": "norms",
    r"attn\.w\w+\.weight": "attention",
    r"ffn\.w[123]\.weight": "dense feed-forward",
    r"ffn\.gate\.weight": "gates",
    r"ffn\.experts\.w[123]": "routed experts",
    r"ffn\.shared_experts\.w[123]\.weight": "shared experts",
}


def module_of(name: str) -> str:
    inner = re.sub(r"^(layers\.\d+\.|mtp\.\d+\.(block\.)?)", "", name)
    (module,) = [module for pattern, module in MODULES.items() if re.fullmatch(pattern, inner)]
    return f"mtp {module}" if name.startswith("mtp.") else module


def check_against_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    counted = parameters(config)
    built = Counter[str]()
    for name, parameter in model.named_parameters():
        built[module_of(name)] += parameter.numel()
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.by_module == built
    assert counted.buffers == sum(b.numel() for b in model.buffers())
    assert counted.mtp == sum(p.numel() for p in model.mtp.parameters())
    assert counted.main == counted.total - counted.mtp


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_parameters_of_the_released_sizes(path: Path) -> None:
    check_against_the_model(ModelConfig.from_file(path))


@given(config=model_configs())
def test_parameters_of_any_model(config: ModelConfig) -> None:
    check_against_the_model(config)


def test_v3_as_printed() -> None:
    """671B, 37B active; MTP 11.5B of its own, 2.4B active: DeepSeek-V3 report and model card."""
    counted = parameters(V3)
    assert counted.main == 671_026_404_352
    assert parameters(dataclasses.replace(V3, n_mtp_layers=0)).total == counted.main
    assert parameters(dataclasses.replace(V3, n_mtp_layers=0)).buffers == 14_848
    assert counted.buffers == 14_848 + 256
    assert round(counted.active / 1e9, 2) == 36.62
    assert round((counted.active + counted.by_module["embedding"]) / 1e9, 2) == 37.55

    assert round(counted.mtp / 1e9, 3) == 11.610
    assert round((counted.mtp - counted.by_module["mtp projection"]) / 1e9, 3) == 11.507
    assert counted.mtp - counted.by_module["mtp projection"] == pytest.approx(11.5e9, rel=0.005)
    met = sum(n for k, n in counted.active_by_module.items() if k.startswith("mtp ") and k != "mtp projection")
    assert met + counted.by_module["embedding"] == pytest.approx(2.4e9, rel=0.02)


def test_other_models_as_printed() -> None:
    """Billions of parameters, from the models' reports. Moonlight's are without embedding and head."""
    v2, lite = parameters(V2), parameters(released("deepseek-v2-lite"))
    kimi, moonlight = parameters(released("kimi-k2")), parameters(released("moonlight"))
    assert (v2.total, v2.active) == pytest.approx((236e9, 21e9), abs=0.5e9)
    assert (lite.total, lite.active) == pytest.approx((15.7e9, 2.4e9), abs=0.06e9)
    assert (kimi.total, kimi.active) == pytest.approx((1026e9, 32e9), abs=0.5e9)
    ends = moonlight.by_module["head"]
    assert (moonlight.total - 2 * ends, moonlight.active - ends) == pytest.approx((15.29e9, 2.24e9), abs=0.005e9)
