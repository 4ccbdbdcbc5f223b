"""DeepSeek-V4's config.json as released, as transformers writes it, and the JSON of its inference code."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.config.published import config_to_json
from tests.helpers.configs import refusal, released, written
from tests.helpers.released_configs import released_json

Changes = dict[str, Any]
HF_FLASH, HF_PRO = released_json("deepseek-v4-flash"), released_json("deepseek-v4-pro")
FP8 = HF_FLASH["quantization_config"]
RELEASED = pytest.mark.parametrize(("name", "raw"), [("deepseek-v4-flash", HF_FLASH), ("deepseek-v4-pro", HF_PRO)])


def read(folder: Path, raw: Changes) -> ModelConfig:
    return ModelConfig.from_file(written(folder, raw))


def as_transformers_writes(raw: Changes, hca: int = 128) -> Changes:
    """Spell out the kind of each layer, and nest both kinds of rotary tables, as save_pretrained of 5.24 does."""
    n, hashed = raw["num_hidden_layers"], raw["num_hash_layers"]
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", hca: "heavily_compressed_attention"}
    part, yarn = {"partial_rotary_factor": 0.125}, dict(raw["rope_scaling"])
    left_out = ("compress_ratios", "num_hash_layers", "rope_scaling", "quantization_config", "torch_dtype")
    return {key: value for key, value in raw.items() if key not in left_out} | {
        "layer_types": [kinds[ratio] for ratio in raw["compress_ratios"][:n]],
        "compress_rates": {kinds[4]: 4, kinds[hca]: hca},
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (n - hashed),
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000, **part},
            "compress": {**yarn, "rope_type": "yarn", "attention_factor": 1.0, "rope_theta": 160000, **part},
        },
        **{"partial_rotary_factor": 0.125, "dtype": "bfloat16", "mlp_bias": False, "output_router_logits": False},
        **{"router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "pad_token_id": None},
    }


@RELEASED
def test_released_config_json_is_the_toml_in_both_spellings(tmp_path: Path, name: str, raw: Changes) -> None:
    want = released(name)
    for spelling in (raw, raw | {"compress_ratios": raw["compress_ratios"][:-1]}, as_transformers_writes(raw)):
        assert read(tmp_path, spelling) == want
    spelling.pop("qk_rope_head_dim")  # it follows from partial_rotary_factor
    assert read(tmp_path, spelling) == want


@RELEASED
def test_config_is_written_in_the_released_spelling(tmp_path: Path, name: str, raw: Changes) -> None:
    out = config_to_json(dataclasses.asdict(released(name)))
    unwritten = {
        "torch_dtype",
        "transformers_version",
        "quantization_config",
        "expert_dtype",
        "bos_token_id",
        "eos_token_id",
    }
    assert {key: out[key] for key in raw if key not in unwritten} == {
        k: v for k, v in raw.items() if k not in unwritten
    }
    assert read(tmp_path, out) == released(name)


def test_rounded_entries_are_written_and_read(tmp_path: Path) -> None:
    config = released("deepseek-v4-flash", qat=True)
    out = config_to_json(dataclasses.asdict(config))
    assert out["qat"] is True and read(tmp_path, out) == config


def test_a_ratio_that_transformers_does_not_know_is_written_in_its_words_too(tmp_path: Path) -> None:
    ratios = (0, 4, 16, *[4] * 40)
    config = released("deepseek-v4-flash", compress_ratios=ratios, original_seq_len=None, rope_factor=40.0)
    out = config_to_json(dataclasses.asdict(config))
    assert out["compress_rates"] == {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}
    assert read(tmp_path, out) == config
    del out["compress_ratios"]
    assert read(tmp_path, out) == config


def test_inference_json_of_v4(tmp_path: Path) -> None:
    """ModelArgs' defaults are a small model. YaRN is on at any length, so max_seq_len becomes what it is for."""
    assert read(tmp_path, released_json("deepseek-v4-flash.inference")) == released("deepseek-v4-flash")
    small = read(tmp_path, {"n_hash_layers": 0})
    assert (small.dim, small.n_layers, small.compress_ratios) == (4096, 7, (0, 0, 4, 128, 4, 128, 4))
    assert (small.compress_rope_theta, small.original_seq_len, small.swiglu_limit) == (40000.0, None, None)
    assert (small.n_routed_experts, small.n_activated_experts, small.n_mtp_layers) == (8, 2, 1)
    assert small.norm_topk_prob and not small.extended


RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"compress_ratios": [*HF_FLASH["compress_ratios"][:-1], 4]}, "for multi-token prediction"),
        ({"compress_ratios": [0, 4]}, "give one for each layer"),
        ({"compress_ratios": "many"}, "not a list of whole numbers"),
        ({"num_key_value_heads": 64}, "num_key_value_heads=64, which dsmini cannot honour; want 1"),
        ({"n_group": 8}, "n_group=8, which dsmini cannot honour; want 1"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace=3, which dsmini cannot honour; want 0"),
        ({"engram_layer_ids": [1]}, "keys that dsmini does not know and so cannot honour: engram_layer_ids"),
        ({"dspark_block_size": 5}, "cannot honour: dspark_block_size"),
        ({"expert_dtype": "nvfp4"}, "expert_dtype='nvfp4', which dsmini cannot honour; want 'fp4'"),
        ({"quantization_config": FP8 | {"weight_block_size": [32, 32]}}, "weight_block_size=[32, 32]"),
        ({"hc_mult": None}, "hc_mult=None is not a whole number"),
        ({"rope_parameters": {"main": 3}}, "want a table 'main' and a table 'compress'"),
        ({"layer_types": ["sliding_attention"] * 43}, "in other words; keep one"),
        ({"layer_types": ["mamba"] * 43}, "cannot honour; want sliding_attention"),
        ({"layer_types": 7}, "layer_types=7"),
        ({"mlp_layer_types": ["moe"] * 42 + ["hash_moe"]}, "want hash_moe for the first layers"),
        ({"mlp_layer_types": ["moe"], "num_hidden_layers": 2**70}, "want hash_moe for the first layers"),
        ({"mlp_layer_types": ["moe"] * 43}, "num_hash_layers=3, and 0 in other words"),
        ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim=64, and 128 in other words"),
        ({"swiglu_limit": 0.0}, "swiglu_limit=0.0 is not positive"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type"),
    ],
)  # fmt: skip
def test_config_json_that_cannot_be_honoured_is_refused(tmp_path: Path, changes: Changes, want: str) -> None:
    assert want in refusal(read, tmp_path, HF_FLASH | changes)


@pytest.mark.parametrize(
    ("rates", "factor", "want"),
    [
        (RATES | {"compressed_sparse_attention": 8}, 1.0, "a rate of 4 for the second"),
        (RATES | {"heavily_compressed_attention": 4}, 1.0, "a rate of 4 for the second"),
        (RATES, 1.277, "attention_factor=1.277, which dsmini cannot honour; want 1.0"),
    ],
)
def test_transformers_spelling_that_cannot_be_honoured(
    tmp_path: Path, rates: Changes, factor: float, want: str
) -> None:
    raw = as_transformers_writes(HF_FLASH) | {"compress_rates": rates}
    raw["rope_parameters"]["compress"]["attention_factor"] = factor
    assert want in refusal(read, tmp_path, raw)


def test_a_missing_size_is_named(tmp_path: Path) -> None:
    raw = {key: value for key, value in HF_FLASH.items() if key not in ("o_groups", "num_hash_layers")}
    assert "lacks num_hash_layers, o_groups; want every size of the model" in refusal(read, tmp_path, raw)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"hc_mult": 1}, "a model with hc_mult=1 has no deepseek_v4 folder; want 2 or more"),
        ({"swiglu_limit": None}, "a model with swiglu_limit=None has no deepseek_v4 folder; want a number"),
        ({"score_func": "softmax"}, "score_func='softmax' has no deepseek_v4 folder"),
        ({"n_expert_groups": 2}, "n_expert_groups=2 has no deepseek_v4 folder; want 1"),
    ],
)
def test_a_model_that_is_no_v4_is_not_written(changes: Changes, want: str) -> None:
    assert want in refusal(config_to_json, dataclasses.asdict(released("deepseek-v4-flash")) | changes)


@pytest.mark.parametrize("changes", [{"hc_mult": 4}, {"n_hash_layers": 1}, {"swiglu_limit": 10.0}])
def test_v4_parts_are_not_lost_in_a_folder_of_v3(changes: Changes) -> None:
    fields = dataclasses.asdict(released("deepseek-v3")) | changes
    assert "has no deepseek_v3 folder" in refusal(config_to_json, fields)
