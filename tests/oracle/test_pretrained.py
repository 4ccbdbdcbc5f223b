"""Read folders that transformers saved as transformers does, and save folders that transformers loads."""

import json
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
from test_transformers import LOGITS, assert_close, tokens_for
from transformers import AutoModelForCausalLM

import dsmini
from tests.helpers import folders

V3_CASES, V2_CASES = hf.cases("v3_folders"), hf.cases("v2_folders")
CASES = [*V3_CASES, *V2_CASES, "v32", "glm"]


def theirs(case: str) -> Any:
    if case in V2_CASES:
        return hf.v2(7, **V2_CASES[case])
    if case == "glm":
        return hf.glm(7, "FSSFS")
    if case == "v32":
        return hf.v32(7, rope_parameters=hf.yarn(mscale=1.0, mscale_all_dim=1.0), rms_norm_eps=1e-6)
    return hf.v3(7, **V3_CASES[case])


def saved(case: str, folder: Path, **options: Any) -> tuple[Any, Path]:
    """Yield a model of transformers and its saved folder."""
    model = theirs(case)
    model.save_pretrained(folder, **options)
    if case == "kimi_k2":  # transformers lacks this type; the released folder has V3's tensors and its own code
        (folder / "config.json").write_text(json.dumps(folders.config_of(folder) | {"model_type": "kimi_k2"}))
    return model, folder


def in_the_old_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config in the spelling of the released files."""
    rope = dict(raw["rope_parameters"])
    old = {k: v for k, v in raw.items() if k not in ("rope_parameters", "dtype", "head_dim", "qk_head_dim")}
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw["dtype"], "rope_scaling": None}
    kind = rope.pop("rope_type")
    return old if kind == "default" else old | {"rope_scaling": {"type": kind, **rope}}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_folder_that_transformers_saved(tmp_path: Path, case: str, spelling: str) -> None:
    model, folder = saved(case, tmp_path / "a")
    if spelling == "rope_scaling":
        (folder / "config.json").write_text(json.dumps(in_the_old_spelling(folders.config_of(folder))))
    tokens, ours = tokens_for(model), dsmini.load_pretrained(folder)
    assert_close(ours(tokens), model(tokens).logits, LOGITS, case)
    dsmini.save_pretrained(ours, tmp_path / "b")
    assert not folders.different(folders.read(folder), folders.read(tmp_path / "b"))
    assert folders.config_of(folder) == folders.config_of(tmp_path / "b")


@pytest.mark.parametrize("case", ["v3", "moonlight", "v2-lite", "v2", "v32", "glm"])
def test_what_we_save_transformers_loads(tmp_path: Path, case: str) -> None:
    """Save our own model, whose config we write too."""
    model, folder = saved(case, tmp_path / "a", max_shard_size="100KB")
    ours = dsmini.load_pretrained(folder)
    fresh = dsmini.Transformer(ours.config)
    fresh.load_state_dict(ours.state_dict())
    dsmini.save_pretrained(fresh, tmp_path / "b", shard_size="100KB")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens = tokens_for(model)
    assert_close(again(tokens).logits, fresh(tokens), LOGITS, case)
    assert dsmini.ModelConfig.from_file(tmp_path / "b" / "config.json") == ours.config


def test_indexers_of_shared_layers_are_named_and_dropped(tmp_path: Path) -> None:
    """The config decides who has one, as in transformers, whatever the folder holds."""
    hf.glm(7, "FFFF").save_pretrained(tmp_path)
    raw = folders.config_of(tmp_path) | {"indexer_types": ["full", "shared", "shared", "full"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.warns(
        UserWarning, match=r"has indexers in layers that take another layer's choice, .* dropped"
    ) as seen:
        ours = dsmini.load_pretrained(tmp_path)
    said = str(seen[0].message)
    assert "model.layers.1.self_attn.indexer.wk.weight" in said and "layers.0." not in said and "layers.3." not in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = tokens_for(model)
    assert_close(ours(tokens), model(tokens).logits, LOGITS, "logits")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("copies", [True, False])
def test_mtp(tmp_path: Path, depth: int, copies: bool) -> None:
    """A folder has the blocks as layers after the last one, with three norms and a projection more."""
    deeper, model = (hf.v3(8, **V3_CASES["v3"], num_hidden_layers=n) for n in (3 + depth, 3))
    model.load_state_dict(deeper.state_dict(), strict=False)
    blocks: Any = hf.mtp(model, depth)
    deeper.save_pretrained(tmp_path / "deeper")
    tensors = folders.read(tmp_path / "deeper")
    for k, block in enumerate(blocks.layers):
        block.mtp_block.load_state_dict(deeper.model.layers[3 + k].state_dict())
        added: dict[str, Any] = {"eh_proj": block.eh_proj, "enorm": block.enorm, "hnorm": block.hnorm}
        added |= {"shared_head.norm": block.post_norm}
        if copies:
            added |= {"embed_tokens": model.model.embed_tokens, "shared_head.head": model.lm_head}
        tensors |= {f"model.layers.{3 + k}.{name}.weight": module.weight.data for name, module in added.items()}
    raw = json.loads(model.config.to_json_string()) | {"num_nextn_predict_layers": depth}
    folder = folders.write(tmp_path / "a", tensors, raw, shards=3)
    ours = dsmini.load_pretrained(folder)
    tokens = tokens_for(model)
    with torch.no_grad():
        got = ours.run(tokens, mtp=True)
        hidden = model.model(tokens).last_hidden_state
        for k in range(1, depth + 1):
            s = tokens.shape[1] - k
            hidden = blocks.forward_layer(k - 1, hidden[:, :s], torch.arange(s)[None], None, input_ids=tokens[:, k:])
            assert_close(got.mtp_logits[k - 1], model.lm_head(hidden), LOGITS, f"depth {k}")
    dsmini.save_pretrained(ours, tmp_path / "b")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))


@pytest.fixture
def their_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers read FP8 without accelerate, which it requires but does not need here."""
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)


@pytest.mark.usefixtures("their_fp8")
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_is_dequantised_as_transformers_does(tmp_path: Path, scale_fmt: str | None) -> None:
    model = hf.v3(10, **hf.MODELS["whole_blocks"])
    model.save_pretrained(tmp_path / "plain")
    tensors, _ = folders.in_fp8(folders.read(tmp_path / "plain"))
    if scale_fmt:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].log2().ceil().exp2()
    quantized = folders.QUANTIZED | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    raw = json.loads(model.config.to_json_string()) | {"quantization_config": quantized, "dtype": "float32"}
    folder = folders.write(tmp_path / "a", tensors, raw)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = tokens_for(model)
    want = again(tokens).logits
    assert_close(dsmini.load_pretrained(folder, dtype=torch.float32)(tokens), want, LOGITS, "dequantized")
    kept = dsmini.load_pretrained(folder, fp8="keep")
    assert_close(kept(tokens), want, LOGITS, "kept")
    dsmini.save_pretrained(kept, tmp_path / "b")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert folders.config_of(tmp_path / "b") == raw


@pytest.mark.usefixtures("their_fp8")
def test_transformers_loads_what_we_quantise(tmp_path: Path) -> None:
    model = hf.v3(11, **hf.MODELS["whole_blocks"])
    model.save_pretrained(tmp_path / "a")
    ours = dsmini.load_pretrained(tmp_path / "a")
    dsmini.save_pretrained(ours, tmp_path / "b", fp8=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32, attn_implementation="eager")
    tokens = tokens_for(model)
    got = dsmini.load_pretrained(tmp_path / "b", dtype=torch.float32)(tokens)
    assert_close(got, again(tokens).logits, LOGITS, "quantised")
