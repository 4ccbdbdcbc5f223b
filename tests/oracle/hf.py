"""Random DeepSeek models of transformers, and their tensors under the names of a saved folder."""

import json
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
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)
from transformers.modeling_layers import MtpModel

from dsmini import ModelConfig, Transformer
from dsmini.config.published import config_from_json
from tests.helpers.hf_names import from_hf

MODELS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("models.toml").read_text())
SMALL = MODELS["small"]
WITHOUT_MTP = {name: value for name, value in SMALL.items() if name != "num_mtp_layers"}
INDEX = {"index_n_heads": 13, "index_head_dim": 16, "index_topk": 12}
"""Sizes of an indexer. It has this number of heads because a key that none of them likes ties with others at zero."""


def yarn(**changes: Any) -> dict[str, Any]:
    """Return rope_parameters of an extended context with two different temperatures."""
    values = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1}
    return values | {"mscale": 0.707, "mscale_all_dim": 1.2, "original_max_position_embeddings": 16} | changes


def made(model_class: Any, config_class: Any, seed: int, sizes: dict[str, Any]) -> Any:
    """Return a random model with nonzero, mostly negative routing biases."""
    torch.manual_seed(seed)
    model = model_class(config_class(**sizes, attn_implementation="eager")).eval()
    _randomise(model)
    return model


def v3(seed: int, **changes: Any) -> DeepseekV3ForCausalLM:
    return made(DeepseekV3ForCausalLM, DeepseekV3Config, seed, SMALL | changes)


def v2(seed: int, **changes: Any) -> DeepseekV2ForCausalLM:
    return made(DeepseekV2ForCausalLM, DeepseekV2Config, seed, WITHOUT_MTP | changes)


def v32(seed: int, **changes: Any) -> DeepseekV32ForCausalLM:
    """Return a random V3.2 model. q_lora_rank None, which transformers lacks, is made of its parts."""
    whole = changes.get("q_lora_rank", 1) is None
    sizes = WITHOUT_MTP | INDEX | changes | ({"q_lora_rank": SMALL["hidden_size"]} if whole else {})
    model = made(DeepseekV32ForCausalLM, DeepseekV32Config, seed, sizes)
    for layer in model.model.layers if whole else ():
        layer.self_attn.q_a_proj = layer.self_attn.q_a_layernorm = torch.nn.Identity()
    return model


def mtp(model: DeepseekV3ForCausalLM, depth: int) -> MtpModel:
    """Return random multi-token prediction blocks of transformers for the model."""
    blocks = MtpModel(model, depth).eval()
    _randomise(blocks.layers)
    return blocks


def _randomise(model: torch.nn.Module) -> None:
    """Draw weights so large that every part of the model matters, and norms around 1."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.4, 0.1)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)


def has_whole_query(model: torch.nn.Module) -> bool:
    """Return True for a model that v32 made with q_lora_rank None."""
    return any(name.endswith("q_a_proj") and isinstance(m, torch.nn.Identity) for name, m in model.named_modules())


def ours(theirs: Any) -> Transformer:
    """Return a dsmini model from the config.json and the tensors that transformers would save, without MTP."""
    raw = json.loads(theirs.config.to_json_string(use_diff=True)) | {"num_nextn_predict_layers": 0}
    raw |= {"q_lora_rank": None} if has_whole_query(theirs) else {}
    built = Transformer(ModelConfig(**config_from_json(raw, "config.json")))
    built.load_state_dict(from_hf(tensors(theirs), built))
    return built


def tensors(model: Any, n_layers: int | None = None, kind: str = "data") -> dict[str, Tensor]:
    """Return a model's tensors, or gradients for kind "grad", under the names of a saved folder, experts one by one."""
    out: dict[str, Tensor] = {}
    n_layers = model.config.num_hidden_layers if n_layers is None else n_layers
    query = "q_proj" if has_whole_query(model) else "q_b_proj"
    named = list(model.named_parameters())
    if kind == "data":
        named += [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, tensor in named:
        value = getattr(tensor, kind)
        if value is None:
            value = torch.zeros_like(tensor)
        name = _folder_name(name, n_layers).replace("q_b_proj", query)
        if name.endswith("experts.gate_up_proj"):
            for i, both in enumerate(value):
                gate, up = both.chunk(2)
                out[name.replace("gate_up_proj", f"{i}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{i}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for i, down in enumerate(value):
                out[name.replace("down_proj", f"{i}.down_proj.weight")] = down
        else:
            out[name] = value
    return out


def mtp_tensors(blocks: MtpModel, n_layers: int) -> dict[str, Tensor]:
    """Return the tensors of multi-token prediction blocks, without those shared with the main model."""
    return {k: v for k, v in tensors(blocks, n_layers).items() if k.startswith("model.layers.")}


def _folder_name(name: str, n_layers: int) -> str:
    """Map a name of MtpModel to that of a folder, where MTP blocks follow the last layer."""
    if not name.startswith("layers."):
        return name
    _, depth, rest = name.split(".", 2)
    rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
    return f"model.layers.{n_layers + int(depth)}.{rest}"


def v4_config(sizes: dict[str, Any], yarn: bool, **changes: Any) -> Any:
    """Return the config of transformers' DeepSeek-V4 for dsmini's sizes. Grouped products want even sizes."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if yarn:
        rope = {"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0}
        rope |= {"original_max_position_embeddings": 64}
    renamed = {"dim": "hidden_size", "n_heads": "num_attention_heads", "window_size": "sliding_window"}
    renamed |= {"n_layers": "num_hidden_layers", "moe_inter_dim": "moe_intermediate_size", "norm_eps": "rms_norm_eps"}
    renamed |= {"n_routed_experts": "num_local_experts", "n_activated_experts": "num_experts_per_tok"}
    renamed |= {"route_scale": "routed_scaling_factor", "max_seq_len": "max_position_embeddings"}
    same = ("head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk")
    same += ("qk_rope_head_dim", "compress_rope_theta", "rope_theta", "vocab_size", "swiglu_limit", "hc_mult")
    same += ("hc_sinkhorn_iters", "hc_eps")
    named = renamed | {name: name for name in same}
    given = {named[name]: value for name, value in sizes.items() if name in named}
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return DeepseekV4Config(**given, rope_parameters=rope, **plain, **changes)


def randomise_v4(model: Any) -> None:
    """Draw parameters, none of which is zero, and tables of experts."""
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
