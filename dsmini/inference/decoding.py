"""Decoding steps in few calls: two operations a block, in place of the thirty of its modules.

A block is taken apart into its weights once for each generation. That is done only where the modules are dsmini's own
and plain: a subclass, a hook, a mask, normed heads, simulated FP8 or a wrapper such as LoRA keeps its block as it is.
Numbers between layers are FP32; weights and the cache stay as they are stored.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.functional.decoding import AttentionPart, FeedForwardPart, attention_step, feed_forward_step
from dsmini.nn import MLA, Block, Cache, FeedForward, MoE, RMSNorm, Transformer
from dsmini.nn.experts import Experts
from dsmini.nn.fp8 import QuantizedExperts, QuantizedLinear
from dsmini.nn.gate import Gate, Routing, route
from dsmini.nn.linear import Linear
from dsmini.nn.transformer import States
from dsmini.numerics import QuantizedTensor

MOST_TOKENS = 32
"""Number of tokens in a step up to which the steps' kernels serve."""
Parts = tuple[AttentionPart, FeedForwardPart]


class Decoder:
    """Runs a model on new tokens after a cache, in few calls where it can.

    The weights must stay where they are while it is used: make a new one after a load, a cast or a move.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        floats = (torch.float32, torch.bfloat16)
        dtype = model.compute_dtype or model.embed.weight.dtype
        fast = dtype in floats and model.device.type == "cpu" and ops.serving("cpu") == "cpu"
        self.parts: list[Parts | None] = [parts_of(block) if fast else None for block in model.layers]
        """The parts of each block, or None for one that runs as it is."""

    def logits(self, tokens: Int[Tensor, "b s"], cache: Cache) -> Float[Tensor, "b s v"]:
        """Append tokens to the cache and return the logits after each, as the model does."""
        with torch.no_grad():
            return self.model.head(self.states(tokens, cache).normed)

    def states(self, tokens: Int[Tensor, "b s"], cache: Cache, lengths: Int[Tensor, " b"] | None = None) -> States:
        """Do what Transformer.states does with a cache. normed is FP32 where all blocks are taken apart."""
        model, starts = self.model, cache.lengths
        if None in self.parts or not _is_step(tokens.shape, cache, lengths):
            return model.states(tokens, cache, lengths)
        with torch.no_grad():
            # 1. token ids to hidden states: [b, s, m]
            embedded = model.embedded(tokens)
            x = embedded.float()
            # 2. positions, and the place in the cache
            window = cache.place(model.config, tokens, lengths)
            table = model.rope.table(window.positions)
            # 3. the blocks: two calls each
            routing: list[Routing] = []
            for parts, past in zip(self.parts, cache.pasts(window), strict=True):
                assert parts is not None
                x = attention_step(x, parts[0], past, table, starts)
                y, *decided = feed_forward_step(x.flatten(0, 1), parts[1])
                x = y.view(x.shape)
                routing += [Routing(*decided)] if parts[1].gate is not None else []
            cache.lengths = window.lengths
            # 4. the final norm: [b, s, m]
            normed = model.norm(x)
            given = x if model.config.mtp_input == "pre_norm" else normed
            return States(normed, given.to(embedded.dtype), routing)


def _is_step(shape: torch.Size, cache: Cache, lengths: Tensor | None) -> bool:
    """Return True for a few tokens of every row, or of some rows and none of the others.

    Rows without new tokens are computed too. What is written of them lies after their end, and is overwritten later.
    """
    b, s = shape
    if b * s > MOST_TOKENS or cache.form == "expanded" or not bool(cache.lengths.any()):
        return False
    if lengths is None:
        return True
    whole = bool(((lengths == 0) | (lengths == s)).all())
    return whole and int(cache.lengths.max()) + s <= cache.max_seq_len


def parts_of(block: nn.Module) -> Parts | None:
    """Take a block apart, or return None if some module of it must run as it is."""
    if not (isinstance(block, Block) and _plain(block, Block) and _plain(block.attn, MLA)):
        return None
    attention, feed_forward = (
        _attention_part(block.attn, block.attn_norm),
        _feed_forward_part(block.ffn, block.ffn_norm),
    )
    return None if attention is None or feed_forward is None else (attention, feed_forward)


def _attention_part(attn: Any, norm: nn.Module) -> AttentionPart | None:
    norms = [norm, attn.kv_norm, *([] if attn.q_norm is None else [attn.q_norm])]
    linears = [attn.wkv_a, attn.wkv_b, attn.wo, *([attn.wq] if attn.wq_a is None else [attn.wq_a, attn.wq_b])]
    fine = attn.mask is None and attn.q_head_norm is None and all(_plain(n, RMSNorm) for n in norms)
    if not fine or not all(_plain(module, Linear, QuantizedLinear) for module in linears):
        return None
    return AttentionPart(
        norm=_weight(norm),
        wq_a=None if attn.wq_a is None else _operand(attn.wq_a),
        q_norm=None if attn.q_norm is None else _weight(attn.q_norm),
        wq_b=_operand(attn.wq if attn.wq_a is None else attn.wq_b),
        wkv_a=_operand(attn.wkv_a),
        kv_norm=_weight(attn.kv_norm),
        wkv_b=_operand(attn.wkv_b),
        wo=_operand(attn.wo),
        n_heads=attn.n_heads,
        nope=attn.qk_nope_head_dim,
        rope=attn.rope.dim,
        value=attn.v_head_dim,
        scale=attn.scale,
        eps=_eps(norm),
        q_eps=0.0 if attn.q_norm is None else _eps(attn.q_norm),
        kv_eps=_eps(attn.kv_norm),
    )


def _feed_forward_part(ffn: nn.Module, norm: nn.Module) -> FeedForwardPart | None:
    if not _plain(norm, RMSNorm):
        return None
    if isinstance(ffn, FeedForward):
        dense = _dense(ffn)
        return None if dense is None else FeedForwardPart(norm=_weight(norm), eps=_eps(norm), **dense)
    if not isinstance(ffn, MoE) or not _plain(ffn, MoE) or not _plain(ffn.gate, Gate):
        return None
    shared: dict[str, Any] | None = (
        dict.fromkeys(("w1", "w2", "w3")) if ffn.shared_experts is None else _dense(ffn.shared_experts)
    )
    if shared is None or not _plain(ffn.experts, Experts, QuantizedExperts):
        return None
    gate, bias = ffn.gate.weight.detach(), None if ffn.gate.bias is None else ffn.gate.bias.detach()
    return FeedForwardPart(
        norm=_weight(norm),
        eps=_eps(norm),
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
    if not _plain(ffn, FeedForward) or not all(_plain(w, Linear, QuantizedLinear) for w in (ffn.w1, ffn.w2, ffn.w3)):
        return None
    return {"w1": _operand(ffn.w1), "w2": _operand(ffn.w2), "w3": _operand(ffn.w3)}


def _plain(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Return True for a module of exactly one of these classes, with its own forward, no hooks, and stored weights."""
    if module is None or type(module) not in classes or "forward" in module.__dict__:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def _operand(module: Any, name: str = "weight") -> Tensor | QuantizedTensor:
    """Return a weight as products take it. It is detached: its memory stays, even if the module gets another."""
    weight = module.operand(name) if isinstance(module, QuantizedLinear | QuantizedExperts) else getattr(module, name)
    return weight.detach() if isinstance(weight, Tensor) else weight


def _weight(norm: Any) -> Float[Tensor, " m"]:
    return norm.weight.detach()


def _eps(norm: Any) -> float:
    return norm.eps
