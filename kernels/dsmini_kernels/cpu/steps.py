"""Products, and the two halves of a block in a decoding step: checks, and the calls of the C++.

A weight is a tensor in FP32 or BF16, or E4M3 codes with FP32 scales of 128x128 blocks, or E2M1 codes with a scale of a
byte for each 32 of a row. It is read where it lies.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved, entry_of
from dsmini_kernels.cpu.calls import detached, enter, is_bf16, n_threads, run, span, strided
from dsmini_kernels.cpu.structs import CALLS, LAYOUTS, LIMITS

MOST_TOKENS = LIMITS["MOST_TOKENS"]
"""Number of tokens of a decoding step up to which a product reads each weight once and is bound by memory."""
MOST_ROWS = 1024
"""Number of rows up to which a product is at least as fast as torch's."""
SMALL = 1 << 15
"""Number of weights below which a call of torch's product costs less, where its threads find their cores free."""
THREADED = 1 << 16
"""Number of multiplications from which two threads are faster than one, and the kernel is faster than torch's BF16
product without BF16 units."""
NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Types of weights, of rows of a cache and of keys."""
CACHE_TYPES = NUMBER_TYPES | {torch.uint8: 2}
CODE_TYPES = {("e4m3", (128, 128), torch.float32): 2, ("e2m1", (1, 32), torch.float8_e8m0fnu): 4}
"""Types of weights in codes, by their format, tile and dtype of scales. The next number is that of codes whose products
are in BF16."""
FP8_KEYS, FP4_KEYS = 2, 3
"""Types of rows that stand for keys, in key_rows.h."""
SCORES = {"sigmoid": 0, "softmax": 1, "sqrtsoftplus": 2}
STEPS = ("attention", "grouped_attention", "feed_forward", "compressed_attention", "stream_step")
STEP_HEADERS = {name: LAYOUTS["StepHeader"].pack(kind=kind, bytes=CALLS[name].size) for kind, name in enumerate(STEPS)}
"""Functions that `blocks` calls, and what stands there before their calls. Kinds are StepKind's, in calls.h."""
ATTENTION_STEP, FEED_FORWARD_STEP = LAYOUTS["AttentionStep"], LAYOUTS["FeedForwardStep"]
COMPRESSED_STEP = LAYOUTS["CompressedStep"]
"""The part of these calls that differs from step to step."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T. Sums are FP32."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        raise Unserved("codes in the place of a tensor")
    if x.dtype == weight.dtype and _torch_is_faster(x, weight):
        raise Unserved
    return quantized_linear(x, weight)


def quantized_linear(x: Tensor, weight: Any) -> Tensor:
    """Return x W^T, with a weight that may be codes. Sums are FP32."""
    bf16 = is_bf16(x)
    if not x.numel() or not x.dim():
        raise Unserved
    w = weight_matrix(weight, x.dtype)
    if len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise Unserved(f"x of shape {list(x.shape)} for a weight of {list(weight.shape)}")
    rows, y = x.shape[:-1].numel(), x.new_empty(*x.shape[:-1], weight.shape[0])
    threads = n_threads() if weight.shape.numel() * rows >= THREADED else 1
    run("linear", threads=threads, n=rows, bf16=bf16, x=x, y=span(y), w=w)
    return y


def _torch_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Return True where torch multiplies these rows with a weight of their dtype faster (kernels/README.md)."""
    rows, is_bf16 = x.shape[:-1].numel(), x.dtype == torch.bfloat16
    if is_bf16 and not has_bf16_units():
        return rows * weight.numel() < THREADED
    return weight.numel() < SMALL or rows > MOST_ROWS or (is_bf16 and 4 < rows < 16)


@functools.cache
def has_bf16_units() -> bool:
    """Return True if torch can use AVX-512's BF16 products; ONEDNN_MAX_CPU_ISA may forbid it."""
    return torch.cpu._is_avx512_bf16_supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ


def attention_step(x: Tensor, weights: Any, cache: Any, cos_sin: tuple[Tensor, Tensor], starts: Tensor) -> Tensor:
    """Return what attention(norm(x)) adds to x, added, and append the new rows to the cache."""
    step = _Step(x, starts, x.shape[:2])
    step.half(step.attention, weights, cache, cos_sin)
    return step.run()


def feed_forward_step(x: Tensor, weights: Any, tokens: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return what FFN(norm(x)) adds to x, added, and the indices, weights, scores and counts of the routing."""
    step, (routing,) = _Step(x, None, (1, len(x))), _routings([weights], len(x))
    step.half(step.feed_forward, weights, routing, tokens)
    return (step.run(), *routing)


def blocks_step(
    x: Tensor,
    blocks: Sequence[Any],
    caches: Sequence[Any],
    angles: Mapping[Any, tuple[Tensor, Tensor]],
    starts: Tensor,
    tokens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return x after all blocks, and the four tensors of the routing of each block with a gate."""
    step, n = _Step(x, starts, x.shape[:2]), x.shape[:2].numel()
    routings = _routings([feed_forward for _, feed_forward in blocks if "gate" in feed_forward.weights], n)
    unused, ids = iter(routings), None if tokens is None else tokens.flatten().to(torch.int64)
    for (attention, feed_forward), cache in zip(blocks, caches, strict=True):
        routing = next(unused) if "gate" in feed_forward.weights else ()
        step.half(step.attention, attention, cache, angles[attention.layer.rope])
        step.half(step.feed_forward, feed_forward, routing, ids)
    return (step.run(), *(t for routing in routings for t in routing))


class _Step:
    """The calls of a step for tokens [b, s, *streams, m]. It holds the tensors that they read and write."""

    def __init__(self, x: Tensor, starts: Tensor | None, shape: Sequence[int]) -> None:
        (b, s), dim = shape, x.shape[-1]
        self.tokens = b * s
        if x.dtype != torch.float32 or self.tokens > MOST_TOKENS:
            raise Unserved(f"{list(x.shape)} tokens of {x.dtype}")
        self.x = detached(x).contiguous()
        self.starts = None if starts is None else starts.to(torch.int64).contiguous()
        self.held, self.calls = list[Any](), list[tuple[str, bytes]]()
        self.angles: tuple[Any, ...] = (None,)
        self.fields: dict[str, Any] = {"threads": n_threads(), "b": b, "s": s, "dim": dim, "starts": span(self.starts)}
        # states of one stream go from one half of a block to the next in turns; several streams stay where they are
        several = self.x.numel() > self.tokens * dim
        self.states = self.x.clone() if several else self.x.new_empty(2, *self.x.shape)
        self.between = self.x.new_empty(2, b * s, dim) if several else self.states
        self.spans = [span(t) for t in self.between]
        self.streams = self.described_streams(b * s, x.shape[-2], dim) if several else None

    def run(self) -> Tensor:
        """Run all calls, one after another, and return the states after them."""
        enter("blocks", b"".join(STEP_HEADERS[function] + call for function, call in self.calls))
        return self.states if self.streams else self.states[(len(self.calls) - 1) % 2]

    def half(self, describe: Callable[..., tuple[str, bytes]], weights: Any, *others: Any) -> None:
        """Add the calls of half a block: of a layer, and those that read residual streams and write to them."""
        if self.streams is None:
            after = self.spans[len(self.calls) % 2]
            before = self.spans[(len(self.calls) - 1) % 2] if self.calls else span(self.x)
            return self.calls.append(describe(before, after, True, weights, *others))
        residual, mixed = weights.residual, len(weights.weights["hc.scale"]) == 3
        fields = self.streams | {name: vector(weights.weights[f"hc.{name}"]) for name in ("fn", "base", "scale")}
        fields |= {"iterations": residual.sinkhorn_iters if mixed else 0, "norm_eps": residual.norm_eps}
        fields |= {"eps": residual.eps, "post_eps": 0.0 if mixed else residual.eps}
        of_layer = describe(*self.spans, False, weights, *others)
        pack = CALLS["stream_step"].pack
        around = [pack(**fields, y=y, write=write) for write, y in enumerate(self.spans)]
        self.calls += [("stream_step", around[0]), of_layer, ("stream_step", around[1])]
        return None

    def described_streams(self, n: int, streams: int, dim: int) -> dict[str, Any]:
        """Return the fields of residual streams that all layers have in common."""
        if streams > LIMITS["MOST_STEP_STREAMS"]:
            raise Unserved(f"{streams} residual streams")
        self.held += [self.x.new_empty(n, streams), self.x.new_empty(n, streams, streams)]
        post, comb = map(span, self.held)
        sizes = {"threads": self.fields["threads"], "n": n, "dim": dim, "streams": streams}
        return {**sizes, "x": span(self.states), "post": post, "comb": comb}

    def attention(
        self, x: bytes, y: bytes, added: bool, weights: Any, cache: Any, cos_sin: tuple[Tensor, Tensor]
    ) -> tuple[str, bytes]:
        """Return the function and the call of an attention of any kind, from states at x to those at y."""
        function, prepared = _prepared(weights, _prepare_attention)
        store, fields = cache.store, self.fields
        fields["x"], fields["y"] = x, y
        if self.angles[0] is not cos_sin:  # which most layers share
            self.angles = cos_sin, *(t.float().contiguous() for t in cos_sin)
            self.held.append(self.angles)
            fields["cos"], fields["sin"] = map(span, self.angles[1:])
        cos = self.angles[1]
        if function == "compressed_attention":
            fields |= self.compressed(cache, cos.shape[-2]) | {"bf16": weights.dtype == torch.bfloat16, "added": added}
            return function, COMPRESSED_STEP.pack_all(fields) + prepared
        fields["room"], fields["cos_sin_batch"] = store.data.shape[1], cos.shape[0] if cos.dim() == 3 else 1
        _set_cache(fields, "cache", store.data, 2 if function == "grouped_attention" else 3)
        _set_cache(fields, "index_cache", None if store.index is None else store.index.data, 2)
        return function, ATTENTION_STEP.pack_all(fields) + prepared

    def feed_forward(
        self, x: bytes, y: bytes, added: bool, weights: Any, routing: Sequence[Tensor], tokens: Tensor | None
    ) -> tuple[str, bytes]:
        """Return the function and the call of a feed-forward, from states [n, m] at x to those at y."""
        function, prepared = _prepared(weights, _prepare_feed_forward)
        ids = None if tokens is None else tokens.to(torch.int64).contiguous()
        self.held.append(ids)
        indices, scales, scores, counts = map(span, routing) if routing else (b"",) * 4
        fields = {"threads": self.fields["threads"], "n": self.tokens, "dim": self.fields["dim"], "x": x, "y": y}
        fields |= {"indices": indices, "weights": scales, "scores": scores, "counts": counts}
        fields |= {"tokens": span(ids), "added": added}
        return function, FEED_FORWARD_STEP.pack_all(fields) + prepared

    def compressed(self, cache: Any, positions: int) -> dict[str, Any]:
        """Return the fields of V4's attention: its stores, and the number of tokens among the columns of each row."""
        counts = cache.at.lengths.to(torch.int64) - self.starts
        self.held.append(counts)
        stores = {"entries": cache.store, "keys": cache.store.index}
        return {
            **{"positions": positions, "counts": span(counts), "latest": _ring(cache.store.window)},
            **{name: _block_rows(store) for name, store in stores.items()},
        }


def _ring(rows: Any) -> bytes:
    """Describe the rows of a cache that a step writes."""
    held, described = key_rows(rows, rows.data.shape[1])
    if held is not rows.data:
        raise Unserved(f"a cache with strides {list(rows.data.stride())}")
    return described


def _block_rows(store: Any) -> bytes:
    """Describe what a layer or its indexer stores of blocks."""
    if not hasattr(store, "raw"):
        return b""
    raw = store.raw.data
    return LAYOUTS["BlockRows"].pack(made=_ring(store.entries), raw=vector(raw), raw_places=raw.shape[1])


def key_rows(rows: Any, n: int) -> tuple[Tensor, bytes]:
    """Describe the first n rows of each sequence of a tensor [b, t, width], or of a cache, and return what holds them.

    Raises: Unserved for numbers in another format.
    """
    data = detached(rows if isinstance(rows, Tensor) else rows.data)
    if data.stride(2) != 1:
        data = data.contiguous()
    codes = tile = 0
    if data.dtype != torch.uint8 or isinstance(rows, Tensor):
        kind = entry_of(NUMBER_TYPES, data.dtype, "rows of")
    else:
        kind, codes, tile = _codes_of(rows.codec)
    size = data.element_size()
    batch, row = (size * data.stride(i) if data.shape[i] > 1 else 0 for i in (0, 1))
    row = row or size * data.shape[2]
    at = strided(data)
    return data, LAYOUTS["KeyRows"].pack(data=at, type=kind, count=n, batch=batch, row=row, codes=codes, tile=tile)


def _codes_of(codec: Any) -> tuple[int, int, int]:
    """Return the type of rows of bytes, their numbers with codes, and how many of these share a scale."""
    if codec.format == "e2m1":
        return FP4_KEYS, codec.unrotated, codec.tile
    if codec.stored != torch.float8_e8m0fnu:
        raise Unserved(f"rows in FP8 with scales in {codec.stored}")
    return FP8_KEYS, codec.unrotated, codec.tile


def _set_cache(fields: dict[str, Any], name: str, data: Tensor | None, types: int) -> None:
    """Set the fields of a cache [b, t, row], which may have the first types of CACHE_TYPES."""
    if data is None:
        at, kind, row = b"", 0, 0
    else:
        kind = CACHE_TYPES.get(data.dtype, types)
        if kind >= types or not data.is_contiguous() or not data.is_cpu:
            raise Unserved(f"{name} of {data.dtype} on {data.device}, or not contiguous")
        at, row = span(data), data.shape[2] * data.element_size()
    fields[name], fields[f"{name}_type"], fields[f"{name}_row"] = at, kind, row


def _routings(gated: Sequence[Any], n: int) -> list[tuple[Tensor, ...]]:
    """Return memory for the indices, weights, scores and counts of n tokens, for each of these feed-forwards."""
    gates = [w.layer.gate for w in gated if "gate" in w.weights]
    sizes = {(len(gate.weight), gate.options["n_activated_experts"]) for gate in gates}
    if len(sizes) > 1:
        raise Unserved("blocks with different numbers of experts")
    (e, k), count = sizes.pop() if sizes else (0, 0), len(gated)
    shapes = (((n, k), torch.int64), ((n, k), torch.float32), ((n, e), torch.float32), ((e,), torch.int64))
    of_all = [torch.empty(count, *shape, dtype=dtype, device="cpu") for shape, dtype in shapes]
    return [*zip(*(t.unbind() for t in of_all), strict=True)]


def _prepared(weights: Any, prepare: Callable[[Any], tuple[str, bytes]]) -> tuple[str, bytes]:
    """Return a layer's function and what its call has in all steps, made again if the weights' memory is elsewhere.

    share_memory() moves all of a model within its tensors, and torch.multiprocessing calls it for what it sends.
    """
    place = weights.weights["norm"].data_ptr()
    if place not in weights.prepared:
        weights.prepared.clear()  # what was made of memory that is gone
        weights.prepared[place] = prepare(weights)
    return weights.prepared[place]


def _prepare_attention(weights: Any) -> tuple[str, bytes]:
    """Describe an attention's weights to the C++."""
    kind, describe, w = "attention", _mla_weights, weights.weights
    if "wk" in w:
        kind, describe = "grouped_attention", _grouped_weights
    elif "wkv" in w:
        kind, describe = "compressed_attention", _compressed_weights
    both = [w[name] for name in ("wq_b", "wq", "indexer.wq_b") if name in w]
    if len({_weight_type(queries, weights.dtype) for queries in both}) > 1:
        raise Unserved("queries of attention and of its indexer from weights of different types")
    return kind, describe(weights, weights.layer, w)


def _grouped_weights(weights: Any, layer: Any, w: dict[str, Any]) -> bytes:
    key_heads = layer.n_kv_heads
    return LAYOUTS["GroupedWeights"].pack(
        key_heads=key_heads,
        group=layer.n_heads // key_heads,
        width=w["wk"].shape[0] // key_heads,
        value=w["wv"].shape[0] // key_heads,
        norm=vector(w["norm"]),
        **{name: matrix(w[name], weights.dtype) for name in ("wq", "wk", "wv", "wo")},
        scale=layer.scale,
        eps=weights.norm.eps,
    )


def _mla_weights(weights: Any, layer: Any, w: dict[str, Any]) -> bytes:
    return LAYOUTS["MlaWeights"].pack(
        heads=layer.n_heads,
        nope=layer.qk_nope_head_dim,
        rope=layer.rope.dim,
        latent=layer.kv_lora_rank,
        value=layer.v_head_dim,
        q_rank=w["wq_a"].shape[0] if "wq_a" in w else 0,
        norm=vector(w["norm"]),
        q_norm=vector(w.get("q_norm")),
        kv_norm=vector(w["kv_norm"]),
        wq_a=matrix(w.get("wq_a"), weights.dtype),
        wq_b=matrix(w["wq_b" if "wq_b" in w else "wq"], weights.dtype),
        **{name: matrix(w[name], weights.dtype) for name in ("wkv_a", "wkv_b", "wo")},
        scale=layer.scale,
        eps=weights.norm.eps,
        q_eps=0.0 if layer.q_norm is None else layer.q_norm.eps,
        kv_eps=layer.kv_norm.eps,
        index=_indexer_weights(weights, layer.indexer, w) if "indexer.wk" in w else b"",
    )


def _indexer_weights(weights: Any, indexer: Any, w: dict[str, Any]) -> bytes:
    return LAYOUTS["Indexer"].pack(
        heads=indexer.n_heads,
        width=len(w["indexer.k_norm"]),
        topk=indexer.topk,
        halves=not indexer.interleaved,
        norm=vector(w["indexer.k_norm"]),
        bias=vector(w["indexer.k_norm.bias"]),
        wq=matrix(w["indexer.wq_b"], weights.dtype),
        wk=matrix(w["indexer.wk"], weights.dtype),
        weights=matrix(w["indexer.weights_proj"], weights.dtype),
        eps=indexer.k_norm.eps,
    )


def _compressed_weights(weights: Any, layer: Any, w: dict[str, Any]) -> bytes:
    index = layer.indexer
    tile, key_tile = weights.tiles if layer.qat else (0, 0)
    return LAYOUTS["CompressedWeights"].pack(
        heads=layer.n_heads,
        width=layer.head_dim,
        rope=layer.rope.dim,
        q_rank=w["wq_a"].shape[0],
        groups=layer.groups,
        rank=w["wo_a"].shape[0] // layer.groups,
        window=layer.window_size,
        ratio=layer.m,
        series=1 if layer.compressor is None else layer.compressor.series,
        tile=tile,
        key_tile=key_tile,
        **{name: vector(w[name]) for name in ("norm", "q_norm", "kv_norm")},
        sink=vector(w["attn_sink"]),
        **{name: matrix(w[name], weights.dtype) for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")},
        scale=layer.scale,
        eps=weights.norm.eps,
        q_eps=layer.q_norm.eps,
        kv_eps=layer.kv_norm.eps,
        head_eps=layer.eps,
        compressor=_compressor_weights(layer.compressor, "compressor", w),
        key_compressor=b"" if index is None else _compressor_weights(index.compressor, "indexer.compressor", w),
        index_heads=0 if index is None else index.n_heads,
        topk=0 if index is None else index.topk,
        index_wq=matrix(w.get("indexer.wq_b"), weights.dtype),
        index_weights=matrix(w.get("indexer.weights_proj")),
    )


def _compressor_weights(compressor: Any, name: str, w: dict[str, Any]) -> bytes:
    if compressor is None:
        return b""
    return LAYOUTS["CompressorWeights"].pack(
        numbers=compressor.d,
        wkv=matrix(w[f"{name}.wkv"]),
        wgate=matrix(w[f"{name}.wgate"]),
        bias=vector(w[f"{name}.ape"]),
        weight=vector(w[f"{name}.norm"]),
        epsilon=compressor.norm.eps,
    )


def _prepare_feed_forward(weights: Any) -> tuple[str, bytes]:
    """Describe a feed-forward's weights to the C++."""
    w, gated, names = weights.weights, "gate" in weights.weights, ("w1", "w2", "w3")
    dense = [w.get(f"shared_experts.{name}" if gated else name) for name in names]
    stacks = [w.get(f"experts.{name}") for name in names]
    for first, _, third in (dense, stacks):
        if first is not None and _weight_type(first, weights.dtype) != _weight_type(third, weights.dtype):
            raise Unserved("w1 and w3 of different types")
    options, table = weights.layer.gate.options if gated else {}, w.get("gate.tid2eid")
    limit = (weights.layer.experts if gated else weights.layer).limit
    score = entry_of(SCORES, options.get("score_func", "sigmoid"), "a score function of its own,")
    experts, expert_inter = stacks[0].shape[:2] if gated else (0, 0)
    topk = options.get("n_activated_experts", 0)
    if experts > LIMITS["MOST_EXPERTS"]:
        raise Unserved(f"{experts} experts")
    packed = LAYOUTS["FeedForwardWeights"].pack(
        inter=0 if dense[0] is None else dense[0].shape[0],
        experts=experts,
        expert_inter=expert_inter,
        k=topk,
        groups=options.get("n_expert_groups", 1),
        kept_groups=options.get("n_limited_groups", 1),
        score=score,
        normed=options.get("norm_topk_prob", False),
        norm=vector(w["norm"]),
        gate=vector(w.get("gate")),
        bias=vector(w.get("gate.bias")),
        vocabulary=0 if table is None else len(table),
        table=span(table),
        **{
            name: matrix(x, weights.dtype)
            for name, x in zip(("w1", "w2", "w3", "e1", "e2", "e3"), (*dense, *stacks), strict=True)
        },
        eps=weights.norm.eps,
        route_scale=options.get("route_scale", 1.0),
        limit=math.inf if limit is None else limit,
    )
    return "feed_forward", packed


def vector(x: Tensor | None) -> bytes:
    """Return the Span of a tensor that is read or written where it lies, such as the weight of a norm or a gate.

    Raises: Unserved if it is not contiguous FP32.
    """
    if x is not None and (x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous()):
        raise Unserved(f"numbers in {x.dtype} on {x.device}, or numbers that are not contiguous")
    return span(x)


def weight_matrix(weight: Any, dtype: torch.dtype = torch.float32) -> bytes:
    """Describe a weight whose gradient is not asked for.

    Raises: Unserved as `matrix` does, and for a weight that is not the numbers in its memory.
    """
    if isinstance(weight, Tensor):
        if weight.is_neg():  # its numbers would be a copy, which nobody holds while the C++ runs
            raise Unserved("a weight whose sign is not in its memory")
        detached(weight)
    return matrix(weight, dtype)


def matrix(weight: Any, dtype: torch.dtype = torch.float32) -> bytes:
    """Describe a weight [o, i], or a stack of weights [e, o, i] as one of e * o rows. None is a Matrix of zeros.

    Args:
        dtype: of products with codes.

    Raises: Unserved for another dtype, tile or layout.
    """
    if weight is None:
        return b""
    data, scales = (weight, None) if isinstance(weight, Tensor) else weight.parts
    plain = type(data) in (Tensor, torch.nn.Parameter) and data.layout is torch.strided
    if not data.is_cpu or not plain or not (scales is None or scales.is_contiguous()):
        raise Unserved(f"a weight of {data.dtype} on {data.device}, a {type(data).__name__}")
    columns = data.shape[-1]
    apart = data.dim() >= 2 and (data.shape[-2] < 2 or data.stride(-2) >= columns)
    if not apart or data.stride(-1) != 1 or (data.dim() > 2 and not data.is_contiguous()):
        raise Unserved(f"a weight with strides {list(data.stride())}")
    stride = data.stride(-2) if data.shape[-2] > 1 else columns
    return LAYOUTS["Matrix"].pack(
        data=strided(data),
        type=_weight_type(weight, dtype),
        rows=weight.shape[:-1].numel(),
        columns=weight.shape[-1],
        stride=stride * data.element_size(),
        scales=span(scales),
    )


def _weight_type(weight: Any, dtype: torch.dtype) -> int:
    """Return the number of a weight's type, where products with codes are in this dtype.

    Raises: Unserved for another dtype or format.
    """
    if isinstance(weight, Tensor):
        return entry_of(NUMBER_TYPES, weight.dtype, "a weight of")
    kind = weight.format, weight.tile, weight.scales.dtype
    return entry_of(CODE_TYPES, kind, "codes with the format, tile and scales") + (dtype == torch.bfloat16)
