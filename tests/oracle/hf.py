"""Random DeepSeek models of transformers, and dsmini's models of the folders that they are saved in."""

import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)
from transformers.modeling_layers import MtpModel

from dsmini import Transformer, load_pretrained

MODELS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("models.toml").read_text())
SMALL = MODELS["small"]
INDEX = {"index_n_heads": 13, "index_head_dim": 16, "index_topk": 12}
"""Sizes of an indexer. It has this number of heads because a key that none of them likes ties with others at zero."""


def yarn(**changes: Any) -> dict[str, Any]:
    """Return rope_parameters of an extended context with two different temperatures."""
    values = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1}
    return values | {"mscale": 0.707, "mscale_all_dim": 1.2, "original_max_position_embeddings": 16} | changes


def cases(kind: str) -> dict[str, dict[str, Any]]:
    """Return the cases of a kind in cases.toml."""
    found: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("cases.toml").read_text())[kind]
    for name, row in found.items():
        extended = {"rope_parameters": yarn(**row.pop("yarn"))} if "yarn" in row else {}
        found[name] = extended | {key: None if value == "none" else value for key, value in row.items()}
    return found


def made(model_class: Any, config_class: Any, seed: int, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(seed)
    model = model_class(config_class(**sizes, attn_implementation="eager")).eval()
    _randomise(model)
    return model


def v3(seed: int, **changes: Any) -> DeepseekV3ForCausalLM:
    return made(DeepseekV3ForCausalLM, DeepseekV3Config, seed, SMALL | {"num_mtp_layers": 0} | changes)


def v2(seed: int, **changes: Any) -> DeepseekV2ForCausalLM:
    return made(DeepseekV2ForCausalLM, DeepseekV2Config, seed, SMALL | changes)


def v32(seed: int, **changes: Any) -> DeepseekV32ForCausalLM:
    return made(DeepseekV32ForCausalLM, DeepseekV32Config, seed, SMALL | INDEX | changes)


def glm(seed: int, types: str = "FFSSF", **changes: Any) -> GlmMoeDsaForCausalLM:
    """Return a model whose layers are full (F) or shared (S)."""
    sizes = SMALL | INDEX | {"index_n_heads": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    kinds = [{"F": "full", "S": "shared"}[kind] for kind in types]
    sizes |= {"num_hidden_layers": len(types), "indexer_types": kinds, "n_group": 1, "topk_group": 1}
    return made(GlmMoeDsaForCausalLM, GlmMoeDsaConfig, seed, sizes | changes)


def mtp(model: DeepseekV3ForCausalLM, depth: int) -> MtpModel:
    """Return random multi-token prediction blocks of transformers for the model."""
    blocks = MtpModel(model, depth).eval()
    _randomise(blocks.layers)
    return blocks


def _randomise(model: Any) -> None:
    """Draw parameters so large that every part matters, norms around 1, biases of routing, and tables of experts."""
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                t.copy_(torch.rand(len(t), model.config.num_local_experts).argsort(-1)[:, : t.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                t.uniform_(-0.4, 0.1)
            elif "norm" in name:
                t.uniform_(0.5, 1.5)
            elif "inv_freq" not in name:
                free = t.dim() == 1 or any(part in name for part in ("bias", "embed", "sinks"))
                t.normal_(std=1.0 if free else t.shape[-1] ** -0.5)


def ours(theirs: Any) -> Transformer:
    """Return dsmini's model of the folder that transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load_pretrained(folder)


def gradients(theirs: Any) -> dict[str, Tensor]:
    """Return a model's gradients under dsmini's names. They go the way of the weights, in whose place they are put."""
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return ours(theirs).state_dict()


V4_KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 7: "heavily_compressed_attention"}
"""transformers' name of a layer's attention by its ratio."""


def v4_layers(*ratios: int) -> dict[str, Any]:
    """Return the fields of V4's config.json for layers of these ratios; 7 is one that no released model has."""
    kinds, rates = [V4_KINDS[m] for m in ratios], {V4_KINDS[m]: m for m in (4, 7)}
    return {"compress_ratios": list(ratios), "layer_types": kinds, "compress_rates": rates}


def v4(folder: Path, **changes: Any) -> DeepseekV4ForCausalLM:
    """Return a random V4 model, none of whose parts is zero, for a config.json that is written into a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODELS["v4"] | changes))
    torch.manual_seed(3)
    model: Any = DeepseekV4ForCausalLM(DeepseekV4Config.from_pretrained(folder, attn_implementation="eager")).eval()
    _randomise(model)
    return model
