"""Contents of config.json of released models on Hugging Face, and the JSON of DeepSeek's inference code."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "config" / "released"


def released_json(name: str) -> dict[str, Any]:
    """Return a file of tests/config/released, such as "deepseek-v3" or "deepseek-v3.inference"."""
    return json.loads((FOLDER / f"{name}.json").read_text())


HF = {name: released_json(name) for name in ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "kimi-k2", "moonlight")}
HF_V3 = HF["deepseek-v3"]
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
HF_V32 = HF_V3 | INDEXER | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
HF_GLM: dict[str, Any] = {
    **{"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "vocab_size": 154880},
    **{"hidden_size": 6144, "intermediate_size": 12288, "moe_intermediate_size": 2048, "num_hidden_layers": 78},
    **{"first_k_dense_replace": 3, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "head_dim": 192},
    **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    **{"routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    **{"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "indexer_rope_interleave": True},
    **{"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_share_for_mtp_iteration": True},
    **{"rope_parameters": {"rope_theta": 8e6, "rope_type": "default"}, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 1048576, "num_nextn_predict_layers": 1, "tie_word_embeddings": False},
}
"""GLM-5.2, written from its published sizes; theta is said twice, and the one inside rope_parameters counts."""
