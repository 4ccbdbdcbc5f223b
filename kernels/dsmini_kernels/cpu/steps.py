"""Products, and the parts of a decoding step: checks, and the description of a call for the C++.

A weight is a tensor in FP32 or BF16, or E4M3 codes with FP32 scales of 128x128 blocks. It is read where it lies.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.build import BLOCKS, HEADER, STRUCTS
from dsmini_kernels.cpu.calls import enter, run
from dsmini_kernels.cpu.tiles import span

MOST_TOKENS = 32
"""Number of tokens of a decoding step up to which a product reads each weight once and is bound by memory."""
MOST_THREADS = 256
MOST_ROWS = 1024
"""Number of rows up to which a product is at least as fast as torch's."""
SMALL = 1 << 15
"""Number of weights below which a call of torch's product costs less, where its threads find their cores free."""
THREADED = 1 << 16
"""Number of multiplications from which two threads are faster than one, and the kernel is faster than torch's BF16
product without BF16 units."""
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
CODES_IN_BF16 = 3
"""Type of codes whose products are in BF16."""
CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
SCORES = {"sigmoid": 0, "softmax": 1}
NONE = (0,) * 8
"""A Matrix that is not there."""
NO_INDEXER = (0,) * 36
INDEXER = ("k_norm", "k_norm.bias", "wq_b", "wk", "weights_proj")
"""Weights of an indexer: vectors, then matrices."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T. Sums are FP32."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        raise Unserved("codes in the place of a tensor")
    if x.dtype == weight.dtype and _torch_is_faster(x, weight):
        raise Unserved
    return quantized_linear(x, weight)


def quantized_linear(x: Tensor, weight: Any) -> Tensor:
    """Return x W^T, with a weight that may be codes. Sums are FP32."""
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.dim():
        raise Unserved(f"x of {x.dtype}")
    rows = x.shape[:-1].numel()
    if rows < 1:
        raise Unserved
    x = detached(x).contiguous()
    w = weight_matrix(weight, x.dtype)
    if x.shape[-1] == 0:
        raise Unserved
    if x.shape[-1] != w[4] or len(weight.shape) != 2:
        raise Unserved(f"x of shape {list(x.shape)} for a weight of {list(weight.shape)}")
    y = x.new_empty(*x.shape[:-1], w[3])
    threads = n_threads() if weight.shape.numel() * rows >= THREADED else 1
    run("linear", (threads, rows, x.dtype == torch.bfloat16, *span(x), *span(y), *w))
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


class _Step(NamedTuple):
    """What all calls of a step read: its tokens, their angles and starts. The tensors stay until the calls have run."""

    x: Tensor
    threads: int
    angles: tuple[int, ...]
    starts: tuple[int, int]
    held: tuple[Tensor, ...]


def _step(x: Tensor, table: tuple[Tensor, Tensor], starts: Tensor) -> _Step:
    if x.dtype != torch.float32 or x.shape[0] * x.shape[1] > MOST_TOKENS:
        raise Unserved(f"{list(x.shape)} tokens of {x.dtype}")
    x = detached(x).contiguous()
    cos, sin = (t if t.is_contiguous() and t.dtype == torch.float32 else t.float().contiguous() for t in table)
    starts = starts.to(torch.int64).contiguous()
    angles = (cos.data_ptr(), sin.data_ptr(), 4 * min(cos.numel(), sin.numel()), cos.shape[0] if cos.dim() == 3 else 1)
    return _Step(x, n_threads(), angles, span(starts), (cos, sin, starts))


def attention_step(x: Tensor, part: Any, past: Any, table: tuple[Tensor, Tensor], starts: Tensor) -> Tensor:
    """Return x + MLA(norm(x)), absorbed, and append the new rows to the cache."""
    step = _step(x, table, starts)
    y = torch.empty_like(step.x)
    run("attention", _attention_call(step, step.x.data_ptr(), y.data_ptr(), part, past))
    return y


def grouped_attention_step(x: Tensor, part: Any, past: Any, table: tuple[Tensor, Tensor], starts: Tensor) -> Tensor:
    """Return x + Attention(norm(x)) of MHA, GQA or MQA, and append the new rows to the cache."""
    step = _step(x, table, starts)
    y = torch.empty_like(step.x)
    run("grouped", _attention_call(step, step.x.data_ptr(), y.data_ptr(), part, past))
    return y


def feed_forward_step(x: Tensor, part: Any) -> tuple[Tensor, ...]:
    """Return x + FFN(norm(x)), and the indices, weights, scores and counts of the routing."""
    if x.dtype != torch.float32 or x.shape[0] > MOST_TOKENS:
        raise Unserved(f"{x.shape[0]} tokens of {x.dtype}")
    x = detached(x).contiguous()
    y, (routing,) = torch.empty_like(x), _routing([part], len(x))
    run("feed_forward", _feed_forward_call(n_threads(), x.shape, x.data_ptr(), y.data_ptr(), part, routing))
    return (y, *routing)


def blocks_step(
    x: Tensor, blocks: Sequence[Any], pasts: Sequence[Any], table: tuple[Tensor, Tensor], starts: Tensor
) -> tuple[Tensor, ...]:
    """Return x after all blocks, and the four tensors of the routing of each block with a gate."""
    step, calls = _step(x, table, starts), list[tuple[str, tuple[Any, ...]]]()
    between, y = step.x.new_empty(2, x.shape[:-1].numel(), x.shape[-1]), torch.empty_like(step.x)
    at, middle, end = step.x.data_ptr(), between[0].data_ptr(), between[1].data_ptr()
    routing = _routing([part for _, part in blocks if "gate" in part.weights], between.shape[1])
    chosen = iter(routing)
    for i, ((attention, part), past) in enumerate(zip(blocks, pasts, strict=True)):
        to = y.data_ptr() if i + 1 == len(blocks) else end
        entry = "grouped" if "wk" in attention.weights else "attention"
        calls.append((entry, _attention_call(step, at, middle, attention, past)))
        of_part = next(chosen) if "gate" in part.weights else ()
        call = _feed_forward_call(step.threads, between.shape[1:], middle, to, part, of_part)
        calls.append(("feed_forward", call))
        at = to
    packed = (HEADER.pack(BLOCKS.index(e), STRUCTS[e].size) + STRUCTS[e].pack(*call) for e, call in calls)
    enter("blocks", b"".join(packed))
    return (y, *(t for of_part in routing for t in of_part))


def _attention_call(step: _Step, x: int, y: int, part: Any, past: Any) -> tuple[Any, ...]:
    """Describe an attention to new tokens, of any kind, to the C++: from states at address x to those at y."""
    data, nbytes = past.store.data, 4 * step.x.numel()
    sizes, norms, weights, numbers = part.prepared.get("cpu") or _prepared_attention(part)
    if data.dtype not in CACHE_TYPES or not data.is_contiguous() or not data.is_cpu:
        raise Unserved(f"a cache of {data.dtype} on {data.device} that may not be contiguous")
    if data.dtype == torch.uint8 and "wk" in part.weights:
        raise Unserved("keys and values in FP8")
    index = () if "wk" in part.weights else _index_call(part, past.store.index)
    return (
        *(step.threads, *step.x.shape, *sizes, x, nbytes, y, nbytes, *norms, *step.angles, *span(data)),
        *(CACHE_TYPES[data.dtype], data.shape[2] * data.element_size(), data.shape[1], *step.starts),
        *(*weights, *index, *numbers),
    )


def _index_call(part: Any, store: Any) -> tuple[int, ...]:
    """Describe an indexer and the cache of its keys to the C++."""
    if "indexer.wk" not in part.weights:
        return NO_INDEXER
    data, indexer = store.data, part.layer.indexer
    norm_weight, *others = (part.weights[f"indexer.{name}"] for name in INDEXER)
    if data.dtype not in (torch.float32, torch.bfloat16) or not data.is_contiguous() or not data.is_cpu:
        raise Unserved(f"keys of an indexer in {data.dtype} on {data.device}")
    (norm, bias, *sizes), (at, size) = vectors(norm_weight, others[0]), span(data)
    matrices = _matrices(others[1:], part.dtype)
    cache = (at, size, CACHE_TYPES[data.dtype], data.shape[2] * data.element_size())
    halves = int(not indexer.interleaved)
    return (indexer.n_heads, len(norm_weight), indexer.topk, halves, norm, bias, *sizes, *cache, *matrices)


def _routing(gated: Sequence[Any], n: int) -> list[tuple[Tensor, ...]]:
    """Return memory for the indices, weights, scores and counts of n tokens, for each of these feed-forwards."""
    sizes = {(part.prepared.get("cpu") or _prepared_feed_forward(part))[0][1:4:2] for part in gated}
    if len(sizes) > 1:
        raise Unserved("blocks with different numbers of experts")
    (e, k), count = sizes.pop() if sizes else (0, 0), len(gated)
    shapes = (((n, k), torch.int64), ((n, k), torch.float32), ((n, e), torch.float32), ((e,), torch.int64))
    of_all = [torch.empty(count, *shape, dtype=dtype) for shape, dtype in shapes]
    return [*zip(*(t.unbind() for t in of_all), strict=True)]


def _feed_forward_call(
    threads: int, shape: torch.Size, x: int, y: int, part: Any, routing: Sequence[Tensor]
) -> tuple[Any, ...]:
    """Describe a feed-forward to the C++: from states [n, m] at address x to those at y."""
    n, m = shape
    sizes, inputs, weights, numbers = part.prepared.get("cpu") or _prepared_feed_forward(part)
    _, e, _, k, *_ = sizes
    at = (t.data_ptr() for t in routing) if routing else (0,) * 4
    outs = (8 * n * k, 4 * n * k, 4 * n * e, 8 * e)
    return (threads, n, m, *sizes, x, 4 * n * m, y, 4 * n * m, *inputs, *at, *outs, *weights, *numbers)


Prepared = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[float, ...]]
"""Sizes, addresses and bytes of vectors, matrices, and numbers. The part keeps the tensors where they are."""


def _prepared_attention(part: Any) -> Prepared:
    """Describe a part to the C++, once."""
    layer, w, eps = part.layer, part.weights, part.norm.eps
    if "wk" in part.weights:
        heads, groups = layer.n_heads, layer.n_kv_heads
        sizes = (groups, heads // groups, w["wk"].shape[0] // groups, w["wv"].shape[0] // groups)
        names, norms, numbers = ("wq", "wk", "wv", "wo"), ("norm",), (layer.scale, eps)
    else:
        indexer, norms = getattr(layer, "indexer", None), ("norm", "q_norm", "kv_norm")
        query = "wq_b" if "wq_b" in w else "wq"
        if indexer is not None and len({matrix(w[name], part.dtype)[2] for name in (query, "indexer.wq_b")}) > 1:
            raise Unserved("queries of MLA and of its indexer from weights of different types")
        q_rank = w["wq_a"].shape[0] if "wq_a" in w else 0
        sizes = (layer.n_heads, layer.qk_nope_head_dim, layer.rope.dim, layer.kv_lora_rank, layer.v_head_dim, q_rank)
        names = ("wq_a", query, "wkv_a", "wkv_b", "wo")
        q_eps = 0.0 if layer.q_norm is None else layer.q_norm.eps
        numbers = (layer.scale, eps, q_eps, layer.kv_norm.eps, 0.0 if indexer is None else indexer.k_norm.eps)
    matrices = _matrices([w.get(name) for name in names], part.dtype)
    part.prepared["cpu"] = sizes, vectors(*(w.get(name) for name in norms)), matrices, numbers
    return part.prepared["cpu"]


def _prepared_feed_forward(part: Any) -> Prepared:
    """Describe a part to the C++, once."""
    w, gated, options = part.weights, "gate" in part.weights, {}
    w1, w2, w3 = (w.get(f"shared_experts.{name}" if gated else name) for name in ("w1", "w2", "w3"))
    e1, e2, e3 = (w.get(f"experts.{name}") for name in ("w1", "w2", "w3"))
    sizes = (0 if w1 is None else w1.shape[0], 0, 0, 0, 1, 1, 0, 0)
    if gated:
        options = part.layer.gate.options
        if options["score_func"] not in SCORES:
            raise Unserved("a score function of its own")
        groups = (options["n_expert_groups"], options["n_limited_groups"])
        how = (*groups, SCORES[options["score_func"]], int(options["norm_topk_prob"]))
        sizes = (sizes[0], *e1.shape[:2], options["n_activated_experts"], *how)
    for first, third in ((w1, w3), (e1, e3)):
        if type(first) is not type(third) or (first is not None and first.dtype != third.dtype):
            raise Unserved("w1 and w3 of different types")
    numbers = (part.norm.eps, options.get("route_scale", 1.0))
    inputs = vectors(w["norm"], w.get("gate"), w.get("gate.bias"))
    part.prepared["cpu"] = sizes, inputs, _matrices((w1, w2, w3, e1, e2, e3), part.dtype), numbers
    return part.prepared["cpu"]


def vectors(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the addresses of FP32 tensors, and then their bytes."""
    for x in tensors:
        if x is not None and (x.dtype != torch.float32 or not x.is_contiguous() or not x.is_cpu):
            raise Unserved(f"a norm or gate in {x.dtype} on {x.device}")
    spans = [span(x) for x in tensors]
    return (*(at for at, _ in spans), *(size for _, size in spans))


def _matrices(weights: Sequence[Any], dtype: torch.dtype) -> tuple[int, ...]:
    return tuple(number for w in weights for number in (NONE if w is None else matrix(w, dtype)))


def n_threads() -> int:
    """Return torch's number of threads, limited to the C++'s maximum."""
    return min(torch.get_num_threads(), MOST_THREADS)


def weight_matrix(weight: Any, dtype: torch.dtype = torch.float32) -> tuple[int, ...]:
    """Describe a weight whose gradient is not asked for.

    Raises: Unserved as `matrix` does, and for a weight that is not the numbers in its memory.
    """
    if isinstance(weight, Tensor):
        if weight.is_neg():  # its numbers would be a copy, which nobody holds while the C++ runs
            raise Unserved("a weight whose sign is not in its memory")
        detached(weight)
    return matrix(weight, dtype)


def matrix(weight: Any, dtype: torch.dtype = torch.float32) -> tuple[int, ...]:
    """Describe a weight [o, i], or a stack of weights [e, o, i] as one of e * o rows.

    Args:
        dtype: of products with codes.

    Raises: Unserved for another dtype, tile or layout.
    """
    data = weight if isinstance(weight, Tensor) else weight.codes
    scales = None if isinstance(weight, Tensor) else weight.scales
    plain = type(data) in (Tensor, torch.nn.Parameter) and data.layout is torch.strided
    if data.dtype not in WEIGHT_TYPES or not data.is_cpu or not plain:
        raise Unserved(f"a weight of {data.dtype} on {data.device}, a {type(data).__name__}")
    if (scales is None) == (data.dtype == torch.float8_e4m3fn):
        raise Unserved(f"a weight of {data.dtype} {'without' if scales is None else 'with'} scales")
    if scales is not None and (
        weight.tile != (128, 128) or scales.dtype != torch.float32 or not scales.is_contiguous()
    ):
        raise Unserved(f"scales of {scales.dtype} for tiles of {weight.tile}")
    rows = data.numel() // max(1, data.shape[-1])
    apart = data.dim() >= 2 and (data.shape[-2] < 2 or data.stride(-2) >= data.shape[-1])
    if not apart or data.stride(-1) != 1 or (data.dim() > 2 and not data.is_contiguous()):
        raise Unserved(f"a weight with strides {list(data.stride())}")
    size = data.element_size()
    stride = size * (data.stride(-2) if data.shape[-2] > 1 else data.shape[-1])
    memory = int(data.untyped_storage().nbytes() - data.storage_offset() * size)
    kind = WEIGHT_TYPES[data.dtype] if scales is None or dtype != torch.bfloat16 else CODES_IN_BF16
    return (data.data_ptr(), memory, kind, rows, data.shape[-1], stride, *span(scales))


def detached(x: Tensor) -> Tensor:
    """Return x as numbers in main memory.

    Raises: Unserved where that is not all that it is.
    """
    if not x.is_cpu or x.layout is not torch.strided:
        raise Unserved(f"a tensor on {x.device}")
    if torch.is_autocast_enabled("cpu"):
        raise Unserved("autocast, which changes dtypes")
    if x.requires_grad and torch.is_grad_enabled():
        raise Unserved("kernels have no gradients, and this tensor wants one")
    return x.resolve_neg()
