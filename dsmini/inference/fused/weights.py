"""A model's blocks taken apart into their weights, for the operations of a decoding step.

That is done only where the modules are dsmini's own and plain: a subclass, a hook, a mask, normed heads, simulated FP8
or a wrapper such as LoRA keeps its block as it is.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dsmini.inference.fused.operations import (
    AttentionPart,
    FeedForwardPart,
    GroupedAttentionPart,
    IndexerPart,
    NormPart,
)
from dsmini.nn import (
    DSA,
    MLA,
    MTP,
    Attention,
    Block,
    Experts,
    FeedForward,
    Gate,
    Indexer,
    Linear,
    MoE,
    QuantizedExperts,
    QuantizedLinear,
    RMSNorm,
    route,
)
from dsmini.nn.layers import FP32Linear, LayerNorm
from dsmini.numerics import Weight

Parts = tuple[AttentionPart | GroupedAttentionPart, FeedForwardPart]


@dataclass(frozen=True, kw_only=True)
class MTPParts:
    """The weights of a multi-token prediction block."""

    embedding_norm: NormPart
    hidden_norm: NormPart
    projection: Weight
    block: Parts
    norm: NormPart


def parts_of(block: nn.Module) -> Parts | None:
    """Take a block apart, or return None if some module of it must run as it is."""
    if not (isinstance(block, Block) and is_plain(block, Block) and is_plain(block.attn, MLA, DSA, Attention)):
        return None
    take_apart = _attention_part if isinstance(block.attn, MLA) else _grouped_part
    attention, feed_forward = (
        take_apart(block.attn, block.attn_norm),
        _feed_forward_part(block.ffn, block.ffn_norm),
    )
    return None if attention is None or feed_forward is None else (attention, feed_forward)


def mtp_parts_of(module: nn.Module) -> MTPParts | None:
    """Take a multi-token prediction block apart, or return None if some module of it must run as it is."""
    if not (isinstance(module, MTP) and is_plain(module, MTP) and is_plain(module.eh_proj, Linear, QuantizedLinear)):
        return None
    block, norms = parts_of(module.block), [norm_of(norm) for norm in (module.enorm, module.hnorm, module.norm)]
    if block is None or norms[0] is None or norms[1] is None or norms[2] is None:
        return None
    return MTPParts(
        embedding_norm=norms[0],
        hidden_norm=norms[1],
        projection=_operand(module.eh_proj),
        block=block,
        norm=norms[2],
    )


def norm_of(norm: Any) -> NormPart | None:
    """Return a plain norm's weight and eps, or None."""
    return NormPart(norm.weight.detach(), norm.eps) if is_plain(norm, RMSNorm) else None


def is_plain(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Return True for a module of exactly one of these classes, with its own forward, no hooks, and stored weights."""
    if module is None or type(module) not in classes or "forward" in module.__dict__:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def _attention_part(attn: Any, norm: Any) -> AttentionPart | None:
    norms = [norm, attn.kv_norm, *([] if attn.q_norm is None else [attn.q_norm])]
    linears = [attn.wkv_a, attn.wkv_b, attn.wo, *([attn.wq] if attn.wq_a is None else [attn.wq_a, attn.wq_b])]
    fine = attn.mask is None and attn.q_head_norm is None and all(is_plain(n, RMSNorm) for n in norms)
    indexer = _indexer_part(attn.indexer) if isinstance(attn, DSA) else None
    fine = fine and (indexer is not None) == isinstance(attn, DSA)
    if not fine or not all(is_plain(module, Linear, QuantizedLinear) for module in linears):
        return None
    return AttentionPart(
        norm=norm.weight.detach(),
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
        eps=norm.eps,
        q_eps=0.0 if attn.q_norm is None else attn.q_norm.eps,
        kv_eps=attn.kv_norm.eps,
        indexer=indexer,
    )


def _indexer_part(indexer: Any) -> IndexerPart | None:
    fine = is_plain(indexer, Indexer) and is_plain(indexer.k_norm, LayerNorm) and not indexer.fp8
    fine = fine and is_plain(indexer.weights_proj, FP32Linear)
    if not fine or not all(is_plain(module, Linear, QuantizedLinear) for module in (indexer.wq_b, indexer.wk)):
        return None
    return IndexerPart(
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


def _grouped_part(attn: Any, norm: Any) -> GroupedAttentionPart | None:
    fine = attn.mask is None and attn.q_head_norm is None and is_plain(norm, RMSNorm)
    if not fine or not all(is_plain(w, Linear, QuantizedLinear) for w in (attn.wq, attn.wk, attn.wv, attn.wo)):
        return None
    return GroupedAttentionPart(
        norm=norm.weight.detach(),
        eps=norm.eps,
        wq=_operand(attn.wq),
        wk=_operand(attn.wk),
        wv=_operand(attn.wv),
        wo=_operand(attn.wo),
        n_heads=attn.n_heads,
        n_kv_heads=attn.n_kv_heads,
        scale=attn.scale,
    )


def _feed_forward_part(ffn: Any, norm: Any) -> FeedForwardPart | None:
    if not is_plain(norm, RMSNorm):
        return None
    if isinstance(ffn, FeedForward):
        dense = _dense(ffn)
        return None if dense is None else FeedForwardPart(norm=norm.weight.detach(), eps=norm.eps, **dense)
    if not isinstance(ffn, MoE) or not is_plain(ffn, MoE) or not is_plain(ffn.gate, Gate):
        return None
    if ffn.exchange is not None:  # other processes have some of the experts
        return None
    shared: dict[str, Any] | None = (
        dict.fromkeys(("w1", "w2", "w3")) if ffn.shared_experts is None else _dense(ffn.shared_experts)
    )
    if shared is None or not is_plain(ffn.experts, Experts, QuantizedExperts):
        return None
    gate, bias = ffn.gate.weight.detach(), None if ffn.gate.bias is None else ffn.gate.bias.detach()
    return FeedForwardPart(
        norm=norm.weight.detach(),
        eps=norm.eps,
        **shared,
        gate=gate,
        bias=bias,
        e1=_operand(ffn.experts, "w1"),
        e2=_operand(ffn.experts, "w2"),
        e3=_operand(ffn.experts, "w3"),
        options=ffn.gate.options,
        route=partial(route, bias=bias, **ffn.gate.options),
    )


def _dense(ffn: Any) -> dict[str, Any] | None:
    """Return the weights of a plain FeedForward by name, or None."""
    if not is_plain(ffn, FeedForward) or not all(
        is_plain(w, Linear, QuantizedLinear) for w in (ffn.w1, ffn.w2, ffn.w3)
    ):
        return None
    return {"w1": _operand(ffn.w1), "w2": _operand(ffn.w2), "w3": _operand(ffn.w3)}


def _operand(module: Any, name: str = "weight") -> Weight:
    """Return a weight as products take it. It is detached: its memory stays, even if the module gets another."""
    weight = module.operand(name) if isinstance(module, QuantizedLinear | QuantizedExperts) else getattr(module, name)
    return weight.detach() if isinstance(weight, Tensor) else weight
