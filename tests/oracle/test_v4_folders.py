"""Folders of DeepSeek-V4 pass between dsmini and transformers, in both directions and spellings, with equal logits."""

import json
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
from safetensors.torch import load_file
from test_transformers import LOGITS, assert_close, tokens_for
from transformers import DeepseekV4ForCausalLM

from dsmini import ModelConfig, Transformer, load_pretrained, save_pretrained

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
CASES: dict[str, dict[str, Any]] = {
    "window, CSA, HCA of 128": {},
    "yarn": {"rope_scaling": YARN},
    "HCA of 7": hf.v4_layers(7, 4, 0, 7) | {"rope_scaling": YARN},
}


@pytest.mark.parametrize("released_names", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_folders_pass_in_both_directions(tmp_path: Path, case: str, released_names: bool) -> None:
    """transformers saves its module names, or by default nearly the released ones. dsmini writes those."""
    model = hf.v4(tmp_path / "config", **CASES[case])
    tokens = tokens_for(model)
    want = model(tokens).logits
    model.save_pretrained(tmp_path / "a", save_original_format=released_names)
    ours = load_pretrained(tmp_path / "a")
    assert_close(ours(tokens), want, LOGITS, "logits of transformers' folder")

    save_pretrained(ours, tmp_path / "b")
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "b", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    back, info = loaded
    assert not any(info.values()), info
    assert_close(back(tokens).logits, want, LOGITS, "logits of dsmini's folder")
    written, given = (load_file(tmp_path / folder / "model.safetensors") for folder in ("b", "a"))
    assert sum(t.nbytes for t in written.values()) == sum(t.nbytes for t in given.values())


def test_a_new_model_with_mtp_loads_in_transformers(tmp_path: Path) -> None:
    """A config.json that dsmini makes, with a ratio that transformers does not know, and MTP that it ignores."""
    raw = tmp_path / "config.json"
    raw.write_text(json.dumps(hf.MODELS["v4"] | CASES["HCA of 7"] | {"num_nextn_predict_layers": 1}))
    torch.manual_seed(5)
    ours = Transformer(ModelConfig.from_file(raw)).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    save_pretrained(ours, tmp_path / "a")
    back: Any = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager", dtype=torch.float32)
    tokens = tokens_for(back)
    assert_close(ours(tokens), back(tokens).logits, LOGITS, "logits of a new model")
