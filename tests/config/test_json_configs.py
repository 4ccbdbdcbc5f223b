"""Hugging Face's config.json and DeepSeek's inference JSON, read as they are meant."""

from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig
from tests.helpers.configs import V32, released, written
from tests.helpers.released_configs import HF, HF_V3, HF_V32, INDEXER, released_json

Changes = dict[str, Any]


def read(folder: Path, raw: Changes) -> ModelConfig:
    return ModelConfig.from_file(written(folder, raw))


# config.json


def in_the_new_spelling(raw: Changes) -> Changes:
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


def test_config_of_v32_is_v3_with_an_indexer(tmp_path: Path) -> None:
    lists = {"layer_types": ["indexed_attention"] * 61, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58}
    for more, changes in (({}, {}), ({"indexer_rope_interleave": True},) * 2, (lists, {})):
        assert read(tmp_path, HF_V32 | more) == released("deepseek-v3", **V32, **changes)


def test_missing_method_goes_by_the_model_type(tmp_path: Path) -> None:
    """transformers writes neither scoring_func nor topk_method for V3."""
    for name in ("deepseek-v3", "kimi-k2", "moonlight", "deepseek-v2-lite"):
        raw = {key: value for key, value in HF[name].items() if key not in ("scoring_func", "topk_method")}
        assert read(tmp_path, raw) == released(name)


def test_missing_temperatures_take_yarn_defaults(tmp_path: Path) -> None:
    """YaRN then has its default, 0.1 ln(factor) + 1 on cos and sin, and none on the logit as a whole."""
    rope = {key: value for key, value in HF_V3["rope_scaling"].items() if not key.startswith("mscale")}
    config = read(tmp_path, HF_V3 | {"rope_scaling": rope})
    assert config == released("deepseek-v3", mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_mtp_layers_are_read_from_either_key(tmp_path: Path, key: str) -> None:
    raw = {k: v for k, v in HF_V3.items() if k != "num_nextn_predict_layers"}
    assert read(tmp_path, raw).n_mtp_layers == 0
    assert read(tmp_path, raw | {key: 2}).n_mtp_layers == 2


# DeepSeek's inference JSON

V3_INFERENCE = released_json("deepseek-v3.inference")
DEFAULTS: Changes = {
    **{"vocab_size": 102400, "dim": 2048, "inter_dim": 10944, "moe_inter_dim": 1408, "n_layers": 27, "n_heads": 16},
    **{"n_dense_layers": 1, "attention": "mla", "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
    **{"qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2},
    **{"n_activated_experts": 6, "n_expert_groups": 1, "n_limited_groups": 1, "score_func": "softmax"},
    **{"topk_method": "greedy", "norm_topk_prob": False, "route_scale": 1.0, "n_mtp_layers": 0, "max_seq_len": 16384},
    **{"original_seq_len": 4096, "rope_theta": 10000.0, "rope_factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "norm_eps": 1e-6},
}
"""Defaults of DeepSeek's ModelArgs, which are not the toy's."""


def test_omitted_keys_take_model_args_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, {})
    assert config.extended
    assert config == released("deepseek-v2-lite", max_seq_len=16384, mscale=1.0, mscale_all_dim=1.0)
    assert {key: getattr(config, key) for key in DEFAULTS} == DEFAULTS


GROUPS: Changes = {"n_expert_groups": 8, "n_limited_groups": 3}
SAME: Changes = {"dtype": "bf16", "scale_fmt": "ue8m0", "max_batch_size": 8, "q_lora_rank": 0}


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (GROUPS, {"topk_method": "group_limited_greedy", "norm_topk_prob": False}),
        ({"score_func": "sigmoid"}, {"topk_method": "noaux_tc", "norm_topk_prob": True}),
        ({"score_func": "sigmoid", **GROUPS}, {"topk_method": "noaux_tc", "norm_topk_prob": True}),
        (SAME, DEFAULTS | {"extended": True}),
        ({"q_lora_rank": 24}, {"q_lora_rank": 24}),
        ({"max_seq_len": 4096}, {"extended": False}),
        ({"mscale": 0.707}, {"mscale": 0.707, "mscale_all_dim": 0.707}),
    ],
)
def test_inference_keys_are_honoured(tmp_path: Path, raw: Changes, want: Changes) -> None:
    config = read(tmp_path, raw)
    assert {key: getattr(config, key) for key in want} == want


def test_released_inference_json_is_the_released_config(tmp_path: Path) -> None:
    released_v3: Changes = {"n_mtp_layers": 0, "max_seq_len": 16384}
    config = read(tmp_path, V3_INFERENCE)
    assert config == released("deepseek-v3", **released_v3) and config.extended
    sizes = INDEXER | {"scale_fmt": "ue8m0"}
    config = read(tmp_path, V3_INFERENCE | sizes)
    assert config == released("deepseek-v3", **released_v3, **V32)
    assert read(tmp_path, V3_INFERENCE | {"index_topk": 2048}) == config
