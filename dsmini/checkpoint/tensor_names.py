"""Names of tensors: ours, those of Hugging Face's folders, and those of DeepSeek's inference code.

Ours are those of DeepSeek's inference code with two differences: the experts of a layer are stacked into one tensor,
and the multi-token prediction blocks are mtp.0, mtp.1, ... (in a folder they follow the last layer as layers N, N+1,
...). Hugging Face's names are in no other file.
"""

import re
from collections.abc import Iterable

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
    "attn.indexer.wq_b": "self_attn.indexer.wq_b",
    "attn.indexer.wk": "self_attn.indexer.wk",
    "attn.indexer.k_norm": "self_attn.indexer.k_norm",
    "attn.indexer.weights_proj": "self_attn.indexer.weights_proj",
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
# dimension in which DeepSeek's inference code splits these over its ranks: 0 rows, 1 columns
_SPLIT = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
_GATE_BIAS = ("ffn.gate.bias", "mlp.gate.e_score_correction_bias")


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


def hf_name(name: str, n_layers: int, expert: int | None = None) -> str:
    """Return the name in a Hugging Face folder of our tensor, or of one expert's part of a stacked one.

    Raises: ValueError for a tensor that DeepSeek's architecture does not have.
    """
    if stacked := _STACKED.fullmatch(name):
        assert expert is not None, "a stacked tensor has a name for each expert"
        kind = "weight_scale_inv" if stacked[3] else "weight"
        return f"{_block_prefix(stacked[1], n_layers)}mlp.experts.{expert}.{_EXPERT[stacked[2]]}.{kind}"
    return _to_hf_name(name, n_layers)


def inference_name(name: str, expert: int | None = None) -> str:
    """Return the name in DeepSeek's inference code of our tensor, or of one expert's part of a stacked one."""
    if stacked := _STACKED.fullmatch(name):
        return f"{stacked[1]}ffn.experts.{expert}.{stacked[2]}.{'scale' if stacked[3] else 'weight'}"
    return name


def inference_split(theirs: str) -> int | None:
    """Return the dimension in which DeepSeek's inference layout splits a tensor over its ranks.

    None: each rank has the whole tensor, as of the indexer, or one rank has a routed expert's.
    """
    if ".experts." in theirs or ".indexer." in theirs:
        return None
    return _SPLIT.get(theirs.split(".")[-2])


def is_routed_expert(theirs: str) -> bool:
    """Return whether a tensor of DeepSeek's inference layout belongs to a routed expert."""
    return re.search(r"\.ffn\.experts\.\d+\.", theirs) is not None


def _block_prefix(ours: str, n_layers: int) -> str:
    part = re.fullmatch(r"(layers|mtp)\.(\d+)\.(block\.)?", ours)
    if part is None:
        raise ValueError(f"{ours!r} is not the prefix of a block; want layers.N. or mtp.K.block.")
    return f"model.layers.{int(part[2]) + (n_layers if part[1] == 'mtp' else 0)}."


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
    raise ValueError(f"tensor {name!r} has no Hugging Face name; only models of MLA and DSA have a folder format")
