"""The two halves of a block in a decoding step, each with its norm and residual: attention, and the feed-forward.

They are the operations of nn/ in one call each, so that a kernel can run a layer in two calls. weights.py takes the
parts from a model's modules, and decoder.py calls the operations. Numbers between them are x's dtype, FP32 in decoding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.nn.attention import attention_mask, cached_attention
from dsmini.nn.cache import LayerCacheView
from dsmini.nn.dsa import pick_keys, picked_attention, rope_hadamard
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear, rms_norm
from dsmini.nn.mla import absorbed_attention
from dsmini.nn.rope import CosSin, apply_rope
from dsmini.numerics import Weight, dense


class NormPart(NamedTuple):
    """An RMSNorm."""

    weight: Float[Tensor, " m"]
    eps: float


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexerPart:
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
class AttentionPart:
    """The weights of MLA and of the norm before it. wq_a None: wq_b projects the query directly."""

    norm: Float[Tensor, " m"]
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
    eps: float
    q_eps: float
    kv_eps: float
    indexer: IndexerPart | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    """What a backend makes of the weights, by its name."""

    @property
    def latent(self) -> int:
        """kv_lora_rank."""
        return self.kv_norm.shape[0]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        weights = (self.norm, self.wq_a, self.q_norm, self.wq_b, self.wkv_a, self.kv_norm, self.wkv_b, self.wo)
        i = self.indexer
        return _tensors_of(weights if i is None else (*weights, i.wq_b, i.wk, i.k_norm, i.k_bias, i.weights_proj))


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedAttentionPart:
    """The weights of MHA, GQA or MQA and of the norm before it."""

    norm: Float[Tensor, " m"]
    eps: float
    wq: Weight
    wk: Weight
    wv: Weight
    wo: Weight
    n_heads: int
    n_kv_heads: int
    scale: float
    prepared: dict[str, Any] = field(default_factory=dict)
    """What a backend makes of the weights, by its name."""

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return _tensors_of((self.norm, self.wq, self.wk, self.wv, self.wo))


@dataclass(frozen=True, kw_only=True, eq=False)
class FeedForwardPart:
    """The weights of a feed-forward and of the norm before it: dense, or of a gate, its experts and the shared ones."""

    norm: Float[Tensor, " m"]
    eps: float
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
    route: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    """From logits to indices, weights, scores and counts."""
    prepared: dict[str, Any] = field(default_factory=dict)
    """What a backend makes of the weights, by its name."""

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        experts = (self.gate, self.bias, self.e1, self.e2, self.e3)
        return _tensors_of((self.norm, self.w1, self.w2, self.w3, *experts))


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """Return x W^T in x's dtype."""
    return linear(x, weight) if isinstance(weight, Tensor) else quantized_linear(x, weight)


def _tensors_of(weights: tuple[Weight | None, ...]) -> tuple[Tensor, ...]:
    """Return all tensors of some weights: those of codes are codes and scales."""
    there = [w for w in weights if w is not None]
    return tuple(t for w in there for t in ((w,) if isinstance(w, Tensor) else w.parts))


@ops.operation("normed")
def normed(
    x: Float[Tensor, "*b m"], norm: NormPart, y: Float[Tensor, "*b m"] | None = None, y_norm: NormPart | None = None
) -> Float[Tensor, "*b n"]:
    """Return norm(x), or norm(x) and y_norm(y) side by side: the input of a multi-token prediction block.

    Source: DeepSeek-V3 report, section 2.2, equation 21.
    """
    normed_x = rms_norm(x, norm.weight, norm.eps)
    if y is None or y_norm is None:
        return normed_x
    return torch.cat((normed_x, rms_norm(y, y_norm.weight, y_norm.eps)), -1)


@ops.operation("attention_step")
def attention_step(
    x: Float[Tensor, "b s m"], part: AttentionPart, cache: LayerCacheView, cos_sin: CosSin, starts: Int[Tensor, " b"]
) -> Float[Tensor, "b s m"]:
    """Return x + MLA(norm(x)) for new tokens, absorbed, and append their rows to the cache.

    With an indexer a token attends to the keys that it chooses, where some token sees more than topk.

    Args:
        cache: the layer's part of the cache. All its new columns are tokens.
        starts: position of each sequence's first new token.

    Source: DeepSeek-V2 report, section 2.1.2; DeepSeek-V3.2 report, section 2.1.
    """
    # 1. queries: [b, s, h, n] and [b, s, h, r]
    normed = rms_norm(x, part.norm, part.eps)
    q_in = normed
    if part.wq_a is not None and part.q_norm is not None:
        q_in = rms_norm(multiply(normed, part.wq_a), part.q_norm, part.q_eps)
    q = rearrange(multiply(q_in, part.wq_b), "b s (h d) -> b s h d", h=part.n_heads)
    q_nope, q_rope = q.tensor_split((part.nope,), -1)
    # 2. the cache with the new rows: [b, t, c + r]
    c_kv, k_rope = multiply(normed, part.wkv_a).tensor_split((part.latent,), -1)
    k_rope = apply_rope(k_rope.unsqueeze(2), cos_sin).squeeze(2)
    cache.append((rms_norm(c_kv, part.kv_norm, part.kv_eps), k_rope))
    rows = cache.store.read(cache.at.end, x.dtype)
    # 3. attention, W_UK moved to the queries and W_UV after the sum: [b, s, h v]
    w = rearrange(dense(part.wkv_b, x.dtype), "(h d) c -> h d c", h=part.n_heads)
    w_uk, w_uv = w.tensor_split((part.nope,), 1)
    q_rope = apply_rope(q_rope, cos_sin)
    operands = (q_nope, q_rope, rows, w_uk, w_uv.transpose(1, 2), part.scale)
    topk_indices = None if part.indexer is None else _select_topk(normed, q_in, part.indexer, cache, cos_sin)
    y = (
        absorbed_attention(*operands, cache.at.mask)
        if topk_indices is None
        else picked_attention(*operands, topk_indices)
    )
    return x + multiply(y, part.wo)


def _select_topk(
    normed: Tensor, q_in: Tensor, part: IndexerPart, cache: LayerCacheView, cos_sin: CosSin
) -> Int[Tensor, "b s k"] | None:
    """Append the indexer's keys to the cache, and return the keys that it chooses; None where no token has a choice."""
    width, heads = len(part.k_norm), part.n_heads
    keys = F.layer_norm(multiply(normed, part.wk), (width,), part.k_norm, part.k_bias, part.k_eps)
    cache.index.append((rope_hadamard(keys.unsqueeze(2), cos_sin, halves=part.halves).squeeze(2),))
    if int(cache.at.lengths.max()) <= part.topk:
        return None
    q = rope_hadamard(
        rearrange(multiply(q_in, part.wq_b), "b s (h d) -> b s h d", h=heads), cos_sin, halves=part.halves
    )
    weights = linear(normed, part.weights_proj) * (heads * width) ** -0.5
    mask = attention_mask(None, cache.at.positions, cache.at.end)
    return pick_keys(q, cache.index.store.read(cache.at.end, q.dtype), weights, part.topk, mask)


@ops.operation("grouped_attention_step")
def grouped_attention_step(
    x: Float[Tensor, "b s m"],
    part: GroupedAttentionPart,
    cache: LayerCacheView,
    cos_sin: CosSin,
    starts: Int[Tensor, " b"],
) -> Float[Tensor, "b s m"]:
    """Return x + Attention(norm(x)) for new tokens, and append their rows to the cache: MHA, GQA and MQA.

    Args:
        cache, starts: as in attention_step.

    Source: Ainslie et al. 2023, for groups of heads that share keys and values.
    """
    # 1. queries and keys, rotated: [b, s, h, d] and [b, s, g, d]
    normed = rms_norm(x, part.norm, part.eps)
    q = apply_rope(rearrange(multiply(normed, part.wq), "b s (h d) -> b s h d", h=part.n_heads), cos_sin)
    k = apply_rope(rearrange(multiply(normed, part.wk), "b s (g d) -> b s g d", g=part.n_kv_heads), cos_sin).flatten(2)
    # 2. the cache with the new rows: [b, t, g d] and [b, t, g v]
    cache.append((k, multiply(normed, part.wv)))
    rows = cache.store.read(cache.at.end, x.dtype).tensor_split((k.shape[-1],), -1)
    # 3. attention: [b, h, s, v]
    keys, values = (rearrange(each, "b t (g d) -> b g t d", g=part.n_kv_heads) for each in rows)
    y = cached_attention(q.transpose(1, 2), keys, values, part.scale, cache.at.mask)
    return x + multiply(rearrange(y, "b h s v -> b s (h v)"), part.wo)


@ops.operation("feed_forward_step")
def feed_forward_step(x: Float[Tensor, "n m"], part: FeedForwardPart) -> tuple[Tensor, ...]:
    """Return x + FFN(norm(x)), and the routing: indices and weights [n, k], scores [n, e] and counts [e].

    Without a gate the four tensors of the routing are empty.

    Source: DeepSeek-V3 report, section 2.1.2.
    """
    normed = rms_norm(x, part.norm, part.eps)
    y, routing = x, (x.new_empty(0, 0, dtype=torch.int64), x.new_empty(0, 0), x.new_empty(0, 0), x.new_empty(0))
    if part.w1 is not None and part.w2 is not None and part.w3 is not None:
        y = y + multiply(F.silu(multiply(normed, part.w1)) * multiply(normed, part.w3), part.w2)
    if part.gate is not None and part.route is not None:
        routing = part.route(linear(normed.float(), part.gate))
        indices, weights, _, counts = routing
        experts: Any = (part.e1, part.e2, part.e3)
        y = y + quantized_experts(normed, indices, weights, counts, *experts)
    return (y, *routing)


Blocks = Sequence[tuple[AttentionPart | GroupedAttentionPart, FeedForwardPart]]


@ops.operation("blocks_step")
def blocks_step(
    x: Float[Tensor, "b s m"],
    blocks: Blocks,
    caches: Sequence[LayerCacheView],
    cos_sin: CosSin,
    starts: Int[Tensor, " b"],
) -> tuple[Tensor, ...]:
    """Return x after all blocks, then the four tensors of feed_forward_step's routing for each block with a gate.

    Args:
        caches: each layer's part of the cache.
        starts: as in attention_step.
    """
    routing: list[Tensor] = []
    for (attention, feed_forward), cache in zip(blocks, caches, strict=True):
        attend: Any = grouped_attention_step if isinstance(attention, GroupedAttentionPart) else attention_step
        y = attend(x, attention, cache, cos_sin, starts)
        z, *routing_of_block = feed_forward_step(y.flatten(0, 1), feed_forward)
        x = z.view(x.shape)
        routing += routing_of_block if feed_forward.gate is not None else []
    return (x, *routing)
