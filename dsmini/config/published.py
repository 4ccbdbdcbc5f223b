"""Configs as others publish them: Hugging Face's config.json, and the JSON of DeepSeek's inference code.

Hugging Face's keys, with our names and the values that dsmini honours, are in published.toml; no other file than these
two spells them. The keys of the second are the fields of DeepSeek's ModelArgs, whose defaults are in model_args.toml.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmini.config.fields import refuse_unread, token_ids
from dsmini.reading import brief, listed, read_toml

Allowed = Mapping[str, Sequence[Any]]
"""The values that each key may have, the usual one first."""

_NAMES, _VALUES, _KEYS = read_toml(Path(__file__).with_name("published.toml")).values()
# theirs -> ours: for models of MLA, for deepseek_v4, and inside of rope_scaling
_CONFIG: Mapping[str, str] = _NAMES["every"] | _NAMES["mla"]
_V4: Mapping[str, str] = _NAMES["every"] | _NAMES["v4"]
_YARN: Mapping[str, str] = _NAMES["yarn"]
_FIXED: Allowed = _VALUES["written"]
_READ: Allowed = _VALUES["read"]
_V4_READ: Allowed = _VALUES["read"] | _VALUES["read_v4"]
_INDEXER, _INDEXER_SWITCHES, _LAYER_TYPES = (_KEYS[name] for name in ("indexer", "indexer_switches", "layer_types"))
LARGEST_DEPTH = 10_000
"""Number of layers up to which a list of them is made."""
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
    if not is_hugging_face(raw):
        return inference_from_json(raw, source)
    kind = raw["model_type"]
    if kind not in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa", "deepseek_v4"):
        raise ValueError(
            f"{source} has model_type={brief(kind)}; dsmini reads deepseek_v2, deepseek_v3, deepseek_v32, kimi_k2, "
            "glm_moe_dsa and deepseek_v4"
        )
    quantized = raw.get("quantization_config")
    if quantized and not isinstance(quantized, dict):
        raise ValueError(f"{source} has quantization_config={brief(quantized)}; want a table of keys, or none")
    stated = {"quant_method": "unnamed", **quantized} if quantized else {}
    _refuse_other(stated, _VALUES["fp8"], source, "quantization_config.")
    if raw.get("eos_token_id") is not None:
        token_ids(raw["eos_token_id"], raw.get("vocab_size"), f"eos_token_id in {source}")
    if kind == "deepseek_v4":
        return _v4_from_json(raw, source)
    v2, glm = kind == "deepseek_v2", kind == "glm_moe_dsa"
    sparse = glm or kind == "deepseek_v32"
    of_sparse = (*_INDEXER, *_INDEXER_SWITCHES, *_KEYS["lists"]) if sparse else ()
    of_glm = _KEYS["glm"] if glm else ()
    refuse_unread(set(raw).difference(_CONFIG, _FIXED, _READ, _KEYS["silent"], of_sparse, of_glm), source)
    # DeepSeek's V2 leaves the factor out then, transformers does not normalise, vLLM does both
    _refuse_other(raw, {**_FIXED, **_READ} | ({"norm_topk_prob": (False,)} if v2 else {}), source)
    out: dict[str, Any] = {"score_func": "softmax" if v2 else "sigmoid", "n_mtp_layers": 0, "q_lora_rank": None}
    out |= {"topk_method": "greedy" if v2 else "noaux_tc", "norm_eps": 1e-6, "init_std": 0.02}
    out |= {ours: raw[theirs] for theirs, ours in _CONFIG.items() if theirs in raw}
    out |= _yarn(raw, source)
    out["n_shared_experts"] = out.get("n_shared_experts") or 0
    if v2 and out["topk_method"] == "greedy":
        out |= {"n_expert_groups": 1, "n_limited_groups": 1}
    sizes = dict(_CONFIG)
    if sparse:
        sizes |= dict(zip(_INDEXER, _INDEXER, strict=True))
        out |= {"attention": "dsa"} | {key: raw[key] for key in (*_INDEXER, *_INDEXER_SWITCHES) if key in raw}
    if glm:
        _refuse_other(raw, _VALUES["read_glm"], source)
        out |= {"indexer_rope_interleave": True, "indexer_types": _indexer_types(raw, source)}
    _refuse_missing(sizes, out, source)
    _refuse_unequal_layers(raw, out, source)
    dense, blocks, more = (out[key] for key in ("n_dense_layers", "n_layers", "n_mtp_layers"))
    if all(isinstance(n, int) for n in (dense, blocks, more)):  # small models keep V3's 3, whatever their depth
        out["n_dense_layers"] = min(dense, blocks + more)
    return out


def _indexer_types(raw: Mapping[str, Any], source: str) -> Any:
    """Return the kind of each layer of glm_moe_dsa, which three spellings may say; without any, all are full."""
    n, pattern = raw.get("num_hidden_layers"), raw.get("index_topk_pattern")
    said = {"indexer_types": raw.get("indexer_types"), "index_topk_pattern": pattern, "index_topk_freq": None}
    if isinstance(pattern, str):
        said["index_topk_pattern"] = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    freq, offset = raw.get("index_topk_freq"), raw.get("index_skip_topk_offset")
    freq, offset = 1 if freq is None else freq, 2 if offset is None else offset
    if not (isinstance(freq, int) and freq > 0 and isinstance(offset, int)):
        raise ValueError(
            f"{source} has index_topk_freq={brief(freq)} with index_skip_topk_offset={brief(offset)}; want whole "
            "numbers, the first above 0"
        )
    by_number = []
    if isinstance(n, int) and n <= LARGEST_DEPTH:
        by_number = ["shared" if max(layer - offset + 1, 0) % freq else "full" for layer in range(n)]
    if raw.get("index_topk_freq") is not None:
        said["index_topk_freq"] = by_number
    stated = {key: kinds for key, kinds in said.items() if kinds is not None}
    kinds = next(iter(stated.values()), by_number)
    for key, other in stated.items():
        if other != kinds:
            raise ValueError(f"{source} has {key}={brief(raw[key])}, and {brief(kinds)} in other words; keep one")
    return kinds


def _refuse_missing(sizes: Mapping[str, str], out: Mapping[str, Any], source: str) -> None:
    """Refuse a config without some size, which is not taken from another model."""
    if missing := sorted(theirs for theirs, ours in sizes.items() if ours not in out):
        raise ValueError(f"{source} lacks {', '.join(missing)}; want every size of the model")


def _refuse_other(raw: Mapping[str, Any], allowed: Allowed, source: str, prefix: str = "") -> None:
    """Refuse a value that dsmini cannot honour; None counts as left out."""
    for key, values in allowed.items():
        if raw.get(key) is not None and raw[key] not in values:
            raise ValueError(
                f"{source} has {prefix}{key}={brief(raw[key])}, which dsmini cannot honour; want {values[0]!r}"
            )


def _refuse_unequal_layers(raw: Mapping[str, Any], out: Mapping[str, Any], source: str) -> None:
    """Refuse key-value heads, and lists of layers as transformers writes them, that other keys do not say."""
    _refuse_other(raw, {"num_key_value_heads": (out["n_heads"],)}, source)
    for key, first, rest in (
        ("layer_types", 0, "indexed_attention"),
        ("mlp_layer_types", out["n_dense_layers"], "sparse"),
    ):
        layers = raw.get(key)
        if layers is None or not isinstance(first, int):
            continue
        want = [rest if i >= first else "dense" for i in range(len(layers))] if isinstance(layers, list) else None
        if layers != want or len(layers) != out["n_layers"]:
            raise ValueError(
                f"{source} has {key}={brief(layers)}, which dsmini cannot honour; want indexed_attention in "
                "every layer, and first_k_dense_replace dense layers before sparse ones"
            )


def _yarn(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of RoPE, from either spelling."""
    spellings = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if not all(isinstance(rope, dict) for rope in spellings):
        raise ValueError(f"{source} has rope_scaling={brief(spellings[0])}; want a table of keys, or none")
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        raise ValueError(f"{source} has both rope_scaling and rope_parameters, and they differ; keep one")
    rope = dict(spellings[0]) if spellings else {}
    out = {"rope_theta": rope.pop("rope_theta", raw.get("rope_theta", 10000.0)), "original_seq_len": None}
    kinds = [kind for key in ("type", "rope_type") if (kind := rope.pop(key, None))] or ["default"]
    if any(kind != kinds[0] or kind not in ("default", "yarn") for kind in kinds):
        raise ValueError(f"{source} has rope type {brief(kinds[:1])}, which dsmini cannot honour; want 'yarn' or none")
    yarn = kinds[0] == "yarn"
    refuse_unread(set(rope).difference(_YARN if yarn else ()), source)
    if not yarn:
        return out
    for key in ("factor", "original_max_position_embeddings"):
        if key not in rope:
            raise ValueError(f"{source} asks for YaRN and lacks {key}; want it next to the type")
    longest, original = raw.get("max_position_embeddings"), rope["original_max_position_embeddings"]
    if isinstance(longest, int) and isinstance(original, int) and longest <= original:
        raise ValueError(
            f"{source} asks for YaRN with max_position_embeddings={longest}, which is no more than "
            f"original_max_position_embeddings={original}; dsmini has YaRN only where a context is extended"
        )
    if not rope.get("mscale_all_dim"):
        rope |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    elif not rope.get("mscale"):
        raise ValueError(
            f"{source} has mscale_all_dim={rope['mscale_all_dim']} and no mscale; dsmini wants both or none"
        )
    return out | {"beta_fast": 32.0, "beta_slow": 1.0} | {_YARN[key]: value for key, value in rope.items()}


def config_to_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a ModelConfig's fields, spelled as in released ones, without dtype and token ids.

    Raises: ValueError for a model that none of deepseek_v2, deepseek_v3, deepseek_v32, glm_moe_dsa and deepseek_v4
        describes, naming the field.
    """
    v2, sparse, v4 = fields["score_func"] == "softmax", fields["attention"] == "dsa", fields["attention"] == V4
    glm = bool(fields["indexer_types"])
    wanted = {"attention": ("mla", "dsa", V4), "topk_method": ("noaux_tc",), "score_func": ("sigmoid", "softmax")}
    wanted |= {"embed_norm": (False,), "qk_norm": (False,), "hc_mult": (1,), "swiglu_limit": (None,)}
    wanted |= {"n_hash_layers": (0,), "engram_layer_ids": (None,)}
    if v4:
        wanted = _VALUES["fields_v4"] | {"engram_layer_ids": (None,)}
        _refuse_plain(fields)
    elif v2:
        wanted |= {"attention": ("mla",), "topk_method": ("greedy", "group_limited_greedy"), "norm_topk_prob": (False,)}
    if fields["n_mtp_layers"] and fields["hc_mult"] == 1:
        wanted["mtp_input"] = ("post_norm",)
    if glm:
        wanted |= {"indexer_rope_interleave": (True,), "score_func": ("sigmoid",)}
    version = {"dsa": "32", V4: "4"}.get(fields["attention"], "2" if v2 else "3")
    kind, architecture = f"deepseek_v{version}", f"DeepseekV{version}ForCausalLM"
    if glm:
        kind, architecture = "glm_moe_dsa", "GlmMoeDsaForCausalLM"
    for key, allowed in wanted.items():
        if fields[key] not in allowed:
            want = " or ".join(map(repr, allowed))
            raise ValueError(f"a model with {key}={fields[key]!r} has no {kind} folder; want {want}")
    keys = _V4 if v4 else _CONFIG
    out: dict[str, Any] = {theirs: fields[ours] for theirs, ours in keys.items() if theirs != "num_mtp_layers"}
    out |= {key: values[0] for key, values in _FIXED.items()}
    out |= {key: fields[key] for key in _INDEXER if sparse}
    out |= _v4_lists(fields) if v4 else {}
    out |= {key: True for key in (*_INDEXER_SWITCHES, "qat") if fields[key]}
    out |= {"model_type": kind, "architectures": [architecture]}
    out |= {
        "num_key_value_heads": 1 if v4 else fields["n_heads"],
        "rope_scaling": _yarn_to_json(fields),
        "use_cache": True,
    }
    if glm:  # whose theta is inside
        rope = out.pop("rope_scaling") or {"type": "default"}
        out["rope_parameters"] = {"rope_theta": out.pop("rope_theta"), "rope_type": rope.pop("type"), **rope}
        out["indexer_types"] = list(fields["indexer_types"])
    return dict(sorted(out.items()))


def _yarn_to_json(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    original = fields["original_seq_len"]
    if original is None or fields["max_seq_len"] <= original:
        return None
    out: dict[str, Any] = {"type": "yarn", **{theirs: fields[ours] for theirs, ours in _YARN.items()}}
    temperatures = (fields["mscale"], fields["mscale_all_dim"])
    if temperatures == (1.0, 0.0) or fields["attention"] == V4:  # how a file without the two is read; V4 has none
        return {key: value for key, value in out.items() if not key.startswith("mscale")}
    if 0.0 in temperatures:
        raise ValueError(
            f"mscale={temperatures[0]} with mscale_all_dim={temperatures[1]} has no spelling in config.json; "
            "want both above 0, or 1.0 and 0.0"
        )
    return out


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
    stated = out.pop("quantization_config", None)
    if fp8:  # as DeepSeek-V3's, with FP32 scales, or V4's
        new = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
        new |= {"scale_fmt": "ue8m0"} if raw.get("model_type") == "deepseek_v4" else {}
        out["quantization_config"] = (keep_quantization and stated) or new
    return out


def with_experts(raw: Mapping[str, Any], fp4: bool) -> dict[str, Any]:
    """Return a config.json of deepseek_v4 that says whether its experts are FP4 codes."""
    other = {key: value for key, value in raw.items() if (key, value) != ("expert_dtype", "fp4")}
    return {**other, "expert_dtype": "fp4"} if fp4 else other


# --- deepseek_v4


V4 = "compressed"
_FIELDS = {ours: values[0] for ours, values in _VALUES["fields_v4"].items()} | {"n_limited_groups": 1}
"""Fields of every model of deepseek_v4 whose file does not say otherwise."""


def _v4_from_json(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ModelConfig fields from a config.json of deepseek_v4, as released or as transformers writes it."""
    refuse_unread(set(raw).difference(_V4, _FIXED, _V4_READ, _KEYS["silent"], _KEYS["lists_v4"], {"qat"}), source)
    _refuse_other(raw, {**_FIXED, **_V4_READ}, source)
    raw = _in_released_spelling(raw, source)
    out: dict[str, Any] = {**_FIELDS, "n_mtp_layers": 0}
    out |= {"qat": raw.get("qat", False)}  # dsmini's own key: DeepSeek's code always rounds, and no file says so
    out |= {ours: raw[theirs] for theirs, ours in _V4.items() if theirs in raw}
    _refuse_missing(_V4, out, source)
    return out | _yarn(raw, source) | {"mscale": 1.0, "mscale_all_dim": 1.0}


def _in_released_spelling(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a config.json of deepseek_v4 with the released keys in the place of those that transformers writes.

    Ratios of MTP blocks are left out, which must be 0.
    """
    out, n, said = dict(raw), raw.get("num_hidden_layers"), {}
    if "compress_ratios" in raw:
        out["compress_ratios"] = _without_mtp(raw["compress_ratios"], n, source)
    ropes, factors = raw.get("rope_parameters"), [raw.get("partial_rotary_factor")]
    if isinstance(ropes, dict) and {"main", "compress"} & ropes.keys():
        main, compress = ropes.get("main"), ropes.get("compress")
        if not (isinstance(main, dict) and isinstance(compress, dict)):
            raise ValueError(f"{source} has rope_parameters={brief(ropes)}; want a table 'main' and a table 'compress'")
        _refuse_other(main, {"rope_type": ("default",), "type": ("default",)}, source, "rope_parameters.main.")
        _refuse_other(compress, {"attention_factor": (1.0,)}, source, "rope_parameters.compress.")
        if "yarn" in (compress.get("rope_type"), compress.get("type")) and compress.get("attention_factor") is None:
            raise ValueError(
                f"{source} has YaRN in rope_parameters.compress without attention_factor, for which transformers takes "
                "0.1 ln(factor) + 1, and DeepSeek's code 1; say attention_factor=1.0 there"
            )
        said = {"rope_theta": main.get("rope_theta"), "compress_rope_theta": compress.get("rope_theta")}
        factors += [main.get("partial_rotary_factor"), compress.get("partial_rotary_factor")]
        del out["rope_parameters"]
        said["rope_scaling"] = {key: compress[key] for key in compress if key not in _KEYS["not_yarn"]}
    if "layer_types" in raw:
        said["compress_ratios"] = _ratios(raw["layer_types"], raw.get("compress_rates"), source)
    if "mlp_layer_types" in raw:
        kinds = raw["mlp_layer_types"] if isinstance(raw["mlp_layer_types"], list) else []
        hashed = kinds.count("hash_moe")
        if len(kinds) != n or kinds != ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed):
            raise ValueError(
                f"{source} has mlp_layer_types={brief(raw['mlp_layer_types'])}, which dsmini cannot honour; want "
                "hash_moe for the first layers and moe for all others"
            )
        said["num_hash_layers"] = hashed
    width = raw.get("head_dim")
    for factor in factors:
        if isinstance(factor, float) and isinstance(width, int):
            said["qk_rope_head_dim"] = _product(width, factor)
    for key, value in said.items():
        if out.get(key) not in (None, value):
            raise ValueError(f"{source} has {key}={brief(out[key])}, and {brief(value)} in other words; keep one")
    return {key: value for key, value in (out | said).items() if key not in _KEYS["lists_v4"]}


def _product(a: Any, b: Any) -> float:
    """Return a product in whole numbers; what is beyond any is refused later, with its key."""
    try:
        return int(a * b)
    except (OverflowError, ValueError):
        return math.inf


def _without_mtp(ratios: Any, n_layers: Any, source: str) -> Any:
    """Return the compress_ratios of the layers, without those of MTP blocks that may follow, which must be 0."""
    if not (isinstance(ratios, list) and isinstance(n_layers, int) and len(ratios) > n_layers):
        return ratios
    if any(ratios[n_layers:]):
        raise ValueError(
            f"{source} has compress_ratios with {brief(ratios[n_layers:])} after those of the {n_layers} layers, for "
            "multi-token prediction; dsmini's MTP blocks see a window alone, so want 0 or none"
        )
    return ratios[:n_layers]


def _ratios(kinds: Any, rates: Any, source: str) -> list[int]:
    """Return the compress_ratios of layer_types and compress_rates, which are not known to be what they should."""
    window, csa, hca = _LAYER_TYPES
    ratio = {window: 0, csa: 4, hca: 128} | (rates if isinstance(rates, dict) else {})
    known = isinstance(kinds, list) and all(kind in _LAYER_TYPES for kind in kinds)
    if not known or ratio[window] != 0 or ratio[csa] != 4 or ratio[hca] in (0, 4):
        raise ValueError(
            f"{source} has layer_types={brief(kinds)} with compress_rates={brief(rates)}, which dsmini cannot honour; "
            f"want {listed(_LAYER_TYPES)}, with a rate of 4 for the second and another for the third"
        )
    return [ratio[kind] for kind in kinds]


def _v4_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return compress_ratios with those of MTP blocks, and transformers' lists where it does not read those ratios."""
    ratios = list(fields["compress_ratios"])
    out: dict[str, Any] = {"compress_ratios": ratios + [0] * fields["n_mtp_layers"]}
    others = set(ratios) - {0, 4}
    if len(others) == 1 and others != {128}:
        window, csa, hca = _LAYER_TYPES
        out["layer_types"] = [{0: window, 4: csa}.get(ratio, hca) for ratio in ratios]
        out["compress_rates"] = {csa: 4, hca: others.pop()}
    return out


def _refuse_plain(fields: Mapping[str, Any]) -> None:
    """Refuse a model without what every model of deepseek_v4 has."""
    for key, none, want in (("hc_mult", 1, "2 or more"), ("swiglu_limit", None, "a number")):
        if fields[key] == none:
            raise ValueError(f"a model with {key}={none} has no deepseek_v4 folder; want {want}")


# --- DeepSeek's inference code


_ACCEPTED = {"dtype", "scale_fmt", "max_batch_size"}


@functools.cache
def _model_args() -> dict[str, dict[str, Any]]:
    """Return the defaults of ModelArgs by generation."""
    return read_toml(Path(__file__).with_name("model_args.toml"))


def inference_from_json(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ModelConfig fields from a JSON file of DeepSeek's inference code.

    Raises: ValueError for a key that ModelArgs does not have.
    """
    v3, index, v4 = _model_args().values()
    if (v4.keys() - v3.keys() - index.keys()) & raw.keys():
        return _v4_inference_from_json(raw, source)
    sparse = {"attention": "dsa", **index} if index.keys() & raw.keys() else {}
    refuse_unread(set(raw).difference(v3, index, _ACCEPTED), source)
    out = {**v3, **sparse, **{key: value for key, value in raw.items() if key not in _ACCEPTED}}
    sigmoid = out["score_func"] == "sigmoid"
    out["q_lora_rank"] = out["q_lora_rank"] or None
    out["mscale_all_dim"] = out["mscale"]
    out["norm_topk_prob"] = sigmoid
    grouped = "greedy" if out["n_expert_groups"] == 1 else "group_limited_greedy"
    out["topk_method"] = "noaux_tc" if sigmoid else grouped
    return {**out, "n_mtp_layers": 0, "norm_eps": 1e-6}


def _v4_inference_from_json(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ModelConfig fields from a JSON file of V4's inference code, which has YaRN at every length or at none.

    That code rounds entries at every call, so "qat" is on; dsmini's own key turns it off.
    """
    accepted, defaults = _ACCEPTED | {"scale_dtype", "expert_dtype"}, _model_args()["v4"]
    refuse_unread(set(raw).difference(defaults, accepted, {"qat"}), source)
    out = {"qat": True, **defaults, **{key: value for key, value in raw.items() if key not in accepted}}
    out["compress_ratios"] = _without_mtp(out["compress_ratios"], out["n_layers"], source)
    out["qk_rope_head_dim"] = out.pop("rope_head_dim")
    out["original_seq_len"] = out["original_seq_len"] or None
    out["swiglu_limit"] = out["swiglu_limit"] or None
    lengths = (out["max_seq_len"], out["original_seq_len"], out["rope_factor"])
    if all(isinstance(n, int | float) for n in lengths):  # max_seq_len is that of a cache
        out["max_seq_len"] = max(lengths[0], _product(*lengths[1:]))
    return _FIELDS | out | {"norm_topk_prob": out["score_func"] != "softmax"}
