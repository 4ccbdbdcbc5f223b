"""Hugging Face's config.json, read and written. No other file spells its keys."""

import math
from collections.abc import Mapping
from typing import Any

from dsmini.config.fields import refuse_unread, token_ids
from dsmini.config.inference_json import inference_from_json
from dsmini.reading import brief

# keys of config.json with the same name here
_SAME = ("vocab_size", "n_routed_experts", "n_shared_experts", "topk_method", "norm_topk_prob", "rope_theta")
_SAME += ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# theirs -> ours, for config.json
_CONFIG = {name: name for name in _SAME} | {
    "hidden_size": "dim",
    "intermediate_size": "inter_dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "first_k_dense_replace": "n_dense_layers",
    "num_attention_heads": "n_heads",
    "num_experts_per_tok": "n_activated_experts",
    "n_group": "n_expert_groups",
    "topk_group": "n_limited_groups",
    "scoring_func": "score_func",
    "routed_scaling_factor": "route_scale",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "num_nextn_predict_layers": "n_mtp_layers",
    "num_mtp_layers": "n_mtp_layers",
}
# theirs -> ours, for the config.json of deepseek_v32
_INDEXER = {"index_n_heads": "index_n_heads", "index_head_dim": "index_head_dim", "index_topk": "index_topk"}
# keys of deepseek_v32 that repeat others, as transformers writes them; and GLM's switch
_SPARSE = {*_INDEXER, "indexer_rope_interleave", "layer_types", "mlp_layer_types"}
_YARN = {
    "factor": "rope_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "original_max_position_embeddings": "original_seq_len",
}
# keys with the only value that dsmini can honour; any other value is refused
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
# keys of quantization_config with the values that dsmini can read
_FP8: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3",),
    "weight_block_size": ([128, 128], (128, 128)),
    "scale_fmt": ("ue8m0", "float"),
    "expert_dtype": ("fp8",),
}
# keys that do not change the model's output
_SILENT = {
    *("architectures", "model_type", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("torch_dtype", "dtype", "transformers_version", "num_key_value_heads", "qk_head_dim", "head_dim"),
    *("aux_loss_alpha", "seq_aux", "output_router_logits", "quantization_config", "rope_scaling", "rope_parameters"),
    *("_name_or_path", "num_local_experts"),
}
LONGEST_LIST = 10_000
"""Number of layers up to which lists of layers are compared; no model has more."""
UNKNOWN_IDS = {"bos_token_id": None, "eos_token_id": None}
"""Special ids of a config.json whose tokenizer is not known."""


def is_hugging_face(raw: Mapping[str, Any]) -> bool:
    """Return whether a JSON file is a Hugging Face config.json, not one of DeepSeek's inference code."""
    return "model_type" in raw


def is_quantized(raw: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that weights are stored in FP8."""
    return bool(raw.get("quantization_config"))


def config_from_json(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ModelConfig fields from Hugging Face's config.json (it has a model_type) or DeepSeek's inference JSON.

    Raises: ValueError for a key that is unknown or that dsmini cannot honour.
    """
    return _from_hf_config(raw, source) if is_hugging_face(raw) else inference_from_json(raw, source)


def _from_hf_config(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    kind = raw["model_type"]
    if kind not in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"):
        later = isinstance(kind, str) and kind.startswith("deepseek_v4")
        also = "; a plan of DeepSeek-V3's config shows the attention of V4 too" if later else ""
        raise ValueError(
            f"{source} has model_type={brief(kind)}; dsmini reads deepseek_v2, deepseek_v3, deepseek_v32 and "
            f"kimi_k2{also}"
        )
    refuse_unread(
        set(raw) - set(_CONFIG) - set(_FIXED) - _SILENT - (_SPARSE if kind == "deepseek_v32" else set()), source
    )
    for key, allowed in _FIXED.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            raise ValueError(f"{source} has {key}={brief(raw[key])}, which dsmini cannot honour; want {allowed[0]!r}")
    _check_quantization(raw, source)
    if raw.get("eos_token_id") is not None:
        token_ids(raw["eos_token_id"], raw.get("vocab_size"), f"eos_token_id in {source}")
    v2 = kind == "deepseek_v2"
    out: dict[str, Any] = {"score_func": "softmax" if v2 else "sigmoid", "n_mtp_layers": 0, "q_lora_rank": None}
    out |= {"topk_method": "greedy" if v2 else "noaux_tc", "norm_eps": 1e-6, "init_std": 0.02}
    out |= {ours: raw[theirs] for theirs, ours in _CONFIG.items() if theirs in raw}
    if out.get("n_shared_experts") is None:
        out["n_shared_experts"] = 0
    if v2 and out["topk_method"] == "greedy":
        out |= {"n_expert_groups": 1, "n_limited_groups": 1}
    out |= _yarn(raw, source)
    sizes = _CONFIG
    if kind == "deepseek_v32":
        sizes = _CONFIG | _INDEXER
        out |= _sparse(raw, out, source)
    # a missing size is not taken from another model
    missing = sorted(theirs for theirs, ours in sizes.items() if ours not in out)
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; want every size of the model")
    heads = out["n_heads"]
    if raw.get("num_key_value_heads", heads) not in (heads, None):
        raise ValueError(
            f"{source} has num_key_value_heads={brief(raw['num_key_value_heads'])}, but MLA has one for each head; "
            f"want {heads}"
        )
    return out


def _sparse(raw: Mapping[str, Any], out: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of the indexer. Lists of layers, which transformers writes, must say what other keys say."""
    n, dense = out.get("n_layers"), out.get("n_dense_layers")
    if isinstance(n, int) and isinstance(dense, int) and n <= LONGEST_LIST:
        lists = {"layer_types": ["indexed_attention"] * n}
        lists["mlp_layer_types"] = ["dense"] * min(dense, n) + ["sparse"] * (n - dense)
        for key, want in lists.items():
            if raw.get(key) is not None and raw[key] != want:
                raise ValueError(
                    f"{source} has {key}={brief(raw[key])}, which dsmini cannot honour; want indexed_attention in "
                    "every layer, and first_k_dense_replace dense layers before sparse ones"
                )
    interleave = raw.get("indexer_rope_interleave")
    switch = {} if interleave is None else {"indexer_rope_interleave": interleave}
    return {"attention": "dsa", **switch, **{ours: raw[theirs] for theirs, ours in _INDEXER.items() if theirs in raw}}


def _check_quantization(raw: Mapping[str, Any], source: str) -> None:
    quantized = raw.get("quantization_config") or {"quant_method": "fp8"}
    if not isinstance(quantized, dict) or quantized.get("quant_method") != "fp8":
        raise ValueError(
            f"{source} has quantization_config={brief(quantized)}, which dsmini cannot read; want fp8 or none"
        )
    for key, allowed in _FP8.items():
        if quantized.get(key) is not None and quantized[key] not in allowed:
            raise ValueError(
                f"{source} has quantization_config.{key}={brief(quantized[key])}, which dsmini cannot read; "
                f"want {allowed[0]!r}"
            )


def _yarn(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    spellings = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if not all(isinstance(rope, dict) for rope in spellings):
        raise ValueError(f"{source} has rope_scaling={brief(spellings[0])}; want a table of keys, or none")
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        raise ValueError(f"{source} has both rope_scaling and rope_parameters, and they differ; keep one")
    rope = dict(spellings[0]) if spellings else {}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kinds = [kind for key in ("type", "rope_type") if (kind := rope.pop(key, None)) is not None] or ["default"]
    if all(kind == "default" for kind in kinds):
        refuse_unread(set(rope), source)
        return {"rope_theta": theta, "original_seq_len": None}
    if not all(kind == "yarn" for kind in kinds):
        raise ValueError(f"{source} has rope type {brief(kinds[:1])}, which dsmini cannot honour; want 'yarn' or none")
    refuse_unread(set(rope) - set(_YARN), source)
    for key in ("factor", "original_max_position_embeddings"):
        if key not in rope:
            raise ValueError(f"{source} asks for YaRN and lacks {key}; want it next to the type")
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
    """Return the config.json of a ModelConfig's fields, spelled as in released ones, without dtype and token ids.

    Raises: ValueError for a model that none of deepseek_v2, deepseek_v3 and deepseek_v32 describes, naming the field.
    """
    v2, sparse = fields["score_func"] == "softmax", fields["attention"] == "dsa"
    v3 = "deepseek_v32" if sparse else "deepseek_v3"
    kind = "deepseek_v2" if v2 else v3
    methods = ("greedy", "group_limited_greedy") if v2 else ("noaux_tc",)
    wanted: dict[str, tuple[Any, ...]] = {"attention": ("mla",) if v2 else ("mla", "dsa"), "topk_method": methods}
    wanted |= {"embed_norm": (False,), "qk_norm": (False,), "score_func": ("sigmoid", "softmax")}
    wanted |= {"norm_topk_prob": (False,)} if v2 else {}
    wanted |= {"mtp_input": ("post_norm",)} if fields["n_mtp_layers"] else {}
    for key, allowed in wanted.items():
        if fields[key] not in allowed:
            raise ValueError(
                f"a model with {key}={fields[key]!r} has no {kind} folder; want {' or '.join(map(repr, allowed))}"
            )
    silent = ("num_mtp_layers",)
    out: dict[str, Any] = {
        "architectures": [f"DeepseekV{kind.removeprefix('deepseek_v')}ForCausalLM"],
        "model_type": kind,
        **{theirs: fields[ours] for theirs, ours in _CONFIG.items() if theirs not in silent},
        **{key: allowed[0] for key, allowed in _FIXED.items() if key not in ("mlp_bias", "rope_interleave")},
        "attention_dropout": 0.0,  # transformers takes no 0
        "num_key_value_heads": fields["n_heads"],
        "rope_scaling": _yarn_to_json(fields),
        "use_cache": True,
        **{theirs: fields[ours] for theirs, ours in _INDEXER.items() if sparse},
        **{key: True for key in ("indexer_rope_interleave",) if fields[key]},
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


def _fp8_to_json() -> dict[str, Any]:
    """Return the quantization_config of FP8 weights with FP32 scales, as DeepSeek-V3's."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def with_mtp_layers(raw: Mapping[str, Any], n_mtp_layers: int) -> dict[str, Any]:
    """Return a config.json with another number of MTP blocks, where it states one."""
    stated = {key: n_mtp_layers for key in ("num_nextn_predict_layers", "num_mtp_layers") if key in raw}
    return {**raw, **stated}


def with_dtypes(
    raw: Mapping[str, Any], dtype: str, replace: bool, fp8: bool, keep_quantization: bool
) -> dict[str, Any]:
    """Return a config.json with the dtypes of its tensors.

    Args:
        dtype: name of the dtype of what is not FP8, such as "bfloat16".
        replace: True to replace a dtype that is stated already.
        fp8: True if some tensors are E4M3 codes.
        keep_quantization: keep quantization_config; it may be wrong for codes that are made again.
    """
    out = dict(raw)
    key = "dtype" if "dtype" in out else "torch_dtype"
    if replace or key not in out:
        out[key] = dtype
    quantization = out.pop("quantization_config", None)
    if fp8:
        out["quantization_config"] = (keep_quantization and quantization) or _fp8_to_json()
    return out
