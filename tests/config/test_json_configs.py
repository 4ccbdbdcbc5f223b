"""config.json as released and as transformers writes it, and DeepSeek's inference JSON, read as they are meant."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.config.published import config_to_json
from tests.helpers.configs import V32, refusal, released, written
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


def test_omitted_keys_take_model_args_defaults(tmp_path: Path) -> None:
    want = released("deepseek-v2-lite", max_seq_len=16384, mscale=1.0, mscale_all_dim=1.0)
    for changes in ({}, {"dtype": "bf16", "scale_fmt": "ue8m0", "max_batch_size": 8, "q_lora_rank": 0}):
        assert read(tmp_path, changes) == want and want.extended


CASES = tomllib.loads((Path(__file__).parent / "cases.toml").read_text())


@pytest.mark.parametrize("case", CASES["inference"], ids=str)
def test_inference_keys_are_honoured(tmp_path: Path, case: dict[str, Changes]) -> None:
    config = read(tmp_path, case["raw"])
    assert {key: getattr(config, key) for key in case["want"]} == case["want"]


def test_released_inference_json_is_the_released_config(tmp_path: Path) -> None:
    released_v3: Changes = {"n_mtp_layers": 0, "max_seq_len": 16384}
    config = read(tmp_path, V3_INFERENCE)
    assert config == released("deepseek-v3", **released_v3) and config.extended
    sizes = INDEXER | {"scale_fmt": "ue8m0"}
    config = read(tmp_path, V3_INFERENCE | sizes)
    assert config == released("deepseek-v3", **released_v3, **V32)
    assert read(tmp_path, V3_INFERENCE | {"index_topk": 2048}) == config


# DeepSeek-V4

HF_FLASH, HF_PRO = released_json("deepseek-v4-flash"), released_json("deepseek-v4-pro")
RELEASED = pytest.mark.parametrize(("name", "raw"), [("deepseek-v4-flash", HF_FLASH), ("deepseek-v4-pro", HF_PRO)])


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
    unwritten = ("torch_dtype", "transformers_version", "quantization_config", "expert_dtype")
    unwritten += ("bos_token_id", "eos_token_id")
    kept = {key: value for key, value in raw.items() if key not in unwritten}
    assert kept == {key: out[key] for key in kept}
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


def test_numbers_beyond_any_are_a_sentence(tmp_path: Path) -> None:
    large = {**released_json("deepseek-v4-flash.inference"), "rope_factor": 1e308, "original_seq_len": 65536}
    with pytest.raises(ValueError, match="max_seq_len"):
        read(tmp_path, large)


def test_inference_json_of_v4(tmp_path: Path) -> None:
    """ModelArgs' defaults are a small model. YaRN is on at any length, so max_seq_len becomes what it is for."""
    assert read(tmp_path, released_json("deepseek-v4-flash.inference")) == released("deepseek-v4-flash")
    small = read(tmp_path, {"n_hash_layers": 0})
    assert (small.dim, small.n_layers, small.compress_ratios) == (4096, 7, (0, 0, 4, 128, 4, 128, 4))
    assert (small.compress_rope_theta, small.original_seq_len, small.swiglu_limit) == (40000.0, None, None)
    assert (small.n_routed_experts, small.n_activated_experts, small.n_mtp_layers) == (8, 2, 1)
    assert small.norm_topk_prob and not small.extended


def test_attention_factor_of_transformers_spelling_is_refused(tmp_path: Path) -> None:
    raw = as_transformers_writes(HF_FLASH)
    raw["rope_parameters"]["compress"]["attention_factor"] = 1.277
    said = refusal(read, tmp_path, raw)
    assert "attention_factor=1.277, which dsmini cannot honour; want 1.0" in said
