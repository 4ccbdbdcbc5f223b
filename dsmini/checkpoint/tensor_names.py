"""Names of tensors: ours, those of Hugging Face's folders, and those of DeepSeek's inference code.

Ours are those of DeepSeek's inference code with two differences: the experts of a layer are stacked into one tensor,
and the multi-token prediction blocks are mtp.0, mtp.1, ... (in a folder they follow the last layer as layers N, N+1,
...). Hugging Face's names are in no other file.
"""

import re
from collections.abc import Iterable

# parts of a name, ours -> theirs; as in DeepSeek's convert.py, the other way round
_HUGGING_FACE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn": "self_attn",
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "ffn": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "scale": "weight_scale_inv",
}
# parts that have the same name there, and the modules outside attention and feed-forward
_SAME = {*("weight", "bias", "gate", "experts", "shared_experts"), *("enorm", "hnorm", "eh_proj")}
_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INDEXER = {"wq_b", "wk", "k_norm", "weights_proj"}
_STACKED = re.compile(r"(.+ffn\.experts)\.(w[123])(_scale)?")
_BLOCK = re.compile(r"(layers|mtp)\.(\d+)\.(?:block\.)?(.+)")
# dimension in which DeepSeek's inference code splits these over its ranks: 0 rows, 1 columns
_SPLIT = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


def mtp_copies(n_layers: int, depths: Iterable[int]) -> dict[str, str]:
    """Return the names of the MTP blocks' copies of embedding and head, each with our name of the original."""
    return {
        f"model.layers.{n_layers + depth}.{theirs}.weight": f"{ours}.weight"
        for depth in depths
        for theirs, ours in (("embed_tokens", "embed"), ("shared_head.head", "head"))
    }


def mtp_prefixes(n_layers: int, n_mtp_layers: int) -> tuple[str, ...]:
    """Return the prefix of the names of each MTP block's tensors in a folder."""
    return tuple(f"model.layers.{n_layers + depth}." for depth in range(n_mtp_layers))


def is_derived(theirs: str) -> bool:
    """Return whether a tensor repeats what config.json says, such as the rotary frequencies of old folders."""
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", theirs) is not None


def is_indexer(theirs: str) -> bool:
    """Return whether a tensor of a folder, in either layout, belongs to the indexer of V3.2."""
    return ".indexer." in theirs


def is_stacked(name: str) -> bool:
    """Return whether one of our tensors holds all experts of a layer, which are single tensors in a folder."""
    return _STACKED.fullmatch(name) is not None


def is_routed_expert(theirs: str) -> bool:
    """Return whether a tensor of DeepSeek's inference layout belongs to a routed expert."""
    return re.search(r"\.ffn\.experts\.\d+\.", theirs) is not None


def inference_name(name: str, expert: int | None = None) -> str:
    """Return the name in DeepSeek's inference code of our tensor, or of one expert's part of a stacked one."""
    if stacked := _STACKED.fullmatch(name):
        return f"{stacked[1]}.{expert}.{stacked[2]}.{'scale' if stacked[3] else 'weight'}"
    return name


def inference_split(theirs: str) -> int | None:
    """Return the dimension in which DeepSeek's inference layout splits a tensor over its ranks.

    None: each rank has the whole tensor, as of the indexer, or one rank has a routed expert's.
    """
    if is_routed_expert(theirs) or is_indexer(theirs):
        return None
    return _SPLIT.get(theirs.split(".")[-2])


def hf_name(name: str, n_layers: int, expert: int | None = None) -> str:
    """Return the name in a Hugging Face folder of our tensor, or of one expert's part of a stacked one.

    Raises: ValueError for a tensor that DeepSeek's architecture does not have.
    """
    block = _BLOCK.fullmatch(inference_name(name, expert))
    if block is None:
        module, _, kind = name.rpartition(".")
        if module in _TOP:
            return f"{_TOP[module]}.{kind}"
        raise _unknown(name)
    prefix = f"model.layers.{int(block[2]) + (n_layers if block[1] == 'mtp' else 0)}."
    rest = {"norm.weight": "shared_head.norm.weight", "ffn.gate.bias": "mlp.gate.e_score_correction_bias"}
    if block[3] in rest:
        return prefix + rest[block[3]]
    parts = block[3].split(".")
    same = {"indexer", *_INDEXER} if "indexer" in parts else _SAME
    if any(not (part in same or part in _HUGGING_FACE or part.isdigit()) for part in parts[:-1]):
        raise _unknown(name)
    return prefix + ".".join(part if part in same else _HUGGING_FACE.get(part, part) for part in parts)


def _unknown(name: str) -> ValueError:
    return ValueError(f"tensor {name!r} has no Hugging Face name; only models of MLA and DSA have a folder format")
