"""Folders in and out: the same tensors, little memory, and a sentence for everything that is wrong."""

import copy
import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsmini
from dsmini import Experts, Linear, ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.hf_config import config_to_json
from dsmini.numerics import quantize_tiles
from tests.helpers import folders
from tests.helpers.commands import ROOT
from tests.helpers.configs import refusal
from tests.helpers.hf_names import to_hf
from tests.helpers.tolerances import BF16_UNIT, relative_error, rounding

Build = Callable[..., Transformer]


def tensors_of(model: Transformer, dtype: torch.dtype = torch.float32, copies: bool = True) -> dict[str, Tensor]:
    """A model's tensors as a folder has them: of that dtype, but for the routing biases."""
    out = to_hf(model)
    out = {name: t if name.endswith("_bias") else t.to(dtype) for name, t in out.items()}
    left_out = () if copies else (".embed_tokens.weight", ".shared_head.head.weight")
    return {name: t for name, t in out.items() if name == "model.embed_tokens.weight" or not name.endswith(left_out)}


def config_json(config: ModelConfig, **more: Any) -> dict[str, Any]:
    return config_to_json(dataclasses.asdict(config)) | {"torch_dtype": "float32"} | more


@pytest.fixture
def folder(tmp_path: Path, small_model: Build) -> Path:
    model = small_model()
    return folders.write(tmp_path / "good", tensors_of(model), config_json(model.config))


@pytest.fixture
def fp8_model(small_model: Build) -> Build:
    """A model with ragged blocks in every matrix: 576 rows in one of them, as the released kv_a_proj_with_mqa."""
    sizes = {"dim": 136, "inter_dim": 200, "moe_inter_dim": 130, "kv_lora_rank": 560, "qk_rope_head_dim": 16}
    return lambda **changes: small_model(**(sizes | {"n_mtp_layers": 1} | changes))


@pytest.fixture
def fp8_folder(tmp_path: Path, fp8_model: Build) -> tuple[Path, dict[str, Tensor]]:
    """A folder in FP8, and what its tensors mean."""
    model = fp8_model()
    tensors, meant = folders.in_fp8(tensors_of(model))
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    raw = config_json(model.config, quantization_config=folders.QUANTIZED)
    return folders.write(tmp_path / "fp8", tensors, raw, shards=3), meant


# In and out


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_and_save_changes_no_bit(
    tmp_path: Path, small_model: Build, dtype: torch.dtype, shards: int, copies: bool
) -> None:
    model = small_model()
    tensors = tensors_of(model, dtype, copies)
    raw = config_json(model.config, bos_token_id=3, torch_dtype=str(dtype).removeprefix("torch."))
    source = folders.write(tmp_path / "a", tensors, raw, shards)
    loaded = load_pretrained(source)
    assert loaded.config == model.config
    assert loaded.head.weight.dtype == dtype
    assert loaded.norm.weight.dtype == torch.float32
    save_pretrained(loaded, tmp_path / "b", shard_size=20_000 if shards > 1 else "1GB")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert folders.config_of(tmp_path / "b") == raw
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    if shards > 1:
        index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(file.stat().st_size < 20_000 + 10_000 for file in files)  # and the header
    else:
        assert [file.name for file in files] == ["model.safetensors"]


def test_stored_dtypes_outlive_casts(tmp_path: Path, small_model: Build) -> None:
    """The FP32 routing bias of a BF16 folder is neither rounded in the model nor on its way back."""
    model = small_model()
    tensors = tensors_of(model, torch.bfloat16)
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert biases
    assert any(not torch.equal(tensors[name], tensors[name].bfloat16().float()) for name in biases)
    loaded = load_pretrained(folders.write(tmp_path / "a", tensors, config_json(model.config)))
    for gate, original in zip(loaded.gates(), model.gates(), strict=True):
        assert gate.bias is not None
        assert torch.equal(gate.bias, original.bias)  # small models have theirs too
        assert gate.weight.dtype == torch.float32
    save_pretrained(copy.deepcopy(loaded).to(torch.bfloat16), tmp_path / "b")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))


def test_dtypes_that_are_asked_for(tmp_path: Path, folder: Path) -> None:
    loaded = load_pretrained(folder, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    fp32 = {name for name, kind in kinds.items() if kind == torch.float32}
    assert fp32 == {name for name in kinds if "norm" in name or ".gate." in name}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    save_pretrained(load_pretrained(folder), tmp_path / "b", dtype=torch.bfloat16)
    written = {name: tensor.dtype for name, tensor in folders.read(tmp_path / "b").items()}
    assert {name for name, kind in written.items() if kind == torch.float32} == {n for n in written if ".gate." in n}
    assert folders.config_of(tmp_path / "b")["torch_dtype"] == "bfloat16"


def test_what_lay_beside_the_tensors_is_copied(tmp_path: Path, folder: Path) -> None:
    beside = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    beside += ["generation_config.json", "tiktoken.model", "modeling_deepseek.py", "merges.txt"]
    for name in beside:
        (folder / name).write_text(name)
    (folder / "optimizer.pt").write_text("no")
    save_pretrained(load_pretrained(folder), tmp_path / "b")
    there = {path.name for path in (tmp_path / "b").iterdir()}
    assert there == {*beside, "config.json", "model.safetensors"}
    assert all((tmp_path / "b" / name).read_text() == name for name in beside)


def test_two_models_in_one_process(tmp_path: Path, small_model: Build) -> None:
    """The second changes nothing in the first."""
    first = small_model(rope_theta=5e4, norm_eps=1e-5)
    a = folders.write(tmp_path / "a", tensors_of(first), config_json(first.config))
    second = small_model(n_heads=2, original_seq_len=8, q_lora_rank=None)
    b = folders.write(tmp_path / "b", tensors_of(second), config_json(second.config))
    tokens = torch.randint(0, 61, (1, 20))
    loaded = load_pretrained(a)
    before = loaded(tokens)
    assert torch.equal(load_pretrained(b)(tokens), second(tokens))
    assert torch.equal(loaded(tokens), before)
    assert torch.equal(first(tokens), before)


def test_rotary_frequencies_of_old_folders_are_passed_over(folder: Path) -> None:
    tensors = folders.read(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load_pretrained(folders.write(folder, tensors, folders.config_of(folder)))


def test_mtp_copies_that_differ_are_said(folder: Path) -> None:
    tensors = folders.read(folder)
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    folders.write(folder, tensors, folders.config_of(folder))
    with pytest.warns(UserWarning, match="has model.layers.3.shared_head.head.weight other than the model's own"):
        load_pretrained(folder)


def test_mtp_layers_that_are_all_absent(folder: Path) -> None:
    tensors = {
        n: t for n, t in folders.read(folder).items() if not n.startswith(("model.layers.2.", "model.layers.3."))
    }
    folders.write(folder, tensors, folders.config_of(folder))
    with pytest.warns(UserWarning, match="holds nothing of the 2 multi-token prediction layers"):
        assert load_pretrained(folder).config.n_mtp_layers == 0


def test_half_of_the_mtp_layers_is_no_model(folder: Path) -> None:
    tensors = {n: t for n, t in folders.read(folder).items() if not n.startswith("model.layers.3.")}
    folders.write(folder, tensors, folders.config_of(folder))
    assert "it lacks model.layers.3.enorm.weight, " in refusal(load_pretrained, folder)


# FP8


def test_ragged_fp8_means_what_its_blocks_mean(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, meant = fp8_folder
    exact = load_pretrained(folder, dtype=torch.float32)
    assert not folders.different(meant, to_hf(exact))
    short = load_pretrained(folder)
    assert not folders.different(
        {name: t.bfloat16() if folders.is_matrix(name) else t for name, t in meant.items()},
        to_hf(short),
    )


def test_kept_fp8_computes_what_it_means(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = fp8_folder
    tokens = torch.randint(0, 61, (2, 20))
    kept, exact = load_pretrained(folder, fp8="keep"), load_pretrained(folder, dtype=torch.float32)
    got, want = kept.run(tokens, mtp=True), exact.run(tokens, mtp=True)
    assert relative_error(got.logits, want.logits) < 1e-5
    assert relative_error(got.mtp_logits[0], want.mtp_logits[0]) < 1e-5
    held, dequantised = (sum(t.nbytes for t in m.state_dict().values()) for m in (kept, exact))
    assert held < 0.35 * dequantised


def test_kept_fp8_survives_casts_and_moves(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    tokens = torch.randint(0, 61, (2, 20))
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model = copy.deepcopy(kept).to(cast)
        after = model.state_dict()
        fp8 = [name for name, tensor in before.items() if tensor.dtype == folders.FP8 or "scale" in name]
        assert len(fp8) > 20
        assert not folders.different({n: before[n] for n in fp8}, {n: after[n] for n in fp8})
        assert model.head.weight.dtype == cast
        if cast != torch.float64:
            still = {name for name in after if "norm" in name or ".gate." in name}
            assert not folders.different({n: before[n] for n in still}, {n: after[n] for n in still})
        model(tokens)
    moved = copy.deepcopy(kept).to("meta")
    assert {n: (t.dtype, t.device.type) for n, t in moved.state_dict().items()} == {
        n: (t.dtype, "meta") for n, t in before.items()
    }
    cast = copy.deepcopy(kept).to(torch.bfloat16)
    want = load_pretrained(fp8_folder[0], dtype=torch.bfloat16)
    assert relative_error(cast(tokens), want(tokens)) < rounding(BF16_UNIT, chained=30)


def test_only_chosen_experts_are_dequantised(
    fp8_folder: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    taken: list[int] = []
    plain = Experts.expert
    monkeypatch.setattr(Experts, "expert", lambda self, i, dtype: taken.append(i) or plain(self, i, dtype))
    out = kept.run(torch.randint(0, 61, (1, 1)))
    assert sorted(taken) == out.routing[0].indices.flatten().sort().values.tolist()
    assert len(taken) == kept.config.n_activated_experts


def test_fp8_is_not_trained(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    tokens = torch.randint(0, 61, (1, 9))
    assert "load the model with fp8='dequantize' to train it" in refusal(kept.train)
    loss = kept.losses(tokens[:, :-1], tokens[:, 1:]).total
    assert "load the model with fp8='dequantize' to train it" in refusal(loss.backward)
    trained = load_pretrained(fp8_folder[0]).train()
    trained.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert all(parameter.grad is not None for parameter in trained.layers[0].parameters())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_kept_fp8_is_saved_bit_by_bit(
    tmp_path: Path, fp8_folder: tuple[Path, dict[str, Tensor]], scale_dtype: torch.dtype
) -> None:
    folder = fp8_folder[0]
    raw = folders.config_of(folder)
    tensors = folders.read(folder)
    if scale_dtype != torch.float32:
        raw["quantization_config"] |= {"scale_fmt": "ue8m0"}
        tensors = {n: t.to(scale_dtype) if n.endswith("_scale_inv") else t for n, t in tensors.items()}
        folder = folders.write(tmp_path / "ue8m0", tensors, raw)
    save_pretrained(load_pretrained(folder, fp8="keep"), tmp_path / "b", shard_size="100KB")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert folders.config_of(tmp_path / "b") == raw
    save_pretrained(load_pretrained(folder, fp8="keep"), tmp_path / "c", dtype=torch.bfloat16)
    save_pretrained(load_pretrained(folder), tmp_path / "d")
    save_pretrained(load_pretrained(folder), tmp_path / "e", fp8=True)
    assert folders.config_of(tmp_path / "e")["quantization_config"] == folders.QUANTIZED
    for path in (tmp_path / "c", tmp_path / "d"):
        written = folders.read(path)
        assert "quantization_config" not in folders.config_of(path)
        assert written.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
        assert {t.dtype for n, t in written.items() if folders.is_matrix(n)} == {torch.bfloat16}


def test_saving_in_fp8(tmp_path: Path, fp8_model: Build) -> None:
    model = fp8_model()
    save_pretrained(model, tmp_path / "a", fp8=True, shard_size="200KB")
    written, plain = folders.read(tmp_path / "a"), tensors_of(model)
    codes = {name for name, tensor in written.items() if tensor.dtype == folders.FP8}
    assert codes == {name for name in plain if folders.is_matrix(name)}
    for name in codes:
        want = quantize_tiles(plain[name], (128, 128), "fp32", "e4m3", 2.0**-100)
        assert torch.equal(written[name].float(), want[0].float())
        assert torch.equal(written[name.replace(".weight", ".weight_scale_inv")], want[1])
    rest = {name: t for name, t in written.items() if name not in codes and not name.endswith("_scale_inv")}
    assert not folders.different(rest, {name: t for name, t in plain.items() if name not in codes})
    assert folders.config_of(tmp_path / "a")["quantization_config"] == folders.QUANTIZED
    again = load_pretrained(tmp_path / "a", fp8="keep")
    save_pretrained(again, tmp_path / "b", fp8=True)
    assert not folders.different(written, folders.read(tmp_path / "b"))


def test_dense_weights_and_experts(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    """What other forms of attention and of the experts take their weights from."""
    folder, meant = fp8_folder
    kept = load_pretrained(folder, fp8="keep")
    linear, experts = kept.layers[1].get_submodule("attn.wkv_b"), kept.layers[1].get_submodule("ffn.experts")
    assert isinstance(linear, Linear)
    assert isinstance(experts, Experts)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(linear.dense(dtype), meant["model.layers.1.self_attn.kv_b_proj.weight"].to(dtype))
        for got, name in zip(experts.expert(5, dtype), ("gate_proj", "down_proj", "up_proj"), strict=True):
            assert torch.equal(got, meant[f"model.layers.1.mlp.experts.5.{name}.weight"].to(dtype))
    plain = Linear(3, 4)
    assert torch.equal(plain.dense(torch.bfloat16), plain.weight.bfloat16())


# What is wrong


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> str:
    """What loading says of a folder after a change of its tensors or config."""
    tensors = folders.read(folder)
    change(tensors)
    folders.write(folder, tensors, folders.config_of(folder) | config)
    return refusal(load_pretrained, folder)


def test_everything_that_is_wrong_is_named(folder: Path) -> None:
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


def test_nothing_is_built_before_the_folder_is_found_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.checkpoint.pretrained._allocate", lambda *_: pytest.fail("memory was taken"))
    assert "it lacks" in edited(folder, lambda tensors: tensors.pop("lm_head.weight"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "has model_type='llama'; dsmini reads deepseek_v2, deepseek_v3 and kimi_k2"),
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
def test_configs_that_are_refused(folder: Path, change: dict[str, Any], sentence: str) -> None:
    assert edited(folder, lambda _: None, **change).startswith(f"{folder / 'config.json'} {sentence}")


def test_fp8_without_scales_or_config(fp8_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
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


def test_experts_of_one_stack_in_fp8_and_not(fp8_folder: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, meant = fp8_folder
    tensors, name = folders.read(folder), "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    tensors[name] = meant[name].bfloat16()
    mixed = folders.write(tmp_path / "a", tensors, folders.config_of(folder))
    load_pretrained(mixed)
    assert "in layers.1.ffn.experts.w3; load it with fp8='dequantize'" in refusal(load_pretrained, mixed, fp8="keep")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "{path} is cut short: it has"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "header of"),
        (lambda path: path.write_bytes(b""), "{path} has 0 bytes and a header of 0: it is cut short or no"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "{path} has 1 bytes behind its last tensor"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "{path} is a Git LFS pointer"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"{{{{"), "the header of {path} is not JSON"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "the header of {path} is a list"),
        (lambda path: with_header(path, lambda h: h["lm_head.weight"].update(shape=[61, 25])), "want 6,100; fetch"),
        (
            lambda path: with_header(path, lambda h: h["lm_head.weight"].update(shape=[-1])),
            "{path} describes lm_head.w",
        ),
        (lambda path: with_header(path, lambda h: h["lm_head.weight"].update(dtype="F4")), "in the dtype 'F4'"),
        (lambda path: with_header(path, lambda h: h["model.norm.weight"].update(data_offsets=[0, 96])), "overlap"),
        (lambda path: with_header(path, lambda h: h["lm_head.weight"].pop("dtype")), "want dtype, shape and data_off"),
    ],
)
def test_damaged_files(folder: Path, damage: Callable[[Path], object], sentence: str) -> None:
    path = folder / "model.safetensors"
    damage(path)
    assert sentence.format(path=path) in refusal(load_pretrained, folder)


@pytest.fixture
def sharded(tmp_path: Path, small_model: Build) -> Path:
    model = small_model()
    return folders.write(tmp_path / "sharded", tensors_of(model), config_json(model.config), shards=3)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_shards_that_are_missing(sharded: Path) -> None:
    for i in (1, 3):
        (sharded / f"model-0000{i}-of-00003.safetensors").unlink()
    assert refusal(load_pretrained, sharded) == (
        f"{sharded} lacks model-00001-of-00003.safetensors, model-00003-of-00003.safetensors, which "
        "model.safetensors.index.json names; fetch what is missing"
    )
    (sharded / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json that says what is in them" in refusal(load_pretrained, sharded)


def test_more_layers_than_there_are_tensors_for(sharded: Path) -> None:
    """Refused before they are made, which for a million takes minutes."""
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 10**6, "num_nextn_predict_layers": 0})
    )
    assert "for the 1000000 layers of its config.json" in refusal(load_pretrained, sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors"])
def test_an_index_that_leaves_the_folder(sharded: Path, file: str) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": file}))
    assert f"names the file {file!r}, which is not in the folder" in refusal(load_pretrained, sharded)


def test_an_index_that_does_not_fit(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": "x.bin"}))
    assert "names 'x.bin'; dsmini opens safetensors files only" in refusal(load_pretrained, sharded)
    edit_index(sharded, lambda weight_map: weight_map.pop("lm_head.weight"))
    load_pretrained(sharded)  # it is in a file that the index names
    edit_index(sharded, lambda m: m.update({"a": m["model.norm.weight"], "b": m["model.norm.weight"]}))
    assert "lacks tensors that model.safetensors.index.json names: a, b;" in refusal(load_pretrained, sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    assert "is no index of tensors" in refusal(load_pretrained, sharded)


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update({"model.norm.weight": m["lm_head.weight"]}))
    assert "holds model.norm.weight, which model.safetensors.index.json has in" in refusal(load_pretrained, sharded)


def test_no_pickle_is_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(load_pretrained, folder)
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    assert "no safetensors file, only pytorch_model.bin; dsmini opens no pickles" in refusal(load_pretrained, folder)


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    assert refusal(load_pretrained, tmp_path / "x").startswith(f"there is no folder {tmp_path / 'x'};")
    (folder / "config.json").rename(folder / "config.toml")
    assert refusal(load_pretrained, folder).endswith("it is a training run, so use python -m dsmini.convert")
    (folder / "config.toml").rename(folder / "x.json")
    assert refusal(load_pretrained, folder) == f"{folder} has no config.json; name a folder that holds a model"
    (folder / "config.json").write_text("{}")
    assert "has no model_type" in refusal(load_pretrained, folder)


def test_arguments_that_are_refused(tmp_path: Path, folder: Path, small_model: Build) -> None:
    assert "fp8='int8' is unknown" in refusal(load_pretrained, folder, fp8="int8")
    assert "dtype=torch.int8 is no dtype of weights" in refusal(load_pretrained, folder, dtype=torch.int8)
    assert "device 'gpu' is unknown" in refusal(load_pretrained, folder, device="gpu")
    model = small_model()
    assert "holds files already" in refusal(save_pretrained, model, folder)
    assert "shard size 'big' is no size of a file" in refusal(save_pretrained, model, tmp_path / "b", shard_size="big")
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
def test_models_that_no_config_json_describes(
    tmp_path: Path, small_model: Build, changes: dict[str, Any], sentence: str
) -> None:
    assert refusal(save_pretrained, small_model(**changes), tmp_path / "b").startswith(sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_mtp_layers": 0, "n_dense_layers": 2},
        {"q_lora_rank": None, "rope_theta": 5e4, "norm_eps": 1e-5},
        {"original_seq_len": 8, "beta_fast": 1.0, "rope_factor": 32.0},
        {"original_seq_len": 8, "mscale": 0.707, "mscale_all_dim": 0.707},
        {"original_seq_len": 8, "mscale": 1.0, "mscale_all_dim": 0.0},
        {"score_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
        {"n_shared_experts": 0},
    ],
)
def test_config_json_there_and_back(tmp_path: Path, small_model: Build, changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    save_pretrained(model, tmp_path / "a")
    loaded = load_pretrained(tmp_path / "a")
    assert loaded.config == model.config
    tokens = torch.randint(0, 61, (2, 20))
    assert torch.equal(loaded(tokens), model(tokens))


# Memory

MEASURE = """
import sys
from pathlib import Path
import dsmini, torch

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

load, folder = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
base = status("VmRSS")
model = dsmini.load_pretrained(folder, fp8=load)
peak = status("VmHWM") - base
print(peak, sum(t.nbytes for t in model.state_dict().values()))
"""


def measured(load: str, folder: Path) -> tuple[int, int]:
    """Bytes at the peak above what the imports took, and bytes of the model."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, load, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    return peak, size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure the peak")
def test_memory(tmp_path: Path) -> None:
    """At most the model, one file, and a tenth more."""
    sizes = {"vocab_size": 1000, "dim": 512, "inter_dim": 1024, "moe_inter_dim": 512, "n_layers": 6, "n_heads": 4}
    model = dsmini.Transformer(ModelConfig(**sizes, n_mtp_layers=0, max_seq_len=32)).to(torch.bfloat16)
    shard = 30_000_000
    save_pretrained(model, tmp_path / "bf16", shard_size=shard)
    save_pretrained(model, tmp_path / "fp8", fp8=True, shard_size=shard // 2)
    for load, folder, largest in (
        ("keep", "bf16", shard),
        ("keep", "fp8", shard // 2),
        ("dequantize", "fp8", shard // 2),
    ):
        peak, size = measured(load, tmp_path / folder)
        print(f"{folder}, {load}: model {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, {peak / size:.2f} of the model")
        assert len(list((tmp_path / folder).glob("model-*.safetensors"))) > 4
        assert peak <= 1.1 * (size + largest)
