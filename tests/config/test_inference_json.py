"""DeepSeek's inference JSON: read as it is meant, or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig
from tests.helpers.configs import V32, refusal, released, written

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


def test_omitted_keys_take_model_args_defaults(tmp_path: Path) -> None:
    """Keys that DeepSeek's files leave out take the defaults of its ModelArgs, not the toy's."""
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
def test_scoring_decides_the_top_k_method(
    tmp_path: Path, raw: dict[str, Any], topk_method: str, norm_topk_prob: bool
) -> None:
    config = ModelConfig.from_file(written(tmp_path, raw))
    assert (config.topk_method, config.norm_topk_prob) == (topk_method, norm_topk_prob)


def test_v3_inference_json_is_the_released_config(tmp_path: Path) -> None:
    config = ModelConfig.from_file(written(tmp_path, V3_INFERENCE))
    assert config == released("deepseek-v3", n_mtp_layers=0, max_seq_len=16384)
    assert config.extended


def test_v32_inference_json_has_an_indexer(tmp_path: Path) -> None:
    sizes = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "scale_fmt": "ue8m0"}
    config = ModelConfig.from_file(written(tmp_path, V3_INFERENCE | sizes))
    assert config == released("deepseek-v3", n_mtp_layers=0, max_seq_len=16384, **V32)
    assert ModelConfig.from_file(written(tmp_path, V3_INFERENCE | {"index_topk": 2048})) == config


def test_inference_keys_are_honoured(tmp_path: Path) -> None:
    same = {"dtype": "bf16", "scale_fmt": "ue8m0", "max_batch_size": 8, "q_lora_rank": 0}
    assert ModelConfig.from_file(written(tmp_path, same)) == ModelConfig.from_file(written(tmp_path, {}))
    assert ModelConfig.from_file(written(tmp_path, {"q_lora_rank": 24})).q_lora_rank == 24
    assert not ModelConfig.from_file(written(tmp_path, {"max_seq_len": 4096})).extended
    sharper = ModelConfig.from_file(written(tmp_path, {"mscale": 0.707}))
    assert (sharper.mscale, sharper.mscale_all_dim) == (0.707, 0.707)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"dim": 64, "o_groups": 8}, "{path} has keys that dsmini does not know and so cannot honour: o_groups"),
        ({"index_topk": 0}, "x.json: index_topk=0 is not positive; use 1 or more"),
        ({"dim": "x"}, "x.json: dim='x' is not a whole number"),
        ({"n_heads": 0}, "x.json: n_heads=0 is not positive; use 1 or more"),
        ([1, 2], "{path} holds a list, want a table of keys"),
        ("{", "{path} is not JSON: Expecting property name"),
        ({"model_type": "llama"}, "{path} has model_type='llama'; dsmini reads deepseek_v2, deepseek_v3, deepseek_v32"),
        (
            {"model_type": "deepseek_v3", "kv_lora_rank": 512},
            "{path} lacks first_k_dense_replace, hidden_size, intermediate_size, max_position_embeddings, ",
        ),
    ],
)
def test_wrong_json_is_refused(tmp_path: Path, content: Any, sentence: str) -> None:
    path = written(tmp_path, content)
    assert refusal(ModelConfig.from_file, path).startswith(sentence.format(path=path))
