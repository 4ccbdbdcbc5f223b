"""Folders of DeepSeek-V3.2: in and out, tensor for tensor, and made from a dense model."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.load import add_indexers, fresh_sizes
from dsmini.convert import main
from dsmini.nn import Indexer
from tests.helpers import folders
from tests.helpers.commands import ROOT
from tests.helpers.configs import DSA, refusal
from tests.helpers.tolerances import FP32_MODEL, relative_error

Build = Callable[..., Transformer]
PREFIX = "model.layers.{}.self_attn.indexer."
NAMES = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")


def test_norms_and_head_weights_of_a_bf16_folder_are_held_in_fp32(tmp_path: Path, small_model: Build) -> None:
    model = small_model(**DSA)
    tensors = folders.tensors_of(model, torch.bfloat16)
    norms = {name: t.float() for name, t in tensors.items() if ".k_norm." in name}  # one listing has them in FP32
    source = folders.write(tmp_path / "a", tensors | norms, folders.config_json(model.config))
    loaded = load_pretrained(source)
    fp32 = {name for name, t in loaded.layers[0].attn.indexer.state_dict().items() if t.dtype == torch.float32}
    assert fp32 == set(NAMES) - {"wq_b.weight", "wk.weight"}
    save_pretrained(loaded, tmp_path / "b")
    assert not folders.different(tensors | norms, folders.read(tmp_path / "b"))


@pytest.mark.parametrize("fp8", ["dequantize", "keep"])
def test_indexer_in_fp8_has_scales_for_two_matrices(tmp_path: Path, fp8_model: Build, fp8: Any) -> None:
    """As released: wq_b and wk are codes with weight_scale_inv, weights_proj and k_norm are not."""
    model = fp8_model(**DSA | {"index_n_heads": 5, "q_lora_rank": 130})
    tensors, meant = folders.in_fp8(folders.tensors_of(model, torch.bfloat16))
    index = {name.removeprefix(PREFIX.format(0)): t for name, t in tensors.items() if name.startswith(PREFIX.format(0))}
    scales = {"wq_b.weight_scale_inv", "wk.weight_scale_inv"}
    assert index.keys() == {*NAMES, *scales} and index["wq_b.weight_scale_inv"].shape == (2, 2)
    raw = folders.config_json(model.config, quantization_config=folders.QUANTIZED | {"scale_fmt": "ue8m0"})
    source = folders.write(tmp_path / "a", tensors, raw)
    loaded = load_pretrained(source, dtype=torch.float32, fp8=fp8)
    exact = Transformer(model.config)
    exact.load_state_dict(load_pretrained(folders.write(tmp_path / "x", meant, raw), torch.float32).state_dict())
    tokens = torch.randint(0, 61, (1, 20))
    assert relative_error(loaded(tokens), exact(tokens)) < FP32_MODEL
    if fp8 == "keep":
        assert loaded.layers[0].attn.indexer.wk.weight.dtype == folders.FP8
        save_pretrained(loaded, tmp_path / "b")
        assert not folders.different(tensors, folders.read(tmp_path / "b"))
        assert folders.config_of(tmp_path / "b") == raw
    else:
        save_pretrained(loaded, tmp_path / "b", fp8=True)
        again = folders.read(tmp_path / "b")
        assert {n for n, t in again.items() if t.dtype == folders.FP8} == set(filter(folders.is_matrix, again))


# a dense model becomes a sparse one


def test_convert_adds_fresh_indexers(
    tmp_path: Path, small_model: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = small_model(), torch.randint(0, 61, (2, 20))
    tensors = folders.tensors_of(model, torch.bfloat16)
    folders.write(tmp_path / "a", tensors, folders.config_json(model.config))
    monkeypatch.chdir(tmp_path)
    flags = "--dsa --index-n-heads 3 --index-head-dim 32 --index-topk 8 --json"
    assert main(f"a b {flags}".split()) == 0
    sparse = load_pretrained(tmp_path / "b", torch.float32)
    dense = load_pretrained(tmp_path / "a", torch.float32)
    assert sparse.config == ModelConfig.from_file(tmp_path / "b" / "config.json")
    assert (sparse.config.attention, sparse.config.index_topk) == ("dsa", 8)
    assert torch.equal(sparse(tokens[:, :8]), dense(tokens[:, :8]))
    assert not torch.equal(sparse(tokens), dense(tokens))
    saved = folders.read(tmp_path / "b")
    assert not folders.different(tensors, {name: t for name, t in saved.items() if ".indexer." not in name})
    assert sum(isinstance(part, Indexer) for part in sparse.modules()) == 4
    assert (saved[PREFIX.format(3) + "k_norm.bias"] == 0).all() and (saved[PREFIX.format(3) + "wk.weight"] != 0).all()
    drawn = [saved[PREFIX.format(layer) + "wk.weight"] for layer in (0, 1)]
    assert not torch.equal(*drawn)
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == sum(p.numel() for p in sparse.parameters())


def test_fresh_indexers_have_the_sizes_of_their_model() -> None:
    """V3 gets V3.2's sizes, a toy sizes so small enough that its tokens have a choice."""
    v3 = ModelConfig.from_file(ROOT / "configs" / "deepseek-v3.toml")
    assert fresh_sizes(v3) == {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    toy = fresh_sizes(ModelConfig())
    assert toy == {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 64}
    odd = ModelConfig(n_heads=1, qk_nope_head_dim=24, qk_rope_head_dim=48, max_seq_len=3)
    dataclasses.replace(odd, attention="dsa", **fresh_sizes(odd))


@pytest.mark.parametrize(
    ("changes", "sizes", "sentence"),
    [
        (DSA, {}, "an indexer belongs to MLA, and this model has attention='dsa'; use a model of DeepSeek-V3"),
        ({"attention": "mha"}, {}, "an indexer belongs to MLA, and this model has attention='mha'"),
        ({"qk_norm": True}, {}, "attention='dsa' with qk_norm: it has no form"),
        ({}, {"topk": 0}, "index_topk=0 is not positive; use 1 or more"),
        ({}, {"head_dim": 2}, "index_head_dim=2 is smaller than qk_rope_head_dim=4, which it holds; use 4"),
    ],
)
def test_impossible_indexers_are_refused(
    small_model: Build, changes: dict[str, Any], sizes: dict[str, int], sentence: str
) -> None:
    model = small_model(**changes)
    assert refusal(add_indexers, model, **{"n_heads": 3, "head_dim": 32, "topk": 8} | sizes).startswith(sentence)
    assert model.config.attention == changes.get("attention", "mla")
