"""Hugging Face's spelling and ours, for config keys and for tensors. No other file knows theirs.

Our tensor names are those of DeepSeek's inference code with two differences: the experts of a layer
are stacked into one tensor, and the multi-token prediction blocks are mtp.0, mtp.1, ... (in a folder they follow the
last layer as layers N, N+1, ...).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# ours -> theirs, for a tensor inside a block
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "attn.wo": "self_attn.o_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "ffn.gate": "mlp.gate",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_MTP = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
_STACKED = re.compile(r"(.+)ffn\.experts\.(w[123])(_scale)?")
# DeepSeek's inference code cuts these over its ranks: rows of the ones, columns of the others
_SPLIT = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
_GATE_BIAS = ("ffn.gate.bias", "mlp.gate.e_score_correction_bias")


def to_hf(tensors: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Rename a dsmini state dict to a DeepSeek/HF folder's tensors; stacked experts come apart.

    Embedding and head are repeated inside each MTP block, as DeepSeek's folders have them.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_stacked(name):
            out |= {hf_name(name, n_layers, i): expert for i, expert in enumerate(tensor.unbind(0))}
        else:
            out[hf_name(name, n_layers)] = tensor
    depths = {int(name.split(".")[1]) for name in tensors if name.startswith("mtp.")}
    for copy, original in mtp_copies(n_layers, depths).items():
        out[copy] = tensors[original]
    return out


def mtp_copies(n_layers: int, depths: Iterable[int]) -> dict[str, str]:
    """The tensors in which the MTP blocks of these depths repeat embedding and head, and our names of those two."""
    return {
        f"model.layers.{n_layers + depth}.{theirs}.weight": f"{ours}.weight"
        for depth in depths
        for theirs, ours in (("embed_tokens", "embed"), ("shared_head.head", "head"))
    }


def is_derived(theirs: str) -> bool:
    """Whether a tensor of a folder only repeats what its config.json says, as old folders' rotary frequencies do."""
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", theirs) is not None


def is_stacked(name: str) -> bool:
    """Whether one of our tensors holds all experts of a layer, which folders have one by one."""
    return _STACKED.fullmatch(name) is not None


def hf_name(name: str, n_layers: int, expert: int | None = None) -> str:
    """A folder's name of our tensor, of stacked ones of one expert's part.

    Raises: ValueError for a tensor of which DeepSeek's architecture has none.
    """
    if stacked := _STACKED.fullmatch(name):
        assert expert is not None, "a stacked tensor has a name for each expert"
        kind = "weight_scale_inv" if stacked[3] else "weight"
        return f"{_block_prefix(stacked[1], n_layers)}mlp.experts.{expert}.{_EXPERT[stacked[2]]}.{kind}"
    return _to_hf_name(name, n_layers)


def inference_name(name: str, expert: int | None = None) -> str:
    """The name that DeepSeek's inference code has for our tensor, of stacked ones of one expert's part."""
    if stacked := _STACKED.fullmatch(name):
        return f"{stacked[1]}ffn.experts.{expert}.{stacked[2]}.{'scale' if stacked[3] else 'weight'}"
    return name


def inference_split(theirs: str) -> int | None:
    """The dimension in which DeepSeek's inference layout cuts a tensor over its ranks.

    None: each rank has the whole of it, or, of routed experts, one rank has.
    """
    if ".experts." in theirs:
        return None
    return _SPLIT.get(theirs.split(".")[-2])


def inference_expert(theirs: str) -> int | None:
    """The number of the routed expert whose tensor this is in DeepSeek's inference layout, if it is one's."""
    part = re.search(r"\.ffn\.experts\.(\d+)\.", theirs)
    return None if part is None else int(part[1])


def from_hf(tensors: Mapping[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Rename a DeepSeek/HF folder's tensors to a dsmini state dict; experts are stacked in order.

    Raises: ValueError for names that belong to no dsmini module, all of them listed, and for missing experts.
    """
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        if re.fullmatch(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight", name):
            continue  # an MTP block's copies of the embedding and the head, which are shared
        if part := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight", name):
            ours = {theirs: w for w, theirs in _EXPERT.items()}.get(part[3])
            if ours is not None:
                stacked = f"{_our_prefix(int(part[1]), n_layers)}ffn.experts.{ours}"
                experts.setdefault(stacked, {})[int(part[2])] = tensor
                continue
        ours = _from_hf_name(name, n_layers)
        if ours is None:
            unknown.append(name)
        else:
            out[ours] = tensor
    if unknown:
        raise ValueError(f"tensors that belong to no module of dsmini: {', '.join(sorted(unknown))}")
    for name, parts in experts.items():
        missing = sorted(set(range(max(parts) + 1)) - set(parts))
        if missing:
            raise ValueError(f"{name} lacks experts {missing} of {max(parts) + 1}; the folder is incomplete")
        out[name] = torch.stack([parts[i] for i in range(len(parts))])
    return out


def _block_prefix(ours: str, n_layers: int) -> str:
    part = re.fullmatch(r"(layers|mtp)\.(\d+)\.(block\.)?", ours)
    if part is None:
        raise ValueError(f"{ours!r} is not the prefix of a block; want layers.N. or mtp.K.block.")
    return f"model.layers.{int(part[2]) + (n_layers if part[1] == 'mtp' else 0)}."


def _our_prefix(layer: int, n_layers: int) -> str:
    return f"layers.{layer}." if layer < n_layers else f"mtp.{layer - n_layers}.block."


def _to_hf_name(name: str, n_layers: int) -> str:
    stem, _, kind = name.rpartition(".")
    kind = "weight_scale_inv" if kind == "scale" else kind
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if (part := re.fullmatch(r"mtp\.(\d+)\.(\w+)", stem)) and part[2] in _MTP:
        return f"model.layers.{n_layers + int(part[1])}.{_MTP[part[2]]}.{kind}"
    if part := re.fullmatch(r"(layers\.\d+\.|mtp\.\d+\.block\.)(.+)", stem):
        prefix = _block_prefix(part[1], n_layers)
        if f"{part[2]}.{kind}" == _GATE_BIAS[0]:
            return prefix + _GATE_BIAS[1]
        if part[2] in _BLOCK:
            return f"{prefix}{_BLOCK[part[2]]}.{kind}"
    raise ValueError(f"tensor {name!r} has no Hugging Face name; only models with attention='mla' have a folder format")


def _from_hf_name(name: str, n_layers: int) -> str | None:
    stem, _, kind = name.rpartition(".")
    for ours, theirs in _TOP.items():
        if stem == theirs:
            return f"{ours}.{kind}"
    part = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if part is None:
        return None
    layer, inner = int(part[1]), part[2]
    prefix = _our_prefix(layer, n_layers)
    if inner == _GATE_BIAS[1]:
        return prefix + _GATE_BIAS[0]
    stem, _, kind = inner.rpartition(".")
    if kind != "weight":
        return None
    for ours, theirs in _BLOCK.items():
        if stem == theirs:
            return f"{prefix}{ours}.weight"
    if layer >= n_layers:
        for ours, theirs in _MTP.items():
            if stem == theirs:
                return f"mtp.{layer - n_layers}.{ours}.weight"
    return None


# theirs -> ours, for config.json
_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "inter_dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "first_k_dense_replace": "n_dense_layers",
    "num_attention_heads": "n_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "n_activated_experts",
    "n_group": "n_expert_groups",
    "topk_group": "n_limited_groups",
    "scoring_func": "score_func",
    "topk_method": "topk_method",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "route_scale",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "num_nextn_predict_layers": "n_mtp_layers",
    "num_mtp_layers": "n_mtp_layers",
    "rope_theta": "rope_theta",
}
_YARN = {
    "factor": "rope_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "original_max_position_embeddings": "original_seq_len",
}
# keys whose only value dsmini can honour is the one given; any other value is refused
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "pretraining_tp": (1,),
    "ep_size": (1,),
}
# what dsmini can read of quantization_config
_FP8: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3",),
    "weight_block_size": ([128, 128], (128, 128)),
    "scale_fmt": ("ue8m0", "float"),
    "expert_dtype": ("fp8",),
}
# keys that say nothing about what the model computes
_SILENT = {
    *("architectures", "model_type", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("torch_dtype", "dtype", "transformers_version", "num_key_value_heads", "qk_head_dim", "head_dim"),
    *("aux_loss_alpha", "seq_aux", "output_router_logits", "quantization_config", "rope_scaling", "rope_parameters"),
    *("_name_or_path", "num_local_experts"),
}
# DeepSeek's ModelArgs: what its inference JSON files leave out
_MODEL_ARGS = {
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_seq_len": 16384,
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
}


def config_from_json(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """ModelConfig fields from Hugging Face's config.json (it has a model_type) or DeepSeek's inference JSON.

    Raises: ValueError for a key that is unknown or that dsmini cannot honour.
    """
    return _from_hf_config(raw, source) if "model_type" in raw else _from_inference_json(raw, source)


def _from_inference_json(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    accepted = {"dtype", "scale_fmt", "max_batch_size"}
    _refuse(set(raw) - set(_MODEL_ARGS) - accepted, source)
    out = {**_MODEL_ARGS, **{key: value for key, value in raw.items() if key not in accepted}}
    sigmoid = out["score_func"] == "sigmoid"
    out["q_lora_rank"] = out["q_lora_rank"] or None
    out["mscale_all_dim"] = out["mscale"]
    out["norm_topk_prob"] = sigmoid
    grouped = "group_limited_greedy" if out["n_expert_groups"] > 1 else "greedy"
    out["topk_method"] = "noaux_tc" if sigmoid else grouped
    return {**out, "n_mtp_layers": 0, "norm_eps": 1e-6}


def _from_hf_config(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    kind = raw["model_type"]
    if kind not in ("deepseek_v2", "deepseek_v3", "kimi_k2"):
        raise ValueError(f"{source} has model_type={kind!r}; dsmini reads deepseek_v2, deepseek_v3 and kimi_k2")
    _refuse(set(raw) - set(_CONFIG) - set(_FIXED) - _SILENT, source)
    for key, allowed in _FIXED.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise ValueError(f"{source} has {key}={raw[key]!r}, which dsmini cannot honour; want {allowed[0]!r}")
    _check_quantization(raw, source)
    v2 = kind == "deepseek_v2"
    out: dict[str, Any] = {"score_func": "softmax" if v2 else "sigmoid", "n_mtp_layers": 0, "q_lora_rank": None}
    out |= {"topk_method": "greedy" if v2 else "noaux_tc", "norm_eps": 1e-6, "init_std": 0.02}
    out |= {ours: raw[theirs] for theirs, ours in _CONFIG.items() if theirs in raw}
    out["n_shared_experts"] = out.get("n_shared_experts") or 0
    if v2 and out["topk_method"] == "greedy":
        out |= {"n_expert_groups": 1, "n_limited_groups": 1}
    out |= _yarn(raw, source)
    # What a file leaves out is no reason to take another model's value.
    missing = sorted(theirs for theirs, ours in _CONFIG.items() if ours not in out)
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; want every size of the model")
    heads = out["n_heads"]
    if raw.get("num_key_value_heads", heads) not in (heads, None):
        raise ValueError(
            f"{source} has num_key_value_heads={raw['num_key_value_heads']}, but MLA has as many as heads; want {heads}"
        )
    return out


def _check_quantization(raw: Mapping[str, Any], source: str) -> None:
    quantized = raw.get("quantization_config") or {"quant_method": "fp8"}
    if not isinstance(quantized, dict) or quantized.get("quant_method") != "fp8":
        raise ValueError(f"{source} has quantization_config={quantized!r}, which dsmini cannot read; want fp8 or none")
    for key, allowed in _FP8.items():
        if quantized.get(key) is not None and quantized[key] not in allowed:
            raise ValueError(
                f"{source} has quantization_config.{key}={quantized[key]!r}, which dsmini cannot read; "
                f"want {allowed[0]!r}"
            )


def _yarn(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    spellings = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if not all(isinstance(rope, dict) for rope in spellings):
        raise ValueError(f"{source} has rope_scaling={spellings[0]!r}; want a table of keys, or none")
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        raise ValueError(f"{source} has both rope_scaling and rope_parameters, and they differ; keep one")
    rope = dict(spellings[0]) if spellings else {}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = {rope.pop("type", None), rope.pop("rope_type", None)} - {None} or {"default"}
    if kind == {"default"}:
        _refuse(set(rope), source)
        return {"rope_theta": theta, "original_seq_len": None}
    if kind != {"yarn"}:
        raise ValueError(f"{source} has rope type {sorted(kind)}, which dsmini cannot honour; want 'yarn' or none")
    _refuse(set(rope) - set(_YARN), source)
    for key in ("factor", "original_max_position_embeddings"):
        if key not in rope:
            raise ValueError(f"{source} asks for YaRN and lacks {key}; want it beside the type")
    longest, original = raw.get("max_position_embeddings", math.inf), rope["original_max_position_embeddings"]
    if isinstance(longest, int) and isinstance(original, int) and longest <= original:
        raise ValueError(
            f"{source} asks for YaRN with max_position_embeddings={longest}, which is no more than "
            f"original_max_position_embeddings={original}; dsmini has YaRN only where a context is extended"
        )
    if rope.get("mscale_all_dim") and not rope.get("mscale"):
        raise ValueError(
            f"{source} has mscale_all_dim={rope['mscale_all_dim']} and no mscale; dsmini wants both or none"
        )
    if not rope.get("mscale_all_dim"):
        rope |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0}
    return {"rope_theta": theta} | defaults | {_YARN[key]: value for key, value in rope.items()}


def config_to_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's config.json of a ModelConfig's fields, in the spelling of the released ones; no dtype, no ids.

    Raises: ValueError for a model that neither deepseek_v3 nor deepseek_v2 describes, naming the field.
    """
    v2 = fields["score_func"] == "softmax"
    kind = "deepseek_v2" if v2 else "deepseek_v3"
    methods = ("greedy", "group_limited_greedy") if v2 else ("noaux_tc",)
    wanted: dict[str, tuple[Any, ...]] = {"attention": ("mla",), "topk_method": methods}
    wanted |= {"embed_norm": (False,), "qk_norm": (False,)}
    wanted |= {"norm_topk_prob": (False,)} if v2 else {}
    wanted |= {"mtp_input": ("post_norm",)} if fields["n_mtp_layers"] else {}
    for key, allowed in wanted.items():
        if fields[key] not in allowed:
            raise ValueError(
                f"a model with {key}={fields[key]!r} has no {kind} folder; want {' or '.join(map(repr, allowed))}"
            )
    silent = ("num_mtp_layers",)
    out: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM" if v2 else "DeepseekV3ForCausalLM"],
        "model_type": kind,
        **{theirs: fields[ours] for theirs, ours in _CONFIG.items() if theirs not in silent},
        **{key: allowed[0] for key, allowed in _FIXED.items() if key not in ("mlp_bias", "rope_interleave")},
        "attention_dropout": 0.0,  # transformers takes no 0
        "num_key_value_heads": fields["n_heads"],
        "rope_scaling": _yarn_to_json(fields),
        "use_cache": True,
    }
    return dict(sorted(out.items()))


def _yarn_to_json(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    original = fields["original_seq_len"]
    if original is None or fields["max_seq_len"] <= original:
        return None
    out: dict[str, Any] = {"type": "yarn", **{theirs: fields[ours] for theirs, ours in _YARN.items()}}
    temperatures = (fields["mscale"], fields["mscale_all_dim"])
    if temperatures == (1.0, 0.0):  # how a file without the two is read
        return {key: value for key, value in out.items() if not key.startswith("mscale")}
    if 0.0 in temperatures:
        raise ValueError(
            f"mscale={temperatures[0]} with mscale_all_dim={temperatures[1]} has no spelling in config.json; "
            "want both above 0, or 1.0 and 0.0"
        )
    return out


def quantization_to_json() -> dict[str, Any]:
    """What config.json says of weights in FP8 with FP32 scales, as DeepSeek-V3's does."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def _refuse(keys: Iterable[str], source: str) -> None:
    if unknown := sorted(keys):
        raise ValueError(f"{source} has keys that dsmini does not know and so cannot honour: {', '.join(unknown)}")
