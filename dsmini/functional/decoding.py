"""The two halves of a block in a decoding step, each with its norm and residual: attention, and the feed-forward.

They are the operations of nn/ in one call each, so that a kernel can run a layer in two calls. `inference/parts.py`
takes the parts from a model's modules, and `inference/decoding.py` calls the operations. Numbers between them are x's
dtype, FP32 in decoding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.functional.cached_attention import absorbed_attention, cached_attention, hidden_keys
from dsmini.functional.experts import quantized_experts
from dsmini.functional.linear import Weight, dense, linear, multiply
from dsmini.functional.rms_norm import rms_norm
from dsmini.functional.rope import Table, apply_rope
from dsmini.functional.sparse_attention import pick_keys, picked_attention, turned
from dsmini.functional.swiglu import swiglu
from dsmini.numerics import number_dtype


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


def _tensors_of(weights: tuple[Weight | None, ...]) -> tuple[Tensor, ...]:
    """Return all tensors of some weights: those of codes are codes and scales."""
    there = [w for w in weights if w is not None]
    return tuple(t for w in there for t in ((w,) if isinstance(w, Tensor) else w.parts))


def _normed_cost(x: Tensor, norm: NormPart, y: Tensor | None = None, y_norm: NormPart | None = None) -> ops.Cost:
    inputs = 1 if y is None else 2
    return ops.Cost(inputs * (x.nbytes + norm.weight.nbytes), inputs * x.nbytes, 0)


@ops.operation("normed", cost=_normed_cost)
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


def _attention_cost(x: Tensor, part: AttentionPart, past: Any, table: Table, starts: Tensor) -> ops.Cost:
    b, s, _ = x.shape
    h, c, keys = part.n_heads, part.latent, int(starts.sum()) + b * s
    data = past.store.data
    row = data.shape[2] * data.element_size()
    weights = (part.wq_a, part.wq_b, part.wkv_a, part.wkv_b, part.wo)
    products = sum(w.shape[0] * w.shape[1] for w in weights if w is not None)
    met, scores, index_row = keys, 0, 0
    if (i := part.indexer) is not None:
        index = past.store.index.data
        index_row = index.shape[2] * index.element_size()
        products += (index.shape[2] + i.n_heads) * x.shape[2]
        met = sum(min(start + s, i.topk) for start in starts.tolist())
        if int(starts.max()) + s > i.topk:  # or nothing is scored
            products += i.wq_b.shape[0] * i.wq_b.shape[1]
            scores = 2 * s * keys * i.n_heads * len(i.k_norm)
    attention = 2 * s * met * h * (2 * c + part.rope)
    read = x.nbytes + sum(t.nbytes for t in part.tensors) + met * row + (keys if scores else 0) * index_row
    written = x.nbytes + b * s * (row + index_row)
    flops = 2 * b * s * products + attention + scores
    return ops.Cost(read, written, flops, b * s, number_dtype(part.wo), attention, scores)


@ops.operation("attention_step", cost=_attention_cost)
def attention_step(
    x: Float[Tensor, "b s m"], part: AttentionPart, past: Any, table: Table, starts: Int[Tensor, " b"]
) -> Float[Tensor, "b s m"]:
    """Return x + MLA(norm(x)) for new tokens, absorbed, and append their rows to the cache.

    With an indexer a token attends to the keys that it picks, where some token sees more than topk.

    Args:
        past: the layer's part of the cache (nn.cache.Past). All its new columns are tokens.
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
    k_rope = apply_rope(k_rope.unsqueeze(2), table).squeeze(2)
    past.append((rms_norm(c_kv, part.kv_norm, part.kv_eps), k_rope))
    rows = past.store.read(past.window.end, x.dtype)
    # 3. attention, W_UK moved to the queries and W_UV after the sum: [b, s, h v]
    w = rearrange(dense(part.wkv_b, x.dtype), "(h d) c -> h d c", h=part.n_heads)
    w_uk, w_uv = w.tensor_split((part.nope,), 1)
    q_rope = apply_rope(q_rope, table)
    operands = (q_nope, q_rope, rows, w_uk, w_uv.transpose(1, 2), part.scale)
    picks = None if part.indexer is None else _picks(normed, q_in, part.indexer, past, table)
    y = absorbed_attention(*operands, past.window.mask) if picks is None else picked_attention(*operands, picks)
    return x + multiply(y, part.wo)


def _picks(normed: Tensor, q_in: Tensor, part: IndexerPart, past: Any, table: Table) -> Int[Tensor, "b s k"] | None:
    """Append the indexer's keys to the cache, and return the keys that it picks; None where no token has a choice."""
    width, heads = len(part.k_norm), part.n_heads
    keys = F.layer_norm(multiply(normed, part.wk), (width,), part.k_norm, part.k_bias, part.k_eps)
    past.index.append((turned(keys.unsqueeze(2), table, halves=part.halves).squeeze(2),))
    if int(past.window.lengths.max()) <= part.topk:
        return None
    q = turned(rearrange(multiply(q_in, part.wq_b), "b s (h d) -> b s h d", h=heads), table, halves=part.halves)
    weights = linear(normed, part.weights_proj) * (heads * width) ** -0.5
    hidden = hidden_keys(None, past.window.positions, past.window.end)
    return pick_keys(q, past.index.store.read(past.window.end, q.dtype), weights, part.topk, hidden)


def _grouped_cost(x: Tensor, part: GroupedAttentionPart, past: Any, table: Table, starts: Tensor) -> ops.Cost:
    b, s, _ = x.shape
    keys, data = int(starts.sum()) + b * s, past.store.data
    row = data.shape[2] * data.element_size()
    products = sum(w.shape[0] * w.shape[1] for w in (part.wq, part.wk, part.wv, part.wo))
    widths = part.wq.shape[0] + part.wo.shape[1]  # of all heads: a key's, and a value's
    read = x.nbytes + sum(t.nbytes for t in part.tensors) + keys * row
    attention, dtype = 2 * s * keys * widths, number_dtype(part.wo)
    return ops.Cost(read, x.nbytes + b * s * row, 2 * b * s * products + attention, b * s, dtype, attention)


@ops.operation("grouped_attention_step", cost=_grouped_cost)
def grouped_attention_step(
    x: Float[Tensor, "b s m"], part: GroupedAttentionPart, past: Any, table: Table, starts: Int[Tensor, " b"]
) -> Float[Tensor, "b s m"]:
    """Return x + Attention(norm(x)) for new tokens, and append their rows to the cache: MHA, GQA and MQA.

    Args:
        past, starts: as in attention_step.

    Source: Ainslie et al. 2023, for groups of heads that share keys and values.
    """
    # 1. queries and keys, rotated: [b, s, h, d] and [b, s, g, d]
    normed = rms_norm(x, part.norm, part.eps)
    q = apply_rope(rearrange(multiply(normed, part.wq), "b s (h d) -> b s h d", h=part.n_heads), table)
    k = apply_rope(rearrange(multiply(normed, part.wk), "b s (g d) -> b s g d", g=part.n_kv_heads), table).flatten(2)
    # 2. the cache with the new rows: [b, t, g d] and [b, t, g v]
    past.append((k, multiply(normed, part.wv)))
    rows = past.store.read(past.window.end, x.dtype).tensor_split((k.shape[-1],), -1)
    # 3. attention: [b, h, s, v]
    keys, values = (rearrange(each, "b t (g d) -> b g t d", g=part.n_kv_heads) for each in rows)
    y = cached_attention(q.transpose(1, 2), keys, values, part.scale, past.window.mask)
    return x + multiply(rearrange(y, "b h s v -> b s (h v)"), part.wo)


def _feed_forward_cost(x: Tensor, part: FeedForwardPart, result: tuple[Tensor, ...]) -> ops.Cost:
    dense_weights = [w for w in (part.w1, part.w2, part.w3) if w is not None]
    read = x.nbytes + part.norm.nbytes + sum(w.nbytes for w in dense_weights)
    products = numbers = sum(w.shape[0] * w.shape[1] for w in dense_weights)
    weight = part.w2 if part.e2 is None else part.e2
    if part.gate is not None:
        e, k = part.gate.shape[0], part.options["n_activated_experts"]
        experts = [w for w in (part.e1, part.e2, part.e3) if w is not None]
        visited = int((result[-1] > 0).sum())  # matrices that nobody chose stay where they are
        read += part.gate.nbytes + sum(w.nbytes for w in experts) * visited // e
        products += part.gate.numel() + k * sum(w.shape[1] * w.shape[2] for w in experts)
        numbers += part.gate.numel() + visited * sum(w.shape[1] * w.shape[2] for w in experts)
    rows = x.shape[0] * products / max(1, numbers)
    return ops.Cost(read, x.nbytes, 2 * x.shape[0] * products, rows, None if weight is None else number_dtype(weight))


@ops.operation("feed_forward_step", cost=_feed_forward_cost, cost_of_result=True)
def feed_forward_step(x: Float[Tensor, "n m"], part: FeedForwardPart) -> tuple[Tensor, ...]:
    """Return x + FFN(norm(x)), and the routing: indices and weights [n, k], scores [n, e] and counts [e].

    Without a gate the four tensors of the routing are empty.

    Source: DeepSeek-V3 report, section 2.1.2.
    """
    normed = rms_norm(x, part.norm, part.eps)
    y, routing = x, (x.new_empty(0, 0, dtype=torch.int64), x.new_empty(0, 0), x.new_empty(0, 0), x.new_empty(0))
    if part.w1 is not None and part.w2 is not None and part.w3 is not None:
        y = y + multiply(swiglu(multiply(normed, part.w1), multiply(normed, part.w3)), part.w2)
    if part.gate is not None and part.route is not None:
        routing = part.route(linear(normed.float(), part.gate))
        indices, weights, _, counts = routing
        experts: Any = (part.e1, part.e2, part.e3)
        y = y + quantized_experts(normed, indices, weights, counts, *experts)
    return (y, *routing)


Blocks = Sequence[tuple[AttentionPart | GroupedAttentionPart, FeedForwardPart]]


def _blocks_cost(
    x: Tensor, blocks: Blocks, pasts: Sequence[Any], table: Table, starts: Tensor, result: tuple[Tensor, ...]
) -> ops.Cost:
    routing, total = iter(result[1:]), ops.Cost(0, 0, 0)
    for (attention, feed_forward), past in zip(blocks, pasts, strict=True):
        decided = tuple(islice(routing, 4)) if feed_forward.gate is not None else ()
        attend: Any = _grouped_cost if isinstance(attention, GroupedAttentionPart) else _attention_cost
        costs = attend(x, attention, past, table, starts), _feed_forward_cost(x.flatten(0, 1), feed_forward, decided)
        sums = [sum(each) for each in zip(total[:3], *(cost[:3] for cost in costs), strict=True)]
        total = ops.Cost(sums[0], sums[1], sums[2])
    return total


@ops.operation("blocks_step", cost=_blocks_cost, cost_of_result=True)
def blocks_step(
    x: Float[Tensor, "b s m"], blocks: Blocks, pasts: Sequence[Any], table: Table, starts: Int[Tensor, " b"]
) -> tuple[Tensor, ...]:
    """Return x after all blocks, then the four tensors of feed_forward_step's routing for each block with a gate.

    Args:
        pasts: each layer's part of the cache.
        starts: as in attention_step.
    """
    routing: list[Tensor] = []
    for (attention, feed_forward), past in zip(blocks, pasts, strict=True):
        attend: Any = grouped_attention_step if isinstance(attention, GroupedAttentionPart) else attention_step
        y = attend(x, attention, past, table, starts)
        z, *decided = feed_forward_step(y.flatten(0, 1), feed_forward)
        x = z.view(x.shape)
        routing += decided if feed_forward.gate is not None else []
    return (x, *routing)
