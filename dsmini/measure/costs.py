"""The least that a call of a kernel must move and compute: each operand is read once, each result is written once.

PyTorch counts its own operations, and cannot see into a kernel. So each operation with a kernel has a function here, of
the result of a call and of its arguments. It returns the FLOPs of the products where a call moves all its operands and
results, and a whole Cost where it moves other bytes.
"""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from dsmini.measure.torch_operations import tensors_in
from dsmini.numerics import QuantizedTensor, Weight
from dsmini.ops import Call


class Cost(NamedTuple):
    """Lower bound of a call."""

    read: int
    """Bytes."""
    written: int
    """Bytes."""
    flops: int
    """Floating-point operations of products. A multiply-add counts as two."""


def cost_of(call: Call) -> Cost:
    """Return the cost of a call.

    Raises: ValueError for an operation without a cost: a count leaves nothing out in silence.
    """
    if call.name not in COSTS:
        raise ValueError(
            f"the kernel of {call.name} has no cost, so it cannot be counted; add one to dsmini/measure/costs.py"
        )
    cost = COSTS[call.name](call.result, *call.args, **call.kwargs)
    return cost if isinstance(cost, Cost) else Cost(_nbytes(*call.operands), _nbytes(*tensors_in(call.result)), cost)


def _nbytes(*operands: Any) -> int:
    return sum(operand.nbytes for operand in operands if operand is not None)


def _numbers(*weights: Any) -> int:
    """Return how many numbers some matrices have, however they are stored."""
    return sum(math.prod(weight.shape) for weight in weights if weight is not None)


def _no_products(result: Any, *operands: Any, **_: Any) -> int:
    return 0


# products


def _linear(result: Any, x: Tensor, weight: Weight) -> int:
    return 2 * math.prod(x.shape[:-1]) * math.prod(weight.shape)


def _experts(
    result: Any,
    x: Tensor | QuantizedTensor,
    indices: Tensor,
    weights: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float | None = None,
) -> Cost:
    chosen, (e, f, m) = len(indices.unique()), w1.shape
    read = _nbytes(x, indices, weights) + _nbytes(w1, w2, w3) * chosen // e  # only what some token chose
    return Cost(read, math.prod(x.shape) * x.dtype.itemsize, 6 * indices.numel() * f * m)


def _trained_experts(result: Any, x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, *_: Any) -> int:
    return 6 * indices.numel() * w1[0].numel()


def _trained_experts_gradients(result: Any, grad: Tensor, x: Tensor, indices: Tensor, *rest: Any) -> int:
    return 12 * indices.numel() * rest[3][0].numel()  # an expert's w1


def _muon(result: Any, matrices: Any, steps: Any, **_: object) -> Cost:
    moved, flops = _nbytes(*matrices.params), 0
    for p in matrices.params:
        o, i = sorted(p.shape[-2:])
        # X X^T and its square are symmetric, so that half of their products is enough
        each = len(steps.coefficients) * (o * (o + 1) * (i + o) + 2 * o * o * i)
        if steps.rational:  # X X^T, inverses, two products between them, and one with X
            between = len(steps.coefficients) - 1
            each = o * (o + 1) * (i + 2 * between * o) + (between + 1) * o**3 + 2 * o * o * i
        flops += p.numel() // (o * i) * each
    return Cost(3 * moved, 2 * moved, flops)


def _write_streams(result: Any, streams: Tensor, *_: Any) -> int:
    return 2 * streams.numel() * streams.shape[-2]  # the streams, mixed


def _write_streams_gradients(result: Any, grad: Tensor, *_: Any) -> int:
    return 2 * _write_streams(result, grad)


# attention to the keys of every head


def _pairs(q: Tensor, documents: Tensor | None) -> int:
    """Return the number of pairs of a query and a key that it sees, over sequences and heads."""
    b, h, s, _ = q.shape
    if documents is None:
        return b * h * s * (s + 1) // 2
    alike = documents[:, :, None] == documents[:, None]
    return h * int(alike.tril().sum())


def _causal_attention(
    result: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None
) -> int:
    return 2 * _pairs(q, documents) * (q.shape[3] + v.shape[3])


def _cached_attention(result: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> int:
    (b, h, s, d), t = q.shape, k.shape[2]
    pairs = b * s * t if mask is None else int((~mask).sum()) * (b // len(mask))
    return 2 * h * pairs * (d + v.shape[3])


def _sink_attention(result: Tensor, q: Tensor, kv: Tensor, mask: Tensor, *_: Any) -> int:
    pairs = int((~mask).sum()) * (len(q) // len(mask))
    return 4 * pairs * math.prod(q.shape[2:])


def _entry_attention(
    result: Tensor,
    q: Tensor,
    near: Tensor,
    masked: Tensor,
    entries: Any,
    hidden: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    scale: float,
) -> Cost:
    seen = hidden.logical_not() if chosen is None else chosen >= 0
    pairs = sum(int(part.sum()) * (len(q) // len(part)) for part in (~masked, seen))
    # queries that see all entries share them, others read what they chose
    rows = int(seen.any(1).sum()) * (len(q) // len(seen)) if chosen is None else int(seen.sum())
    data = entries if isinstance(entries, Tensor) else entries.data
    read = _nbytes(q, near, masked, sink, hidden if chosen is None else chosen)
    read += rows * data.shape[2] * data.element_size()
    return Cost(read, result.nbytes, 4 * pairs * math.prod(q.shape[2:]))


def _trained_pairs(q: Tensor, mask: Tensor | None) -> int:
    return _pairs(q, None) if mask is None else int((~mask).sum()) * (len(q) // len(mask)) * q.shape[1]


def _trained_attention(result: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> int:
    return 2 * _trained_pairs(q, mask) * (q.shape[3] + v.shape[3])


def _trained_attention_gradients(
    result: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float, mask: Any
) -> int:
    return 2 * _trained_pairs(q, mask) * (3 * q.shape[3] + 2 * v.shape[3])


# attention to the keys that an indexer chose


def _topk_keys(result: Any, q: Tensor, k: Tensor, *_: Any) -> int:
    return 2 * q.numel() * k.shape[1]


def _topk_attention(
    result: Any, q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, chosen: Tensor
) -> Cost:
    (b, s, h, n), width, (c, v), k = q_nope.shape, rows.shape[2], w_uv.shape[1:], chosen.shape[2]
    read = _nbytes(q_nope, q_rope, w_uk, w_uv, chosen) + chosen.numel() * rows[0, 0].nbytes
    flops = 2 * b * s * h * (c * (n + v) + k * (width + c))
    return Cost(read, b * s * h * v * q_nope.element_size(), flops)


# the parts of a decoding step, as a counted step calls them


def _normed(result: Any, x: Tensor, norm: Any) -> Cost:
    return Cost(_nbytes(x, norm.weight), x.nbytes, 0)


def _attention_step(result: Any, x: Tensor, part: Any, cache: Any, cos_sin: Any, starts: Tensor) -> Cost:
    if "wk" in part.weights:
        return _grouped_attention_step(x, part, cache, starts)
    if "attn_sink" in part.weights:
        return _compressed_attention_step(x, part, cache, starts)
    (b, s, _), layer, w = x.shape, part.layer, part.weights
    keys, data = int(starts.sum()) + b * s, cache.store.data
    row = data.shape[2] * data.element_size()
    products = _numbers(*(w.get(name) for name in ("wq", "wq_a", "wq_b", "wkv_a", "wkv_b", "wo")))
    read_keys, scores, index_row = keys, 0, 0
    if (i := getattr(layer, "indexer", None)) is not None:
        index = cache.store.index.data
        index_row = index.shape[2] * index.element_size()
        products += (index.shape[2] + i.n_heads) * x.shape[2]
        read_keys = sum(min(start + s, i.topk) for start in starts.tolist())
        if int(starts.max()) + s > i.topk:  # or nothing is scored
            products += _numbers(w["indexer.wq_b"])
            scores = 2 * s * keys * i.n_heads * i.head_dim
    attention = 2 * s * read_keys * layer.n_heads * (2 * layer.kv_lora_rank + layer.rope.dim)
    read = _nbytes(x, *w.values()) + read_keys * row + (keys if scores else 0) * index_row
    written = x.nbytes + b * s * (row + index_row)
    flops = 2 * b * s * products + attention + scores
    return Cost(read, written, flops)


def _compressed_attention_step(x: Tensor, part: Any, cache: Any, starts: Tensor) -> Cost:
    (b, s), layer, store = x.shape[:2], part.layer, cache.store
    index: Any = layer.indexer
    lengths = [start + s for start in starts.tolist()]
    weights, m, topk = dict(part.weights), layer.m, getattr(index, "topk", 0)
    entries = [length // m if m else 0 for length in lengths]
    scores = bool(topk) and max(entries) > topk
    if topk and not scores:
        del weights["indexer.wq_b"]
    # 1. rows that are read: of windows, of entries, which queries share unless they choose, and of keys
    rows = sum(min(length, layer.window_size + s - 1) for length in lengths)
    read = _nbytes(x, *weights.values()) + rows * _row_bytes(store.window)
    chosen = [s * topk if scores else n for n in entries]
    written = x.nbytes + b * s * _row_bytes(store.window)
    for of, seen in ((store, chosen), (store.index, entries if scores else [0])):
        if hasattr(of, "raw"):
            made = sum(length // m - (length - s) // m for length in lengths)
            read += sum(seen) * _row_bytes(of.entries) + made * layer.compressor.series * m * _row_bytes(of.raw)
            written += made * _row_bytes(of.entries) + b * s * _row_bytes(of.raw)
    # 2. products of each token with all matrices, and of queries with rows
    pairs = sum(s * min(length, layer.window_size) for length in lengths)
    pairs += sum(s * min(n, topk) if scores else s * n for n in entries)
    flops = 2 * b * s * _numbers(*(w for name, w in weights.items() if len(w.shape) == 2 and not name.endswith("ape")))
    flops += 4 * pairs * layer.n_heads * layer.head_dim
    if scores:
        flops += 2 * s * sum(entries) * index.n_heads * index.head_dim
    return Cost(read, written, flops)


def _row_bytes(rows: Any) -> int:
    return rows.data.shape[2] * rows.data.element_size()


def _grouped_attention_step(x: Tensor, part: Any, cache: Any, starts: Tensor) -> Cost:
    (b, s, _), w = x.shape, part.weights
    keys, data = int(starts.sum()) + b * s, cache.store.data
    row = data.shape[2] * data.element_size()
    widths = w["wq"].shape[0] + w["wo"].shape[1]  # of all heads: a key's, and a value's
    attention = 2 * s * keys * widths
    flops = 2 * b * s * _numbers(*(w[name] for name in ("wq", "wk", "wv", "wo"))) + attention
    read = _nbytes(x, *w.values()) + keys * row
    return Cost(read, x.nbytes + b * s * row, flops)


def _feed_forward_step(result: Sequence[Tensor], x: Tensor, part: Any, tokens: Tensor | None = None) -> Cost:
    w, gate = part.weights, part.weights.get("gate")
    dense = [w.get(name if gate is None else f"shared_experts.{name}") for name in ("w1", "w2", "w3")]
    streams = [w.get(f"hc.{name}") for name in ("fn", "base", "scale")]
    read = _nbytes(x, w["norm"], *dense, *streams)
    products = _numbers(*dense, streams[0])
    if gate is not None:
        routed = [w[f"experts.{name}"] for name in ("w1", "w2", "w3")]
        e, k = gate.shape[0], part.layer.gate.options["n_activated_experts"]
        chosen = int((result[-1] > 0).sum())  # matrices that no token chose are not read
        expert = _numbers(*routed) // e
        read += gate.nbytes + _nbytes(*routed) * chosen // e
        products += gate.numel() + k * expert
    return Cost(read, x.nbytes, 2 * x.shape[0] * products)


COSTS: MappingProxyType[str, Callable[..., int | Cost]] = MappingProxyType(
    {
        **dict.fromkeys(("quantize", "dequantize", "quantize_dequantize"), _no_products),
        **dict.fromkeys(("trained_norm", "trained_norm_gradients", "rows_at"), _no_products),
        **dict.fromkeys(("sinkhorn", "sinkhorn_gradients", "read_streams", "read_streams_gradients"), _no_products),
        "write_streams": _write_streams,
        "write_streams_gradients": _write_streams_gradients,
        "linear": _linear,
        "quantized_linear": _linear,
        "experts": _experts,
        "quantized_experts": _experts,
        "trained_experts": _trained_experts,
        "trained_experts_gradients": _trained_experts_gradients,
        "muon_update": _muon,
        "causal_attention": _causal_attention,
        "cached_attention": _cached_attention,
        "sink_attention": _sink_attention,
        "entry_attention": _entry_attention,
        "trained_attention": _trained_attention,
        "trained_attention_gradients": _trained_attention_gradients,
        "topk_keys": _topk_keys,
        "topk_attention": _topk_attention,
        "normed": _normed,
        "attention_step": _attention_step,
        "feed_forward_step": _feed_forward_step,
    }
)
"""A function from the result and the arguments of a call, by the name of the operation."""
