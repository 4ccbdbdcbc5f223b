"""Contents of config.json of released models on Hugging Face."""

from typing import Any


def yarn(factor: float, mscale: float, beta_fast: float = 32) -> dict[str, Any]:
    ramp = {"factor": factor, "beta_fast": beta_fast, "beta_slow": 1}
    temperatures = {"mscale": mscale, "mscale_all_dim": mscale}
    return {"type": "yarn", "original_max_position_embeddings": 4096, **ramp, **temperatures}


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
HF_ALL: dict[str, Any] = {
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"},
    **{"initializer_range": 0.02, "moe_layer_freq": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"use_cache": True, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
}
"""Keys that have one value in all models."""
ONLY: dict[str, dict[str, Any]] = {
    "v2": {"architectures": ["DeepseekV2ForCausalLM"], "aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": True},
    "v3": {"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": FP8},
}
"""Keys that have one value in the models of a family, and are absent in the other."""
ABSENT = object()
NAMES = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "kimi-k2", "moonlight")
BY_MODEL: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v3", "deepseek_v2", "deepseek_v2", "kimi_k2", "deepseek_v3"),
    "first_k_dense_replace": (3, 1, 1, 1, 1),
    "hidden_size": (7168, 5120, 2048, 7168, 2048),
    "intermediate_size": (18432, 12288, 10944, 18432, 11264),
    "max_position_embeddings": (163840, 163840, 163840, 131072, 8192),
    "moe_intermediate_size": (2048, 1536, 1408, 2048, 1408),
    "n_group": (8, 8, 1, 1, 1),
    "n_routed_experts": (256, 160, 64, 384, 64),
    "n_shared_experts": (1, 2, 2, 1, 2),
    "norm_topk_prob": (True, False, False, True, True),
    "num_attention_heads": (128, 128, 16, 64, 16),
    "num_experts_per_tok": (8, 6, 6, 8, 6),
    "num_hidden_layers": (61, 60, 27, 61, 27),
    "num_key_value_heads": (128, 128, 16, 64, 16),
    "num_nextn_predict_layers": (1, ABSENT, ABSENT, 0, 0),
    "q_lora_rank": (1536, 1536, None, 1536, None),
    "rms_norm_eps": (1e-6, 1e-6, 1e-6, 1e-6, 1e-5),
    "rope_scaling": (yarn(40, 1.0), yarn(40, 0.707), yarn(40, 0.707), yarn(32, 1.0, beta_fast=1), None),
    "rope_theta": (10000, 10000, 10000, 50000.0, 50000.0),
    "routed_scaling_factor": (2.5, 16.0, 1.0, 2.827, 2.446),
    "scoring_func": ("sigmoid", "softmax", "softmax", "sigmoid", "sigmoid"),
    "topk_group": (4, 3, 1, 1, 1),
    "topk_method": ("noaux_tc", "group_limited_greedy", "greedy", "noaux_tc", "noaux_tc"),
    "vocab_size": (129280, 102400, 102400, 163840, 163840),
}
HF = {
    name: HF_ALL
    | ONLY["v2" if "v2" in name else "v3"]
    | {key: values[i] for key, values in BY_MODEL.items() if values[i] is not ABSENT}
    for i, name in enumerate(NAMES)
}
HF_V3 = HF["deepseek-v3"]
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
HF_V32 = HF_V3 | INDEXER | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
