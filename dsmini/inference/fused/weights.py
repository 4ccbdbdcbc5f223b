"""A block's weights as the kernels of a decoding step take them: bare tensors, with the sizes and options beside them.

Only a block whose modules are all dsmini's own is taken apart: with a subclass, a hook, a mask, normed heads, simulated
FP8, experts on other processes or a wrapper such as LoRA it runs as a module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.nn import DSA, MLA, MTP, Attention, Block, FeedForward, Indexer, MoE, QuantizedExperts, QuantizedLinear
from dsmini.nn.layers import is_plain
from dsmini.numerics import Weight


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexerWeights:
    """The weights of an indexer. Its queries are projections of what MLA's wq_b reads."""

    wq_b: Weight
    wk: Weight
    k_norm: Float[Tensor, " d"]
    k_bias: Float[Tensor, " d"]
    weights_proj: Float[Tensor, "h m"]
    n_heads: int
    topk: int
    halves: bool
    """RoPE pairs the halves of the first numbers, not neighbours."""
    k_eps: float


@dataclass(frozen=True, kw_only=True, eq=False)
class StepWeights:
    """One half of a block: the norm, and what comes between it and the residual sum."""

    norm: Float[Tensor, " m"]
    eps: float
    modules: tuple[Any, nn.Module]
    """The norm's module, and that of attention or of the feed-forward: the plain version of a step runs them."""
    dtype: torch.dtype
    """Dtype of products with codes: in BF16 a kernel may round the other operand to it, as the modules do."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """What a backend makes of the weights, by its name."""

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors; those of a quantized weight are codes and scales."""
        indexer = getattr(self, "indexer", None)
        values = [*vars(self).values(), *(() if indexer is None else vars(indexer).values())]
        return tuple(t for v in values for t in ((v,) if isinstance(v, Tensor) else getattr(v, "parts", ())))


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionWeights(StepWeights):
    """MLA. wq_a None: wq_b projects the query directly."""

    wq_a: Weight | None
    q_norm: Float[Tensor, " q"] | None
    wq_b: Weight
    wkv_a: Weight
    kv_norm: Float[Tensor, " c"]
    wkv_b: Weight
    wo: Weight
    n_heads: int
    nope: int
    rope: int
    value: int
    scale: float
    q_eps: float
    kv_eps: float
    indexer: IndexerWeights | None

    @property
    def latent(self) -> int:
        """kv_lora_rank."""
        return self.kv_norm.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedAttentionWeights(StepWeights):
    """MHA, GQA or MQA."""

    wq: Weight
    wk: Weight
    wv: Weight
    wo: Weight
    n_heads: int
    n_kv_heads: int
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class FeedForwardWeights(StepWeights):
    """A dense feed-forward, or a gate, its experts and the shared ones, which are w1 to w3."""

    w1: Weight | None
    w2: Weight | None
    w3: Weight | None
    gate: Float[Tensor, "e m"] | None = None
    bias: Float[Tensor, " e"] | None = None
    e1: Weight | None = None
    e2: Weight | None = None
    e3: Weight | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `nn.route`."""


class BlockWeights(NamedTuple):
    """The two halves of a block."""

    attention: AttentionWeights | GroupedAttentionWeights
    feed_forward: FeedForwardWeights


def supports_fused(module: nn.Module) -> bool:
    """Return True if each part of a module does what its class says, and the kernels know the class's options."""
    for part in module.modules():
        replaced = any(callable(value) and hasattr(type(part), name) for name, value in vars(part).items())
        other = getattr(part, "precision", "native") != "native" or getattr(part, "fp8", False)
        changed = any(getattr(part, name, None) is not None for name in ("mask", "q_head_norm", "exchange"))
        if replaced or other or changed or not is_plain(part):
            return False
    return True


def extract_weights(block: nn.Module, dtype: torch.dtype = torch.float32) -> BlockWeights | None:
    """Take a block apart, with products in this dtype, or return None if some module of it must run as it is."""
    if type(block) is not Block or not supports_fused(block):
        return None
    norm, attn, ffn = block.attn_norm, block.attn, block.ffn
    take_apart = {MLA: _mla, DSA: _mla, Attention: _grouped}.get(type(attn))
    if take_apart is None or type(ffn) not in (FeedForward, MoE):
        return None
    halves = _half(norm, attn, dtype), _half(block.ffn_norm, ffn, dtype)
    return BlockWeights(take_apart(attn, **halves[0]), _feed_forward(ffn, **halves[1]))


def extract_mtp_weights(module: nn.Module, dtype: torch.dtype = torch.float32) -> BlockWeights | None:
    """Take the block of a multi-token prediction module apart, or return None if the module must run as it is."""
    return extract_weights(module.block, dtype) if type(module) is MTP and supports_fused(module) else None


def _half(norm: Any, module: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    return {"norm": norm.weight.detach(), "eps": norm.eps, "modules": (norm, module), "dtype": dtype}


def _mla(attn: Any, **half: Any) -> AttentionWeights:
    return AttentionWeights(
        **half,
        wq_a=None if attn.wq_a is None else _operand(attn.wq_a),
        q_norm=None if attn.q_norm is None else attn.q_norm.weight.detach(),
        wq_b=_operand(attn.wq if attn.wq_a is None else attn.wq_b),
        wkv_a=_operand(attn.wkv_a),
        kv_norm=attn.kv_norm.weight.detach(),
        wkv_b=_operand(attn.wkv_b),
        wo=_operand(attn.wo),
        n_heads=attn.n_heads,
        nope=attn.qk_nope_head_dim,
        rope=attn.rope.dim,
        value=attn.v_head_dim,
        scale=attn.scale,
        q_eps=0.0 if attn.q_norm is None else attn.q_norm.eps,
        kv_eps=attn.kv_norm.eps,
        indexer=_indexer(attn.indexer) if isinstance(attn, DSA) else None,
    )


def _indexer(indexer: Indexer) -> IndexerWeights:
    return IndexerWeights(
        wq_b=_operand(indexer.wq_b),
        wk=_operand(indexer.wk),
        k_norm=indexer.k_norm.weight.detach(),
        k_bias=indexer.k_norm.bias.detach(),
        weights_proj=indexer.weights_proj.weight.detach(),
        n_heads=indexer.n_heads,
        topk=indexer.topk,
        halves=not indexer.interleaved,
        k_eps=indexer.k_norm.eps,
    )


def _grouped(attn: Any, **half: Any) -> GroupedAttentionWeights:
    matrices = {name: _operand(getattr(attn, name)) for name in ("wq", "wk", "wv", "wo")}
    sizes = {"n_heads": attn.n_heads, "n_kv_heads": attn.n_kv_heads, "scale": attn.scale}
    return GroupedAttentionWeights(**half, **matrices, **sizes)


def _feed_forward(ffn: Any, **half: Any) -> FeedForwardWeights:
    dense = ffn if isinstance(ffn, FeedForward) else ffn.shared_experts
    half |= {name: None if dense is None else _operand(getattr(dense, name)) for name in ("w1", "w2", "w3")}
    if isinstance(ffn, FeedForward):
        return FeedForwardWeights(**half)
    gate, bias = ffn.gate, ffn.gate.bias
    half |= {f"e{i}": _operand(ffn.experts, f"w{i}") for i in (1, 2, 3)}
    half |= {"gate": gate.weight.detach(), "bias": None if bias is None else bias.detach(), "options": gate.options}
    return FeedForwardWeights(**half)


def _operand(module: Any, name: str = "weight") -> Weight:
    """Return a weight as products take it. It is detached: its memory stays, even if the module gets another."""
    weight = module.operand(name) if isinstance(module, QuantizedLinear | QuantizedExperts) else getattr(module, name)
    return weight.detach() if isinstance(weight, Tensor) else weight
