"""Folders and arguments that are refused, each with a sentence that says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, load_pretrained, save_pretrained
from tests.helpers import folders
from tests.helpers.configs import refusal

Build = Callable[..., Transformer]


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> str:
    """Return what loading says of a folder after a change of its tensors or config."""
    tensors = folders.read(folder)
    change(tensors)
    folders.write(folder, tensors, folders.config_of(folder) | config)
    return refusal(load_pretrained, folder)


def test_all_wrong_tensors_are_named_at_once(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("model.norm.weight", "model.layers.1.mlp.experts.6.up_proj.weight"):
            del tensors[name]
        tensors["model.extra.weight"] = tensors["model.layers.0.bias"] = torch.ones(3)
        tensors["lm_head.weight"] = torch.ones(61, 23)
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(24, dtype=torch.int32)
        tensors["model.layers.2.embed_tokens.weight"] = torch.ones(60, 24)

    assert edited(folder, change) == (
        f"{folder} does not hold the model that its config describes: "
        "it lacks model.layers.1.mlp.experts.6.up_proj.weight, model.norm.weight; "
        "it has tensors that belong nowhere: model.extra.weight, model.layers.0.bias; "
        "model.layers.0.input_layernorm.weight is I32, want BF16 or F32 or F16; "
        "lm_head.weight is [61, 23], want [61, 24]; "
        "model.layers.2.embed_tokens.weight is [60, 24], want [61, 24]; "
        "fetch its files again, or mend the config"
    )


def test_wrong_folder_takes_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.checkpoint.pretrained._allocate", lambda *_: pytest.fail("memory was taken"))
    assert "it lacks" in edited(folder, lambda tensors: tensors.pop("lm_head.weight"))


def test_more_layers_than_tensors_is_refused_early(sharded: Path) -> None:
    """Refused before they are made, which for a million takes minutes."""
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 10**6, "num_nextn_predict_layers": 0})
    )
    assert "n_layers=1000000 is too large; use 10,000 or less" in refusal(load_pretrained, sharded)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "has model_type='llama'; dsmini reads deepseek_v2, deepseek_v3, deepseek_v32"),
        ({"attention_bias": True}, "has attention_bias=True, which dsmini cannot honour; want False"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings=True, which dsmini cannot honour; want False"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu', which dsmini cannot honour; want 'silu'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "has rope type ['llama3'], which dsmini cannot honour"),
        (
            {"quantization_config": folders.QUANTIZED | {"weight_block_size": [64, 64]}},
            "has quantization_config.weight_block_size=[64, 64], which dsmini cannot read; want [128, 128]",
        ),
        (
            {"quantization_config": folders.QUANTIZED | {"fmt": "e5m2"}},
            "has quantization_config.fmt='e5m2', which dsmini cannot read; want 'e4m3'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}},
            "asks for YaRN with max_position_embeddings=32, which is no more than original_max_position_embeddings=4",
        ),
    ],
)
def test_config_that_cannot_be_honoured_is_refused(folder: Path, change: dict[str, Any], sentence: str) -> None:
    assert edited(folder, lambda _: None, **change).startswith(f"{folder / 'config.json'} {sentence}")


def test_fp8_without_scales_or_config_is_refused(fp8_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = fp8_folder
    tensors, raw = folders.read(folder), folders.config_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    scale = tensors.pop(f"{name}_scale_inv")
    lacking = folders.write(tmp_path / "a", tensors, raw)
    assert f"it lacks {name}_scale_inv;" in refusal(load_pretrained, lacking)
    turned = folders.write(tmp_path / "b", tensors | {f"{name}_scale_inv": torch.ones(2, 1)}, raw)
    assert f"{name}_scale_inv is [2, 1], want [2, 2]" in refusal(load_pretrained, turned)
    assert scale.shape == (2, 2)
    tensors[name] = torch.zeros(200, 136)
    extra = folders.write(tmp_path / "c", tensors | {f"{name}_scale_inv": scale}, raw)
    assert f"belong nowhere: {name}_scale_inv" in refusal(load_pretrained, extra)
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    unknown = folders.write(tmp_path / "d", tensors, raw)
    assert "kv_b_proj.weight is F8_E4M3, want BF16 or F32 or F16" in refusal(load_pretrained, unknown)


def test_experts_half_in_fp8_load_only_dequantized(fp8_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, meant = fp8_folder
    tensors, name = folders.read(folder), "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    tensors[name] = meant[name].bfloat16()
    mixed = folders.write(tmp_path / "a", tensors, folders.config_of(folder))
    load_pretrained(mixed)
    assert "in layers.1.ffn.experts.w3; load it with fp8='dequantize'" in refusal(load_pretrained, mixed, fp8="keep")


def test_folder_without_a_model_is_refused(tmp_path: Path, folder: Path) -> None:
    assert refusal(load_pretrained, tmp_path / "x").startswith(f"there is no folder {tmp_path / 'x'};")
    (folder / "config.json").rename(folder / "config.toml")
    assert refusal(load_pretrained, folder).endswith("it is a training run, so use python -m dsmini.convert")
    (folder / "config.toml").rename(folder / "x.json")
    assert refusal(load_pretrained, folder) == f"{folder} has no config.json; name a folder that holds a model"
    (folder / "config.json").write_text("{}")
    assert "has no model_type" in refusal(load_pretrained, folder)


def test_wrong_arguments_are_refused(tmp_path: Path, folder: Path, small_model: Build) -> None:
    assert "fp8='int8' is unknown" in refusal(load_pretrained, folder, fp8="int8")
    assert "dtype=torch.int8 is not for weights" in refusal(load_pretrained, folder, dtype=torch.int8)
    assert "device 'gpu' is unknown" in refusal(load_pretrained, folder, device="gpu")
    model = small_model()
    assert "holds files already" in refusal(save_pretrained, model, folder)
    for size in ("big", "1e9GB", f"{10**12}GB", 10**400, 0):
        said = refusal(save_pretrained, model, tmp_path / "b", shard_size=size)
        assert "is not the size of a file; use for example 5GB or 500MB" in said
    with torch.no_grad():
        model.layers[1].get_parameter("attn.wo.weight")[0, 0] = torch.nan
    said = refusal(save_pretrained, model, tmp_path / "b", fp8=True)
    assert "layers.1.attn.wo.weight holds infinities or NaN" in said
    assert not list(tmp_path.glob("*b*"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention": "mha", "n_mtp_layers": 0}, "a model with attention='mha' has no deepseek_v3 folder; want 'mla'"),
        ({"qk_norm": True}, "a model with qk_norm=True has no deepseek_v3 folder"),
        ({"embed_norm": True}, "a model with embed_norm=True has no deepseek_v3 folder"),
        ({"mtp_input": "pre_norm"}, "a model with mtp_input='pre_norm' has no deepseek_v3 folder"),
        ({"topk_method": "group_limited_greedy"}, "a model with topk_method='group_limited_greedy' has no d"),
        (
            {"score_func": "softmax", "topk_method": "group_limited_greedy"},
            "a model with norm_topk_prob=True has no deepseek_v2 folder; want False",
        ),
        ({"original_seq_len": 8, "mscale": 0.0}, "mscale=0.0 with mscale_all_dim=1.0 has no spelling in config.json"),
    ],
)
def test_model_without_a_folder_format_is_refused(
    tmp_path: Path, small_model: Build, changes: dict[str, Any], sentence: str
) -> None:
    assert refusal(save_pretrained, small_model(**changes), tmp_path / "b").startswith(sentence)
    assert not list(tmp_path.iterdir())
