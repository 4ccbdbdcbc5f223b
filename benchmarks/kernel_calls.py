"""Calls of the CPU kernels as a real model makes them, with operands that take turns, so that no cache holds them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.case import Setting
from dsmini import ModelConfig, QuantizedTensor, Transformer, quantize
from dsmini.functional import trained_experts as training
from dsmini.inference.fused.weights import extract_weights
from dsmini.measure.workloads import random_cache, random_model, random_tokens
from dsmini.nn import RMSNorm
from dsmini.nn.cache import CacheDtype
from dsmini.numerics import AMAX_MIN, WEIGHT_TILE
from dsmini.numerics.orthogonalize import JORDAN, MuonMatrices

CACHES = 4
"""Total size of the operands that take turns, as a multiple of the last-level cache."""
MOST_BYTES = 2 << 30
"""Limit of that size, for machines with very large caches."""
ACTIVATIONS, QUICK_ACTIVATIONS = (2048, 7168), (512, 7168)
"""Shapes of the matrices to quantize, as wide as DeepSeek-V3's hidden states."""
BATCH = 8
"""Rows of the calls with several rows, as 8 sequences decode together."""
NAMES: Mapping[Any, str] = {torch.float32: "FP32", torch.bfloat16: "BF16", "fp8": "FP8"}
Operands = Sequence[tuple[Any, ...]]


class Calls(NamedTuple):
    """Calls of one operation that differ in their numbers alone."""

    operands: str
    """Description, such as "BF16 2816x1024"."""
    rows: int
    """Number of rows or tokens."""
    turns: Operands
    """Arguments of each call. The next call takes the next ones."""
    keywords: Mapping[str, Any] = {}
    in_place: bool = False
    """True for calls that change their operands and return nothing."""
    close: float = 1e-3
    """Largest relative error of a result that is not bit-equal. Sums run in another order, in FP32, and a code of an
    FP8 cache's new row may flip."""


def turns(setting: Setting, nbytes: int) -> int:
    """Return the number of operands of this size that no cache holds together: at least two."""
    return max(2, math.ceil(min(CACHES * setting.roofs.cache_bytes, MOST_BYTES) / nbytes))


def linear(setting: Setting) -> Iterator[Calls]:
    """Yield products of FP32 rows with weights in FP32 and BF16, as a decoding step makes them."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in _matrices(setting):
            n = turns(setting, math.prod(shape) * dtype.itemsize)
            weight = torch.randn(shape).div_(shape[1] ** 0.5).to(dtype)
            yield from _products(NAMES[dtype], shape, [_copy(weight) for _ in range(n)])


def quantized_linear(setting: Setting) -> Iterator[Calls]:
    """Yield products of FP32 rows with weights in FP8."""
    for shape in _matrices(setting):
        n = turns(setting, math.prod(shape))
        weight = quantize(torch.randn(shape) / shape[1] ** 0.5, WEIGHT_TILE, "fp32")
        yield from _products(NAMES["fp8"], shape, [_copy(weight) for _ in range(n)])


def _matrices(setting: Setting) -> list[tuple[int, int]]:
    """Return the shapes [o, i] of a feed-forward's w1 and of the head."""
    config = shapes.wide(setting.quick)
    return [(config.inter_dim, config.dim), (config.vocab_size, config.dim)]


def _products(name: str, shape: tuple[int, int], weights: Sequence[Any]) -> Iterator[Calls]:
    for rows in (1, BATCH):
        yield Calls(f"{name} {shape[0]}x{shape[1]}", rows, [(torch.randn(rows, shape[1]), w) for w in weights])


def attention_step(setting: Setting) -> Iterator[Calls]:
    """Yield attention of one and of several sequences to caches in BF16 and FP8."""
    far = 1024 if setting.quick else 8192
    config = dataclasses.replace(shapes.wide(setting.quick), vocab_size=128, n_layers=1, inter_dim=128)
    model = random_model(config, setting.device, torch.bfloat16)
    for weights in (torch.bfloat16, "fp8"):
        part = _part(model, 0, weights)
        parts = _copies(part, turns(setting, sum(t.nbytes for t in part.tensors)))
        for batch, context in ((1, 128), (1, far), (BATCH, 1024)):
            calls = [(torch.randn(batch, 1, config.dim), p, *_place(model, batch, context, weights)) for p in parts]
            yield Calls(f"{NAMES[weights]}, context {context}", batch, calls)


def _place(model: Transformer, batch: int, context: int, dtype: CacheDtype) -> tuple[Any, ...]:
    """Return a layer's filled cache, the rotary angles of a new token, and its positions."""
    views, cos_sin, starts = _cache(model, batch, context, dtype)
    return views[0], cos_sin, starts


def _cache(model: Transformer, batch: int, context: int, dtype: CacheDtype) -> tuple[Any, ...]:
    """Do the same for all layers."""
    cache = random_cache(model, batch, context, 64, dtype)
    at = cache.place(model.config, random_tokens(model.config, batch, 1, model.device))
    return cache.views(at), model.rope.cos_sin(at.positions), cache.lengths


def feed_forward_step(setting: Setting) -> Iterator[Calls]:
    """Yield dense and routed feed-forwards for one and for several tokens."""
    for name, dense in (("dense", 1), ("MoE", 0)):
        config = dataclasses.replace(shapes.wide(setting.quick), vocab_size=128, n_layers=1, n_dense_layers=dense)
        model = random_model(config, setting.device, torch.bfloat16)
        for weights in (torch.bfloat16, "fp8"):
            part = _part(model, 1, weights)
            parts = _copies(part, turns(setting, _visited_bytes(part, config)))
            for rows in (1, BATCH):
                # more than one x for each copy: other tokens choose other experts
                every = [
                    (torch.randn(rows, config.dim), p) for _, p in itertools.product(range(1 if dense else 4), parts)
                ]
                yield Calls(f"{NAMES[weights]} {name}", rows, every)


def experts(setting: Setting) -> Iterator[Calls]:
    """Yield routed experts in BF16 for the tokens of a short and of a longer prompt."""
    yield from _experts(setting, torch.bfloat16)


def quantized_experts(setting: Setting) -> Iterator[Calls]:
    """Yield routed experts in FP8 for the tokens of prompts."""
    yield from _experts(setting, "fp8")


def _experts(setting: Setting, weights: CacheDtype) -> Iterator[Calls]:
    c = dataclasses.replace(shapes.wide(setting.quick), vocab_size=128, n_layers=1, n_dense_layers=0)
    model = random_model(c, setting.device, torch.bfloat16)
    part = _part(model, 1, weights)
    matrices = [(p.e1, p.e2, p.e3) for p in _copies(part, turns(setting, sum(t.nbytes for t in part.tensors)))]
    gate = model.layers[0].ffn.gate
    for rows in (64, 512):
        every: list[tuple[Any, ...]] = []
        for w in matrices:
            x = torch.randn(rows, c.dim).bfloat16()
            chosen = gate(x)
            every.append((x, chosen.indices, chosen.weights, chosen.counts, *w))
        # the plain version rounds hidden numbers three times to BF16, the kernel once
        yield Calls(NAMES[weights], rows, every, close=0.02)


def trained_experts(setting: Setting) -> Iterator[Calls]:
    """Yield routed experts in the forward of training, with rows in BF16."""
    for calls in _trained(setting):
        yield Calls("BF16", len(calls[0][0]), calls, close=0.02)


def trained_experts_gradients(setting: Setting) -> Iterator[Calls]:
    """Yield the gradients of the same."""
    for calls in _trained(setting):
        every: list[tuple[Any, ...]] = []
        for call in calls:
            _, *kept = training.trained_experts(*call)
            every.append((torch.randn_like(call[0]), *call[:4], *kept, *call[4:]))
        yield Calls("BF16", len(calls[0][0]), every, close=0.02)


def _trained(setting: Setting) -> Iterator[list[tuple[Any, ...]]]:
    """Yield calls with the experts of a small model, in FP32, and rows of two sizes of a batch."""
    c = dataclasses.replace(shapes.TRAINED, n_layers=1, n_dense_layers=0)
    model = random_model(c, setting.device, torch.float32)
    gate, held = model.layers[0].ffn.gate, model.layers[0].ffn.experts
    matrices = [w.detach() for w in (held.w1, held.w2, held.w3)]
    for rows in (256,) if setting.quick else (256, 2048):
        every: list[tuple[Any, ...]] = []
        for _ in range(turns(setting, sum(w.nbytes for w in matrices))):
            x = torch.randn(rows, c.dim)
            chosen = gate(x)
            weights = chosen.weights.detach()
            every.append((x.bfloat16(), chosen.indices, weights, chosen.counts, *map(_copy, matrices)))
        yield every


def blocks_step(setting: Setting) -> Iterator[Calls]:
    """Yield all blocks of a decoding step of one sequence, with context 128."""
    config = dataclasses.replace(shapes.wide(setting.quick), vocab_size=128, n_layers=2)
    model = random_model(config, setting.device, torch.bfloat16)
    for weights in (torch.bfloat16, "fp8"):
        pairs = [tuple(_part(model, which, weights, block) for which in (0, 1)) for block in range(2)]
        size = sum(sum(t.nbytes for t in a.tensors) + _visited_bytes(f, config) for a, f in pairs)
        cache, table, starts = _cache(model, 1, 128, weights)
        copies = [_copies(part, turns(setting, size)) for pair in pairs for part in pair]
        every = [((a, b), (c, d)) for a, b, c, d in zip(*copies, strict=True)]
        calls = [(torch.randn(1, 1, config.dim), blocks, cache, table, starts) for blocks in every]
        yield Calls(f"{NAMES[weights]}, dense and MoE", 1, calls)


def grouped_attention_step(setting: Setting) -> Iterator[Calls]:
    """Yield attention of one sequence with a key and a value for each head, and for each group of two."""
    wide = shapes.wide(setting.quick)
    for kind, key_heads in (("mha", None), ("gqa", wide.n_heads // 2)):
        one = {"vocab_size": 128, "n_layers": 1, "inter_dim": 128, "q_lora_rank": None}
        config = dataclasses.replace(wide, attention=kind, n_kv_heads=key_heads, **one)
        model = random_model(config, setting.device, torch.bfloat16)
        part = _part(model, 0, torch.bfloat16)
        parts = _copies(part, turns(setting, sum(t.nbytes for t in part.tensors)))
        for context in (128, 1024 if setting.quick else 8192):
            calls = [(torch.randn(1, 1, config.dim), p, *_place(model, 1, context, torch.bfloat16)) for p in parts]
            yield Calls(f"{kind.upper()} in BF16, context {context}", 1, calls)


def normed(setting: Setting) -> Iterator[Calls]:
    """Yield the norm of one and of several states, and of two side by side as multi-token prediction joins them."""
    dim = shapes.wide(setting.quick).dim
    norm = RMSNorm(dim)
    for rows in (1, BATCH):
        xs = [torch.randn(2, rows, dim) for _ in range(turns(setting, 8 * rows * dim))]
        yield Calls("FP32", rows, [(x[0], norm) for x in xs])
        yield Calls("FP32, two of them", rows, [(x[0], norm, x[1], norm) for x in xs])


def _part(model: Transformer, which: int, weights: CacheDtype, block: int = 0) -> Any:
    """Return the weights of a model's block as a call takes them.

    Args:
        which: 0 for attention, 1 for the feed-forward.
        weights: "fp8" quantizes the matrices, except the gate.
    """
    parts = extract_weights(model.layers[block])  # pyright: ignore[reportArgumentType]
    assert parts is not None, "a plain block"
    if weights != "fp8":
        return parts[which]
    matrices = {name: w for name, w in _fields(parts[which]).items() if w.dim() > 1 and name != "gate"}
    quantized = {name: quantize(w, WEIGHT_TILE, "fp32") for name, w in matrices.items()}
    return dataclasses.replace(parts[which], **quantized)


def _copies(part: Any, n: int) -> list[Any]:
    """Return the same weights n times, in memory of their own."""
    fields = _fields(part)
    return [dataclasses.replace(part, prepared={}, **{k: _copy(w) for k, w in fields.items()}) for _ in range(n)]


def _copy(weight: Any) -> Any:
    if isinstance(weight, Tensor):
        return weight.clone()
    return dataclasses.replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())


def _fields(part: Any) -> dict[str, Any]:
    """Return the weights of a part by name."""
    held = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {name: value for name, value in held.items() if isinstance(value, Tensor | QuantizedTensor)}


def _visited_bytes(part: Any, config: ModelConfig) -> int:
    """Return the bytes of a feed-forward that a token reads: of the routed experts, those that it visits."""
    routed = sum(w.nbytes for w in (part.e1, part.e2, part.e3) if w is not None)
    whole = sum(t.nbytes for t in part.tensors)
    return whole - routed + routed * config.n_activated_experts // config.n_routed_experts


def _activations(setting: Setting) -> list[Tensor]:
    """Return matrices of activations as wide as DeepSeek-V3, in BF16."""
    shape = QUICK_ACTIVATIONS if setting.quick else ACTIVATIONS
    return [torch.randn(shape).bfloat16() for _ in range(turns(setting, 2 * math.prod(shape)))]


def quantize_tiles(setting: Setting) -> Iterator[Calls]:
    """Yield the quantization of activations and of weights."""
    xs = _activations(setting)
    for tile in ((1, 128), (128, 128)):
        yield Calls(f"BF16, {tile[0]}x{tile[1]}", len(xs[0]), [(x, tile, "fp32", "e4m3", AMAX_MIN) for x in xs])


def dequantize_tiles(setting: Setting) -> Iterator[Calls]:
    """Yield the dequantization of activations and of weights to BF16."""
    xs = _activations(setting)
    for tile in ((1, 128), (128, 128)):
        made = [quantize(x, tile, "fp32") for x in xs]
        yield Calls(
            f"BF16, {tile[0]}x{tile[1]}", len(xs[0]), [(q.codes, q.scales, tile, "e4m3", torch.bfloat16) for q in made]
        )


def round_tiles(setting: Setting) -> Iterator[Calls]:
    """Yield the rounding of activations and of weights, as simulated FP8 does it."""
    xs = _activations(setting)
    for tile, scale in (((1, 128), "ue8m0"), ((128, 128), "fp32")):
        calls = [(x, tile, scale, "e4m3", AMAX_MIN, torch.bfloat16) for x in xs]
        yield Calls(f"BF16, {tile[0]}x{tile[1]}", len(xs[0]), calls)


def muon_update(setting: Setting) -> Iterator[Calls]:
    """Yield updates of the experts of a small model, with products in FP32 and BF16."""
    experts, o, i = (4, 64, 96) if setting.quick else (16, 128, 192)
    options = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.01}
    made = turns(setting, 12 * experts * o * i)
    for dtype in (torch.float32, torch.bfloat16):
        every = [
            MuonMatrices(params=[a], grads=[b], momenta=[c]) for a, b, c in torch.randn(made, 3, experts, o, i).unbind()
        ]
        calls = [(matrices, JORDAN) for matrices in every]
        name = f"{experts} of {o}x{i}, products in {NAMES[dtype]}"
        # BF16 rounds in each of 15 products: both sides are off by one or two per cent
        close = 1e-3 if dtype == torch.float32 else 0.05
        yield Calls(name, experts * o, calls, {**options, "matmul_dtype": dtype}, in_place=True, close=close)


def pick_keys(setting: Setting) -> Iterator[Calls]:
    """Yield the picks of a part of a prompt, by an indexer with V3.2's proportions."""
    c, t, rows = shapes.wide(setting.quick), *((1024, 16) if setting.quick else (8192, 512))
    q, k, hidden = (1, rows, c.n_heads // 2, c.kv_lora_rank // 4), (1, t, c.kv_lora_rank // 4), torch.zeros(1, rows, t)
    made = [_bf16(q, k) for _ in range(turns(setting, 2 * math.prod(q) + 2 * math.prod(k)))]
    # sums in another order may swap picks at the edge
    every = [(*pair, torch.randn(q[:3]), t // 4, hidden.bool()) for pair in made]
    yield Calls(f"BF16, context {t}", rows, every, close=0.02)


def picked_attention(setting: Setting) -> Iterator[Calls]:
    """Yield attention of a part of a prompt to a quarter of the rows."""
    c, t, rows = shapes.wide(setting.quick), *((1024, 16) if setting.quick else (8192, 512))
    n, r, latent = c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    queries = ((1, rows, c.n_heads, n), (1, rows, c.n_heads, r), (1, t, latent + r))
    weights = [x / x.shape[1] ** 0.5 for x in _bf16((c.n_heads, n, latent), (c.n_heads, latent, c.v_head_dim))]
    rest = (*weights, (n + r) ** -0.5, torch.rand(1, rows, t).topk(t // 4).indices)
    every = [(*_bf16(*queries), *rest) for _ in range(turns(setting, sum(2 * math.prod(q) for q in queries)))]
    yield Calls(f"BF16, context {t}", rows, every, close=0.02)


def _bf16(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size).bfloat16() for size in sizes]


CALLS: Mapping[str, Callable[[Setting], Iterator[Calls]]] = {
    **{f.__name__: f for f in (linear, quantized_linear, normed, attention_step, grouped_attention_step)},
    **{f.__name__: f for f in (feed_forward_step, blocks_step, experts, quantized_experts)},
    **{f.__name__: f for f in (trained_experts, trained_experts_gradients, pick_keys, picked_attention, muon_update)},
    **{"quantize": quantize_tiles, "dequantize": dequantize_tiles, "quantize_dequantize": round_tiles},
}
"""Calls of each kernel of dsmini_kernels.cpu, by the name of its operation."""
