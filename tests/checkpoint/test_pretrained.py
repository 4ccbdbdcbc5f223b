"""Folders in and out: the same tensors, dtypes and configs, and what is said of folders that differ."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import Transformer, load_pretrained, save_pretrained
from tests.helpers import folders
from tests.helpers.configs import DSA

Build = Callable[..., Transformer]
INDEXER = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
DENSE = [({}, shards, copies) for shards in (1, 4) for copies in (True, False)]
SPARSE = [(DSA | changes, 2, True) for changes in ({}, {"q_lora_rank": None}, {"indexer_rope_interleave": True})]


@pytest.mark.parametrize(("changes", "shards", "copies"), DENSE + SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_then_save_changes_no_bit(
    tmp_path: Path, small_model: Build, dtype: torch.dtype, changes: dict[str, Any], shards: int, copies: bool
) -> None:
    model = small_model(**changes)
    tensors = folders.tensors_of(model, dtype, copies)
    raw = folders.config_json(model.config, bos_token_id=3, torch_dtype=str(dtype).removeprefix("torch."))
    if changes:
        layers = [f"model.layers.{i}.self_attn.indexer." for i in range(4)]  # two of them are MTP's
        assert tensors.keys() >= {layer + name for layer in layers for name in INDEXER}
        assert raw["model_type"] == "deepseek_v32" and raw["architectures"] == ["DeepseekV32ForCausalLM"]
        assert ("indexer_rope_interleave" in raw) == ("indexer_rope_interleave" in changes)
    loaded = load_pretrained(folders.write(tmp_path / "a", tensors, raw, shards))
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


def test_stored_dtypes_survive_casts(tmp_path: Path, small_model: Build) -> None:
    """The FP32 routing bias of a BF16 folder is neither rounded in the model nor on its way back."""
    model = small_model()
    tensors = folders.tensors_of(model, torch.bfloat16)
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert any(not torch.equal(tensors[name], tensors[name].bfloat16().float()) for name in biases)
    loaded = load_pretrained(folders.write(tmp_path / "a", tensors, folders.config_json(model.config)))
    for gate, original in zip(loaded.gates(), model.gates(), strict=True):
        assert gate.bias is not None
        assert torch.equal(gate.bias, original.bias)  # small models have theirs too
        assert gate.weight.dtype == torch.float32
    save_pretrained(copy.deepcopy(loaded).to(torch.bfloat16), tmp_path / "b")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))


def test_requested_dtype_leaves_norms_and_gates_fp32(tmp_path: Path, folder: Path) -> None:
    loaded = load_pretrained(folder, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    fp32 = {name for name, kind in kinds.items() if kind == torch.float32}
    assert fp32 == {name for name in kinds if "norm" in name or ".gate." in name}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    save_pretrained(load_pretrained(folder), tmp_path / "b", dtype=torch.bfloat16)
    written = {name: tensor.dtype for name, tensor in folders.read(tmp_path / "b").items()}
    assert {name for name, kind in written.items() if kind == torch.float32} == {n for n in written if ".gate." in n}
    assert folders.config_of(tmp_path / "b")["torch_dtype"] == "bfloat16"


def test_small_files_are_copied_along(tmp_path: Path, folder: Path) -> None:
    beside = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    beside += ["generation_config.json", "tiktoken.model", "modeling_deepseek.py", "merges.txt"]
    for name in [*beside, "optimizer.pt"]:
        (folder / name).write_text(name)
    loaded = load_pretrained(folder)
    save_pretrained(loaded, tmp_path / "b")
    there = {path.name for path in (tmp_path / "b").iterdir()}
    assert there == {*beside, "config.json", "model.safetensors"}
    assert all((tmp_path / "b" / name).read_text() == name for name in beside)
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="from which the model was loaded, is gone; its tokenizer is not copied"):
        save_pretrained(loaded, tmp_path / "c")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    return folders.write(folder, change(folders.read(folder)), folders.config_of(folder))


def test_rotary_frequencies_of_old_folders_are_ignored(folder: Path) -> None:
    load_pretrained(edit(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))


def test_mtp_copies_that_differ_warn(folder: Path) -> None:
    edit(folder, lambda t: t | {"model.layers.3.shared_head.head.weight": t["lm_head.weight"] + 1})
    with pytest.warns(UserWarning, match="has model.layers.3.shared_head.head.weight other than the model's own"):
        load_pretrained(folder)


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
def test_config_json_round_trip(tmp_path: Path, small_model: Build, changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    save_pretrained(model, tmp_path / "a")
    loaded = load_pretrained(tmp_path / "a")
    assert loaded.config == model.config
    tokens = torch.randint(0, 61, (2, 20))
    assert torch.equal(loaded(tokens), model(tokens))
