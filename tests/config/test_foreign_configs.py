"""DeepSeek's inference JSON and Hugging Face's config.json: read as they are meant, or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig
from tests.helpers.configs import refusal, released, written

# DeepSeek's inference JSON

V3_INFERENCE = {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
}


def test_inference_json_takes_model_args_defaults(tmp_path: Path) -> None:
    """What DeepSeek's files leave out is what its ModelArgs say, not the toy's."""
    config = ModelConfig.from_file(written(tmp_path, {}))
    assert config.extended
    assert config == released("deepseek-v2-lite", max_seq_len=16384, mscale=1.0, mscale_all_dim=1.0)
    want = {
        "vocab_size": 102400,
        "dim": 2048,
        "inter_dim": 10944,
        "moe_inter_dim": 1408,
        "n_layers": 27,
        "n_dense_layers": 1,
        "n_heads": 16,
        "attention": "mla",
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "n_activated_experts": 6,
        "n_expert_groups": 1,
        "n_limited_groups": 1,
        "score_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "route_scale": 1.0,
        "n_mtp_layers": 0,
        "max_seq_len": 16384,
        "original_seq_len": 4096,
        "rope_theta": 10000.0,
        "rope_factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "norm_eps": 1e-6,
    }
    assert {key: getattr(config, key) for key in want} == want


@pytest.mark.parametrize(
    ("raw", "topk_method", "norm_topk_prob"),
    [
        ({"n_expert_groups": 8, "n_limited_groups": 3}, "group_limited_greedy", False),
        ({"score_func": "sigmoid"}, "noaux_tc", True),
        ({"score_func": "sigmoid", "n_expert_groups": 8, "n_limited_groups": 3}, "noaux_tc", True),
    ],
)
def test_inference_json_scoring_decides_the_method(
    tmp_path: Path, raw: dict[str, Any], topk_method: str, norm_topk_prob: bool
) -> None:
    config = ModelConfig.from_file(written(tmp_path, raw))
    assert (config.topk_method, config.norm_topk_prob) == (topk_method, norm_topk_prob)


def test_inference_json_of_v3(tmp_path: Path) -> None:
    config = ModelConfig.from_file(written(tmp_path, V3_INFERENCE))
    assert config == released("deepseek-v3", n_mtp_layers=0, max_seq_len=16384)
    assert config.extended


def test_inference_json_keys(tmp_path: Path) -> None:
    same = {"dtype": "bf16", "scale_fmt": "ue8m0", "max_batch_size": 8, "q_lora_rank": 0}
    assert ModelConfig.from_file(written(tmp_path, same)) == ModelConfig.from_file(written(tmp_path, {}))
    assert ModelConfig.from_file(written(tmp_path, {"q_lora_rank": 24})).q_lora_rank == 24
    assert not ModelConfig.from_file(written(tmp_path, {"max_seq_len": 4096})).extended
    sharper = ModelConfig.from_file(written(tmp_path, {"mscale": 0.707}))
    assert (sharper.mscale, sharper.mscale_all_dim) == (0.707, 0.707)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"dim": 64, "index_topk": 2048}, "{path} has keys that dsmini does not know and so cannot honour: index_topk"),
        ({"dim": "x"}, "x.json: dim='x' is not a whole number"),
        ({"n_heads": 0}, "x.json: n_heads=0 is not positive; use 1 or more"),
        ([1, 2], "{path} holds a list, want a table of keys"),
        ("{", "cannot read the config file {path}: Expecting property name"),
        ({"model_type": "llama"}, "{path} has model_type='llama'; dsmini reads deepseek_v2, deepseek_v3 and kimi_k2"),
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 512},
            "{path} lacks first_k_dense_replace, hidden_size, intermediate_size, max_position_embeddings, ",
        ),
    ],
)
def test_what_is_wrong_in_json(tmp_path: Path, content: Any, sentence: str) -> None:
    path = written(tmp_path, content)
    assert refusal(ModelConfig.from_file, path).startswith(sentence.format(path=path))


# Hugging Face's config.json


def yarn(factor: float, mscale: float, beta_fast: float = 32) -> dict[str, Any]:
    ramp = {"factor": factor, "beta_fast": beta_fast, "beta_slow": 1}
    temperatures = {"mscale": mscale, "mscale_all_dim": mscale}
    return {"type": "yarn", "original_max_position_embeddings": 4096, **ramp, **temperatures}


HF_ALL = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
HF_V3 = {
    **HF_ALL,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": yarn(40, 1.0),
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
HF_V2 = {
    **HF_ALL,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "rope_scaling": yarn(40, 0.707),
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
HF_V2_LITE = {
    **HF_V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
HF_KIMI_K2 = {
    **HF_V3,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": yarn(32, 1.0, beta_fast=1),
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
HF_MOONLIGHT = {
    **HF_V3,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
HF = {
    "deepseek-v3": HF_V3,
    "deepseek-v2": HF_V2,
    "deepseek-v2-lite": HF_V2_LITE,
    "kimi-k2": HF_KIMI_K2,
    "moonlight": HF_MOONLIGHT,
}


def in_the_new_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it: one dict for all that is rotary, dtype for torch_dtype, widths spelt out."""
    new = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    rope = dict(raw["rope_scaling"] or {"type": "default"})
    rope = {"rope_type": rope.pop("type"), "rope_theta": raw["rope_theta"], **rope}
    extra = {"rope_interleave": True, "head_dim": 64, "qk_head_dim": 192, "dtype": raw["torch_dtype"]}
    return {**new, "rope_parameters": rope, **extra}


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("respell", [dict, in_the_new_spelling], ids=["rope_scaling", "rope_parameters"])
def test_released_config_json(tmp_path: Path, name: str, respell: Any) -> None:
    assert ModelConfig.from_file(written(tmp_path, respell(HF[name]), "config.json")) == released(name)


def test_config_json_without_a_method_goes_by_the_model_type(tmp_path: Path) -> None:
    """transformers writes neither scoring_func nor topk_method for V3."""
    for name in ("deepseek-v3", "kimi-k2", "moonlight", "deepseek-v2-lite"):
        raw = {key: value for key, value in HF[name].items() if key not in ("scoring_func", "topk_method")}
        assert ModelConfig.from_file(written(tmp_path, raw)) == released(name)


def test_config_json_without_temperatures(tmp_path: Path) -> None:
    """YaRN then has its default, 0.1 ln(factor) + 1 on cos and sin, and none on the logit as a whole."""
    rope = {key: value for key, value in yarn(40, 1.0).items() if not key.startswith("mscale")}
    config = ModelConfig.from_file(written(tmp_path, HF_V3 | {"rope_scaling": rope}))
    assert config == released("deepseek-v3", mscale=1.0, mscale_all_dim=0.0)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_config_json_mtp_layers(tmp_path: Path, key: str) -> None:
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
        ("num_key_value_heads", 8, "has num_key_value_heads=8, but MLA has as many as heads; want 128"),
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
            "asks for YaRN and lacks original_max_position_embeddings; want it beside the type",
        ),
        ("sliding_window", 4096, "has keys that dsmini does not know and so cannot honour: sliding_window"),
    ],
)
def test_config_json_that_cannot_be_honoured(tmp_path: Path, key: str, value: Any, sentence: str) -> None:
    path = written(tmp_path, HF_V3 | {key: value})
    assert refusal(ModelConfig.from_file, path) == f"{path} {sentence}"


@pytest.mark.parametrize("key", ["num_attention_heads", "n_routed_experts", "v_head_dim", "routed_scaling_factor"])
def test_config_json_that_lacks_a_size_never_takes_the_toys(tmp_path: Path, key: str) -> None:
    path = written(tmp_path, {k: v for k, v in HF_V3.items() if k != key})
    assert refusal(ModelConfig.from_file, path) == f"{path} lacks {key}; want every size of the model"
