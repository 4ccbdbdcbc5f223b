"""The JSON file of DeepSeek's inference code, read and written. Its keys are the fields of its ModelArgs."""

from collections.abc import Mapping
from typing import Any

from dsmini.config.fields import refuse_unread

# defaults of ModelArgs, for keys that a file leaves out
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
# those of V3.2's ModelArgs, where a file has any of them
_INDEX_ARGS = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
# fields without a key, with the only value that the code computes with
_WITHOUT_KEY = {"norm_eps": 1e-6, "embed_norm": False, "qk_norm": False, "indexer_rope_interleave": False}
BIASED_DIM = 7168
"""Width of a model whose gates have a routing bias in DeepSeek's inference code; in any other it has none."""


def inference_from_json(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ModelConfig fields from a JSON file of DeepSeek's inference code.

    Raises: ValueError for a key that ModelArgs does not have.
    """
    accepted = {"dtype", "scale_fmt", "max_batch_size"}
    sparse = {"attention": "dsa", **_INDEX_ARGS} if _INDEX_ARGS.keys() & raw.keys() else {}
    refuse_unread(set(raw) - set(_MODEL_ARGS) - set(_INDEX_ARGS) - accepted, source)
    out = {**_MODEL_ARGS, **sparse, **{key: value for key, value in raw.items() if key not in accepted}}
    sigmoid = out["score_func"] == "sigmoid"
    out["q_lora_rank"] = out["q_lora_rank"] or None
    out["mscale_all_dim"] = out["mscale"]
    out["norm_topk_prob"] = sigmoid
    grouped = "greedy" if out["n_expert_groups"] == 1 else "group_limited_greedy"
    out["topk_method"] = "noaux_tc" if sigmoid else grouped
    return {**out, "n_mtp_layers": 0, "norm_eps": _WITHOUT_KEY["norm_eps"]}


def inference_to_json(fields: Mapping[str, Any], extended: bool) -> dict[str, Any]:
    """Return the JSON file of a ModelConfig's fields, without its MTP blocks and without dtypes.

    Args:
        extended: YaRN applies.

    Raises: ValueError naming a field that DeepSeek's inference code computes otherwise, or not at all.
    """
    sparse = fields["attention"] == "dsa"
    _refuse_other("attention", fields["attention"], "'mla' or 'dsa'", fields["attention"] in ("mla", "dsa"))
    out = {key: fields[key] for key in (*_MODEL_ARGS, *(_INDEX_ARGS if sparse else ()))}
    out["q_lora_rank"] = out["q_lora_rank"] or 0
    out["original_seq_len"] = out["original_seq_len"] or out["max_seq_len"]
    read = {**inference_from_json(out, ""), **_WITHOUT_KEY}
    free = {"n_mtp_layers", "original_seq_len", *(() if extended else ("mscale_all_dim",))}
    for key in sorted(read.keys() - free):
        _refuse_other(key, fields[key], repr(read[key]), fields[key] == read[key])
    _refuse_other("n_shared_experts", fields["n_shared_experts"], "1 or more", fields["n_shared_experts"] > 0)
    _refuse_other("q_lora_rank", None, "a compressed query for the indexer", not sparse or out["q_lora_rank"] > 0)
    return out


def _refuse_other(key: str, got: Any, want: str, honoured: bool) -> None:
    if not honoured:
        raise ValueError(f"a model with {key}={got!r} is not for DeepSeek's inference code, which has {want}")
