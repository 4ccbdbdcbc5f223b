"""transformers' classes make the tensors of the vectors from the same folders, and the checker finds no difference."""

import json
import tomllib
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v4 import modeling_deepseek_v4

from dsmini.checkpoint.check_vectors import compare
from dsmini.checkpoint.inspection import Inspection
from dsmini.checkpoint.load import parts_of
from dsmini.checkpoint.vectors import GENERATIONS, config_of, rising, write
from dsmini.nn.layers import RMSNorm
from tests.helpers.folders import inspected

POINTS = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())["points"]
LACKS = {"v3": ()} | dict.fromkeys(("v3.2", "v4", "glm-5.2"), ("mtp.",))
"""Beginnings of the names that transformers has no code for."""


def computed(model: Any, inputs: dict[str, Tensor], patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return the tensors that transformers makes, under the names of the vectors."""
    out: dict[str, Tensor] = {}
    tokens, s = inputs["tokens"], inputs["tokens"].shape[1]
    hooks = []

    def on(module: Any, note: Any) -> None:
        hooks.append(module.register_forward_hook(lambda _, __, result: out.update(note(result))))

    for i, layer in enumerate(model.model.layers):
        on(layer, lambda x, i=i: {f"layers.{i}": x[0] if isinstance(x, tuple) else x})
        for name, module in layer.named_modules():
            at = f"layers.{i}."
            if name in POINTS:
                one = f"{at}{POINTS[name]}"
                on(module, lambda x, one=one: {one: x[0] if isinstance(x, tuple) else x})
            elif name.endswith("_hc"):
                one = f"{at}hc_{name[:-3]}."
                on(module, lambda x, one=one: {f"{one}post": x[0], f"{one}comb": x[1], f"{one}read": x[2]})
            elif name == "mlp.gate":
                on(
                    module,
                    lambda x, one=f"{at}ffn.gate.", gate=module: routed(
                        one, x, getattr(gate, "score_fn", torch.sigmoid)
                    ),
                )
            elif name == "self_attn.compressor":
                on(module, lambda x, one=f"{at}attn.entries": {one: x[0][:, 0]})
            elif name.endswith("indexer"):
                on(
                    module,
                    lambda x, one=f"{at}attn.topk": {
                        one: chosen(x, 0 if model.config.model_type == "deepseek_v4" else s)
                    },
                )
    on(model.model.embed_tokens, lambda x: {"embed": x})
    on(model.model.norm, lambda x: {"norm": x})
    if hasattr(model.model, "hc_head"):
        on(model.model.hc_head, lambda x: {"hc_head": x})
        attend, windows = modeling_deepseek_v4.eager_attention_forward, list[Tensor]()
        patch.setattr(
            modeling_deepseek_v4,
            "eager_attention_forward",
            lambda of, q, k, *rest, **more: (windows.append(k[:, 0, s - 8 : s]), attend(of, q, k, *rest, **more))[1],
        )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        hidden = model.model(tokens, cache=cache).last_hidden_state
    for i, layer in enumerate(cache.layers):
        if hasattr(model.model, "hc_head"):
            out[f"layers.{i}.attn.window"] = windows[i]
            if "indexer" in getattr(layer, "compressed_kv", {}):
                out[f"layers.{i}.attn.index_keys"] = layer.compressed_kv["indexer"]
        else:
            out[f"layers.{i}.attn.k_rope"] = neighbours(layer.values[:, 0])
            if getattr(layer, "indexer_keys", None) is not None:
                rope, nope = layer.indexer_keys.split(8, -1)
                in_pairs = model.config.model_type == "glm_moe_dsa"
                out[f"layers.{i}.attn.index_keys"] = torch.cat((neighbours(rope) if in_pairs else rope, nope), -1)
    for hook in hooks:
        hook.remove()
    logits = out["logits"] = model(tokens).logits
    out["loss"] = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten())
    out["loss"].backward()
    rows = [continued(model, prompt[None, :n]) for prompt, n in zip(inputs["prompts"], inputs["lengths"], strict=True)]
    out["decode.logits"] = torch.cat(rows)
    out["decode.tokens"] = out["decode.logits"].argmax(-1).int()
    out["hidden"] = hidden
    return {name: value.detach().contiguous() for name, value in out.items()}


def neighbours(rotated: Tensor) -> Tensor:
    """Return pairs next to each other: transformers puts their first numbers before all second ones."""
    return rearrange(rotated, "b s (two p) -> b s (p two)", two=2)


def routed(name: str, result: Any, score: Any) -> dict[str, Tensor]:
    logits, weights, indices = result
    every = torch.zeros_like(logits).scatter(1, indices, weights)
    parts = {"scores": score(logits), "experts": rising(indices), "weights": every}
    return {f"{name}{part}": value[None] for part, value in parts.items()}


def chosen(indices: Tensor, s: int) -> Tensor:
    """Return chosen keys in rising order; but for V4's they come with hidden ones, where a query sees few."""
    seen = indices if not s else torch.where(indices <= torch.arange(s)[:, None], indices, -1)
    return rising(seen)


@torch.no_grad()
def continued(model: Any, prompt: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    logits = [model(prompt, cache=cache).logits[:, -1]]
    while len(logits) < 8:
        logits.append(model(logits[-1].argmax(-1, keepdim=True), cache=cache).logits[:, -1])
    return torch.stack(logits, 1)


def multi_token_prediction(model: Any, folder: Path, hidden: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Return the block of V3's multi-token prediction, and its logits."""
    blocks: Any = MtpModel(model, 1).eval()
    depth, n = len(model.model.layers), tokens.shape[1] - 1
    tensors, layer = load_file(folder / "model.safetensors"), blocks.layers[0]
    added = {"enorm": layer.enorm, "hnorm": layer.hnorm, "eh_proj": layer.eh_proj, "shared_head.norm": layer.post_norm}
    for name, module in added.items():
        module.weight.data = tensors[f"model.layers.{depth}.{name}.weight"]
    # the block is a layer of a model that is deeper by one
    deeper: Any = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=depth + 1, dtype=torch.float32)
    layer.mtp_block.load_state_dict(deeper.model.layers[depth].state_dict())
    out: dict[str, Tensor] = {}
    layer.mtp_block.register_forward_hook(lambda _, __, x: out.update({"mtp.0.block": x}))
    with torch.no_grad():
        normed = blocks.forward_layer(0, hidden[:, :n], torch.arange(n)[None], None, input_ids=tokens[:, 1:])
        out["mtp.0.logits"] = model.lm_head(normed)
    return out


@pytest.mark.parametrize("generation", GENERATIONS)
def test_transformers_makes_the_same_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, generation: str) -> None:
    folder = tmp_path / "vectors"
    write(folder, generation)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    inputs = load_file(folder / "inputs.safetensors")
    mine = computed(model, inputs, monkeypatch)
    hidden = mine.pop("hidden")
    if generation == "v3":
        mine |= multi_token_prediction(model, folder, hidden, inputs["tokens"])
    gradients = hf.gradients(model)
    index = json.loads((folder / "index.json").read_text())
    names = [entry["name"] for entry in index["tensors"]]
    for part in parts_of(hf.ours(model)):
        if f"grad.{part.name}" in names:
            whole = gradients[part.ours]
            mine[f"grad.{part.name}"] = whole if part.expert is None else whole[part.expert]
    lacking = [name for name in names if name not in mine]
    assert all(name.startswith(LACKS[generation]) for name in lacking), lacking
    expected = {name: t.numpy() for name, t in load_file(folder / "expected.safetensors").items()}
    found = compare(index, expected, {name: t.numpy() for name, t in mine.items()})
    assert found == len(names) - len(lacking), found


# --- the check of a folder runs transformers' blocks, names the layer that differs, and says what it does not know


@pytest.mark.parametrize("generation", GENERATIONS)
def test_each_block_equals_transformers(tmp_path: Path, generation: str) -> None:
    checked = list(Inspection(inspected(tmp_path / "a", generation)))
    assert not [fault for layer in checked for fault in layer.faults]
    errors = [layer.error for layer in checked if layer.name.startswith("layers")]
    assert len(errors) == config_of(generation).n_layers and all(
        error is not None and error < 1e-5 for error in errors
    ), errors


@pytest.mark.parametrize("generation", GENERATIONS)
def test_other_choices_of_single_tokens_in_bf16_are_no_fault(tmp_path: Path, generation: str) -> None:
    checked = list(Inspection(inspected(tmp_path / "a", generation), torch.bfloat16))
    assert not [fault for layer in checked for fault in layer.faults]


def test_a_block_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, forward = inspected(tmp_path / "a", "v3"), RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda of, x: forward(of, x) * 1.001)
    faults = [fault for layer in Inspection(folder) for fault in layer.faults]
    assert faults and all("transformers' block differs by 0.0" in fault for fault in faults), faults


def test_a_model_that_transformers_does_not_know_says_so(tmp_path: Path) -> None:
    folder = inspected(tmp_path / "a", "v3")
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "kimi_k2"}))
    inspection = Inspection(folder)
    assert inspection.why_not.startswith("transformers has no such model")
    assert [layer.error for layer in inspection] == [None] * 5
