"""Hugging Face's config.json: read as it is meant, or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig
from tests.helpers.configs import refusal, released, written
from tests.helpers.released_configs import HF, HF_V3, yarn


def in_the_new_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it: one dict for all that is rotary, dtype for torch_dtype, widths spelt out."""
    new = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    rope = dict(raw["rope_scaling"] or {"type": "default"})
    rope = {"rope_type": rope.pop("type"), "rope_theta": raw["rope_theta"], **rope}
    extra = {"rope_interleave": True, "head_dim": 64, "qk_head_dim": 192, "dtype": raw["torch_dtype"]}
    return {**new, "rope_parameters": rope, **extra}


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("respell", [dict, in_the_new_spelling], ids=["rope_scaling", "rope_parameters"])
def test_released_config_json_is_read_in_both_spellings(tmp_path: Path, name: str, respell: Any) -> None:
    assert ModelConfig.from_file(written(tmp_path, respell(HF[name]), "config.json")) == released(name)


def test_missing_method_goes_by_the_model_type(tmp_path: Path) -> None:
    """transformers writes neither scoring_func nor topk_method for V3."""
    for name in ("deepseek-v3", "kimi-k2", "moonlight", "deepseek-v2-lite"):
        raw = {key: value for key, value in HF[name].items() if key not in ("scoring_func", "topk_method")}
        assert ModelConfig.from_file(written(tmp_path, raw)) == released(name)


def test_missing_temperatures_take_yarn_defaults(tmp_path: Path) -> None:
    """YaRN then has its default, 0.1 ln(factor) + 1 on cos and sin, and none on the logit as a whole."""
    rope = {key: value for key, value in yarn(40, 1.0).items() if not key.startswith("mscale")}
    config = ModelConfig.from_file(written(tmp_path, HF_V3 | {"rope_scaling": rope}))
    assert config == released("deepseek-v3", mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_mtp_layers_are_read_from_either_key(tmp_path: Path, key: str) -> None:
    raw = {k: v for k, v in HF_V3.items() if k != "num_nextn_predict_layers"}
    assert ModelConfig.from_file(written(tmp_path, raw)).n_mtp_layers == 0
    assert ModelConfig.from_file(written(tmp_path, raw | {key: 2})).n_mtp_layers == 2


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("rope_interleave", False, "has rope_interleave=False, which dsmini cannot honour; want True"),
        ("attention_bias", True, "has attention_bias=True, which dsmini cannot honour; want False"),
        ("mlp_bias", True, "has mlp_bias=True, which dsmini cannot honour; want False"),
        ("tie_word_embeddings", True, "has tie_word_embeddings=True, which dsmini cannot honour; want False"),
        ("hidden_act", "gelu", "has hidden_act='gelu', which dsmini cannot honour; want 'silu'"),
        ("moe_layer_freq", 2, "has moe_layer_freq=2, which dsmini cannot honour; want 1"),
        ("attention_dropout", 0.1, "has attention_dropout=0.1, which dsmini cannot honour; want 0"),
        (
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
            "has rope type ['linear'], which dsmini cannot honour; want 'yarn' or none",
        ),
        (
            "rope_scaling",
            yarn(40, 1.0) | {"attention_factor": 1.0},
            "has keys that dsmini does not know and so cannot honour: attention_factor",
        ),
        (
            "rope_scaling",
            {"type": "default", "factor": 2.0},
            "has keys that dsmini does not know and so cannot honour: factor",
        ),
        (
            "rope_scaling",
            {k: v for k, v in yarn(40, 1.0).items() if k != "mscale"},
            "has mscale_all_dim=1.0 and no mscale; dsmini wants both or none",
        ),
        ("num_key_value_heads", 8, "has num_key_value_heads=8, but MLA has one for each head; want 128"),
        (
            "quantization_config",
            {"quant_method": "awq"},
            "has quantization_config={'quant_method': 'awq'}, which dsmini cannot read; want fp8 or none",
        ),
        (
            "rope_parameters",
            {"rope_type": "linear"},
            "has both rope_scaling and rope_parameters, and they differ; keep one",
        ),
        ("rope_scaling", "yarn", "has rope_scaling='yarn'; want a table of keys, or none"),
        (
            "rope_scaling",
            {k: v for k, v in yarn(40, 1.0).items() if not k.startswith("original")},
            "asks for YaRN and lacks original_max_position_embeddings; want it next to the type",
        ),
        ("sliding_window", 4096, "has keys that dsmini does not know and so cannot honour: sliding_window"),
    ],
)
def test_key_that_cannot_be_honoured_is_refused(tmp_path: Path, key: str, value: Any, sentence: str) -> None:
    path = written(tmp_path, HF_V3 | {key: value})
    assert refusal(ModelConfig.from_file, path) == f"{path} {sentence}"


@pytest.mark.parametrize("key", ["num_attention_heads", "n_routed_experts", "v_head_dim", "routed_scaling_factor"])
def test_missing_size_is_refused(tmp_path: Path, key: str) -> None:
    path = written(tmp_path, {k: v for k, v in HF_V3.items() if k != key})
    assert refusal(ModelConfig.from_file, path) == f"{path} lacks {key}; want every size of the model"
