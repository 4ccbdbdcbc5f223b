"""DeepSeek's inference layout: the files that its convert.py writes are read, and become a folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, load_pretrained
from dsmini.convert import main
from tests.helpers import folders
from tests.helpers.inference_layouts import INDEX, INFERENCE, inference_layout

Build = Callable[..., Transformer]
WIDE = INFERENCE | {"n_heads": 8, "moe_inter_dim": 256}
"""Sizes of which each of four ranks has whole blocks of FP8 scales."""
V2 = {"score_func": "softmax", "n_expert_groups": 1, "n_limited_groups": 1, "mscale": 0.707, "q_lora_rank": 0}
KINDS: dict[str, dict[str, Any]] = {"v2": V2, "v3": {}, "v32": INDEX}


@pytest.fixture
def build(small_model: Build) -> Callable[..., tuple[Transformer, dict[str, Any]]]:
    """Return a model of a kind, with multi-token prediction, and its JSON file of DeepSeek's inference code."""

    def make(kind: str, **changes: Any) -> tuple[Transformer, dict[str, Any]]:
        raw = WIDE | {"max_seq_len": 64, "original_seq_len": 32} | KINDS[kind]
        more: dict[str, Any] = {"attention": "dsa"} if kind == "v32" else {}
        if kind == "v2":
            more = {"topk_method": "greedy", "norm_topk_prob": False, "mscale_all_dim": 0.707, "q_lora_rank": None}
        return small_model(**{"n_mtp_layers": 1} | raw | more | changes), raw

    return make


def without_mtp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not name.startswith(("model.layers.2.", "mtp."))}


DTYPES, RANKS = ("bfloat16", "float32", "fp8"), (1, 2, 4)
CASES = [
    # every pair of two of the three
    (kind, ranks, dtype)
    for i, kind in enumerate(KINDS)
    for j, ranks in enumerate(RANKS)
    for k, dtype in enumerate(DTYPES)
    if (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("kind", "ranks", "dtype"), CASES)
def test_files_of_deepseek_are_read_and_become_a_folder(
    tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch, kind: str, ranks: int, dtype: str
) -> None:
    model, raw = build(kind, **({"moe_inter_dim": 200} if ranks == 1 else {}))  # ragged blocks of scales
    raw |= {"moe_inter_dim": model.config.moe_inter_dim, "dtype": "fp8" if dtype == "fp8" else "bf16"}
    tensors, exact = folders.tensors_of(model, torch.float32 if dtype == "float32" else torch.bfloat16), None
    quantization = {}
    if dtype == "fp8":
        tensors, exact = folders.in_fp8(tensors)
        quantization = {"quantization_config": folders.QUANTIZED | {"scale_fmt": "ue8m0"}}
        raw |= {"scale_fmt": "ue8m0"}
    source = folders.write(tmp_path / "a", tensors, folders.config_json(model.config, **quantization))
    kept = without_mtp(tensors)
    theirs = inference_layout(tmp_path / "theirs", kept, raw, ranks, "config_16B.json")
    monkeypatch.chdir(tmp_path)
    # 1. theirs is read
    back = load_pretrained(theirs)
    assert not folders.different(back.state_dict(), without_mtp(load_pretrained(source).state_dict()))
    assert back.config == dataclasses.replace(model.config, n_mtp_layers=0)
    tokens = torch.randint(0, 64, (1, 20))
    assert torch.equal(back.float()(tokens), load_pretrained(source).float()(tokens))
    loaded = folders.tensors_of(load_pretrained(theirs, dtype=torch.float32))
    assert not folders.different(loaded, {name: t.float() for name, t in without_mtp(exact or tensors).items()})
    # 2. theirs becomes a folder
    assert main(["theirs", "c"]) == 0
    assert not folders.different(folders.read(tmp_path / "c"), kept)
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert ("quantization_config" in folders.config_of(tmp_path / "c")) == (dtype == "fp8")
