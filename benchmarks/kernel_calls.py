"""Calls of dsmini's kernels in any size, for python -m benchmarks kernels.

A kernel reads a weight once for all rows, in the dtype in which the weight is stored. "FP8" is E4M3 codes with scales,
as in serving. Training multiplies no codes.
"""

import itertools
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmini import ops
from dsmini.config import ModelConfig
from dsmini.inference.fused import attention_step, extract_weights, feed_forward_step, grouped_attention_step, normed
from dsmini.machine import last_level_cache
from dsmini.measure.workloads import random_cache, random_model, random_tokens
from dsmini.nn import RMSNorm
from dsmini.nn.dsa import topk_attention, topk_keys
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear
from dsmini.nn.moe import experts
from dsmini.numerics import AMAX_MIN, WEIGHT_TILE, QuantizedTensor, quantize, round_tiles
from dsmini.numerics.orthogonalize import NEWTON_SCHULZ, MuonMatrices, muon_update

Job = tuple[Callable[..., object], tuple[Tensor, ...]]
"""Operation and inputs."""
Maker = Callable[[int, torch.dtype, torch.device], Job]
"""Maker of a job with this many numbers, or this many rows of a product."""
FP8 = torch.float8_e4m3fn
STEP_ROWS = 32
"""Rows up to which a call is one of a decoding step, where numbers between layers are FP32."""
WIDTH, EXPERTS, EXPERT_WIDTH, EXPERT_HIDDEN = 1024, 16, 512, 256
NARROW_WIDTH, NARROW_HIDDEN = 128, 16
"""Experts whose visits take longer to collect than to multiply."""
MUON_NUMBERS = 1 << 19
MLA: Mapping[str, Any] = {
    **{"n_heads": 16, "q_lora_rank": 32, "kv_lora_rank": 256},
    **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "n_mtp_layers": 0},
}
INDEXER: Mapping[str, Any] = {"attention": "dsa", "index_n_heads": 8, "index_head_dim": 64, "index_topk": 64}
MHA: Mapping[str, Any] = {**MLA, "attention": "mha", "q_lora_rank": None}
QUERIES = 32
"""Queries of a call that picks keys or attends to picks."""


def _numbers(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _weight(dtype: torch.dtype, device: torch.device, *shape: int) -> tuple[Tensor, ...]:
    """Return a weight as tensors: itself, or codes and scales."""
    if dtype != FP8:
        return (_numbers(dtype, device, *shape),)
    q = quantize(torch.randn(*shape, device=device), WEIGHT_TILE)
    return q.codes, q.scales


def _joined(parts: tuple[Tensor, ...]) -> Any:
    """Return a weight of these tensors as operations take it."""
    if len(parts) == 1:
        return parts[0]
    codes, scales = parts
    form: Any = {"scale": "fp32", "format": "e4m3", "dtype": torch.float32}
    return QuantizedTensor(codes=codes, scales=scales, shape=codes.shape, tile=WEIGHT_TILE, **form)


def _linear(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    wide = torch.bfloat16 if dtype == FP8 else dtype
    x = _numbers(torch.float32 if rows <= STEP_ROWS else wide, device, rows, WIDTH)
    multiply: Any = quantized_linear if dtype == FP8 else linear
    return lambda x, *w: multiply(x, _joined(w)), (x, *_weight(dtype, device, WIDTH, WIDTH))


def _routing(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return indices and weights of tokens that choose one expert each, `rows` for each expert."""
    indices = torch.randperm(EXPERTS * rows, device=device).remainder(EXPERTS)[:, None]
    return indices, torch.ones(EXPERTS * rows, 1, device=device)


def _experts(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    indices, weights = _routing(rows, device)
    x = _numbers(torch.bfloat16 if dtype == FP8 else dtype, device, EXPERTS * rows, EXPERT_WIDTH)
    up, down = (EXPERTS, EXPERT_HIDDEN, EXPERT_WIDTH), (EXPERTS, EXPERT_WIDTH, EXPERT_HIDDEN)
    matrices = [_weight(dtype, device, *shape) for shape in (up, down, up)]
    parts, run = len(matrices[0]), quantized_experts if dtype == FP8 else experts

    def call(x: Tensor, *w: Tensor) -> Tensor:
        w1, w2, w3 = (_joined(w[i * parts : (i + 1) * parts]) for i in range(3))
        return run(x, indices, weights, w1, w2, w3)

    return call, (x, *(t for matrix in matrices for t in matrix))


def _trained(backward: bool, width: int = EXPERT_WIDTH, hidden: int = EXPERT_HIDDEN) -> Maker:
    """Return the maker of a call of the experts in training, forward or backward. Matrices are FP32."""

    def make(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
        routing, n = _routing(rows, device), EXPERTS * rows
        x = _numbers(dtype, device, n, width)
        up, down = (EXPERTS, hidden, width), (EXPERTS, width, hidden)
        matrices = [_numbers(torch.float32, device, *shape) for shape in (up, down, up)]
        declared = ops.Operation.declared  # of dsmini.functional, which is found by name alone
        forward, gradients = declared["trained_experts"], declared["trained_experts_gradients"]
        if not backward:
            return lambda x, *w: forward(x, *routing, *w), (x, *matrices)
        grad, (_, gate, up_) = _numbers(dtype, device, n, width), forward(x, *routing, *matrices)

        def call(grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, *w: Tensor) -> object:
            return gradients(grad, x, *routing, gate, up, *w)

        return call, (grad, x, gate, up_, *matrices)

    return make


def _muon(side: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return an update of matrices whose smaller side is `side`, twice as long."""
    n, steps = max(1, MUON_NUMBERS // (2 * side * side)), NEWTON_SCHULZ["jordan"]
    tensors = tuple(_numbers(torch.float32, device, n, side, 2 * side) for _ in range(3))
    how: Any = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.0, "matmul_dtype": dtype}

    def call(params: Tensor, grads: Tensor, momenta: Tensor) -> None:
        muon_update(MuonMatrices(params=[params], grads=[grads], momenta=[momenta]), steps, **how)

    return call, tensors


def _quantize(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    x = _numbers(dtype, device, max(1, n // WIDTH), min(n, WIDTH))
    return quantize, (x,)


def _dequantize(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    x = _numbers(dtype, device, max(1, n // WIDTH), min(n, WIDTH))
    q = quantize(x)

    def call(codes: Tensor, scales: Tensor) -> Tensor:
        return replace(q, codes=codes, scales=scales).dequantize(dtype)

    return call, (q.codes, q.scales)


def _attention(sizes: Mapping[str, Any], run: Any) -> Maker:
    """Return the maker of a decoding step of one attention whose weights are small next to its cache.

    With an indexer it scores all keys and picks a few.
    """

    def make(keys: int, dtype: torch.dtype, device: torch.device) -> Job:
        config = ModelConfig(dim=64, inter_dim=64, n_layers=1, n_dense_layers=1, max_seq_len=keys + 64, **sizes)
        model = random_model(config, device, dtype)
        cache, token = random_cache(model, 1, keys, 64), random_tokens(config, 1, 1, device)
        at = cache.place_tokens(config, token)
        taken, view = extract_weights(model.layers[0], dtype), cache.views(at)[0]
        assert taken is not None, "a plain block can be taken apart"
        x, cos_sin = model.embedded(token).float(), model.rope.cos_sin(at.positions)
        rest: Any = (x, taken.attention, view, cos_sin, torch.full((1,), keys))
        index = view.store.index
        cached = view.store if index is None else index

        def call(data: Tensor) -> Tensor:
            store, own = copy(view.store), copy(cached)
            own.data = data
            if index is None:
                store = own
            else:
                store.index = own
            return run(*rest[:2], replace(view, store=store), *rest[3:])

        return call, (cached.data,)

    return make


def _topk_keys(keys: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return the picks of some queries, a quarter of the keys."""
    q, k = _numbers(dtype, device, 1, QUERIES, 8, 64), _numbers(dtype, device, 1, keys, 64)
    weights = _numbers(torch.float32, device, 1, QUERIES, 8)
    hidden = torch.zeros(1, QUERIES, keys, dtype=torch.bool, device=device)
    return lambda q, k: topk_keys(q, k, weights, keys // 4, hidden), (q, k)


def _topk_attention(picks: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return attention of some queries to a quarter of the rows."""
    shapes = ((1, QUERIES, 16, 32), (1, QUERIES, 16, 32), (1, 4 * picks, 288), (16, 32, 256), (16, 256, 32))
    tensors = tuple(_numbers(dtype, device, *shape) for shape in shapes)
    chosen = torch.rand(1, QUERIES, 4 * picks, device=device).topk(picks).indices
    run: Any = topk_attention
    return lambda *tensors: run(*tensors, 0.1, chosen), tensors


def _fed_forward(dense: bool) -> Maker:
    """Return the maker of a decoding step's feed-forward, dense or routed.

    The plain version runs the block's own modules, whose weights may be in a cache.
    """

    def make(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
        sizes: Any = {"dim": WIDTH, "inter_dim": 2 * WIDTH, "moe_inter_dim": 256, "n_routed_experts": 16, "n_layers": 1}
        config = ModelConfig(**sizes, n_activated_experts=4, n_dense_layers=int(dense), vocab_size=64, n_mtp_layers=0)
        taken = extract_weights(random_model(config, device, dtype).layers[0], dtype)
        assert taken is not None, "a plain block can be taken apart"
        part, names = taken.feed_forward, [name if dense else f"experts.{name}" for name in ("w1", "w2", "w3")]
        weights: Any = [part.weights[name] for name in names]

        def call(x: Tensor, *w: Tensor) -> object:
            changed = part.weights | dict(zip(names, w, strict=True))
            return feed_forward_step(x, replace(part, weights=changed, prepared={}))[0]

        return call, (_numbers(torch.float32, device, rows, WIDTH), *weights)

    return make


def _normed(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    norm = RMSNorm(WIDTH).to(device)
    return lambda x: normed(x, norm), (_numbers(torch.float32, device, rows, WIDTH),)


def _rounded(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    x = _numbers(dtype, device, max(1, n // WIDTH), min(n, WIDTH))
    return lambda x: round_tiles(x, (1, 128), "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16), (x,)


class Kernel(NamedTuple):
    """Calls of a kernel in several sizes."""

    make: Maker
    sizes: tuple[int, ...]
    """Rows; sides of a matrix for Muon, keys for attention, bytes for what only moves."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of the weights, or of the products where weights are FP32."""
    is_product: bool = True
    close: float = 0.02
    """Largest relative error of the result, next to the plain version; 0: bit for bit."""


POINTS = (1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 27)
TRAINED, NARROW_TRAINED, WEIGHTS = (8, 32, 128, 512), (8, 64, 512), ("float32", "bfloat16", "fp8")
KERNELS: Mapping[str, Kernel] = {
    "quantize": Kernel(_quantize, POINTS, is_product=False, close=0.0),
    "dequantize": Kernel(_dequantize, POINTS, is_product=False, close=0.0),
    "linear": Kernel(_linear, (1, 4, 16, 32, 64, 256, 1024), WEIGHTS),
    "experts": Kernel(_experts, (1, 4, 16, 64, 256), WEIGHTS),
    "trained experts": Kernel(_trained(backward=False), TRAINED),
    "trained experts gradients": Kernel(_trained(backward=True), TRAINED),
    "narrow trained experts": Kernel(_trained(False, NARROW_WIDTH, NARROW_HIDDEN), NARROW_TRAINED),
    "narrow trained experts gradients": Kernel(_trained(True, NARROW_WIDTH, NARROW_HIDDEN), NARROW_TRAINED),
    # BF16 rounds in each of 15 products: both sides are off by one or two per cent
    "muon": Kernel(_muon, (32, 64, 128, 256, 512), close=0.05),
    "cached attention": Kernel(_attention(MLA, attention_step), (64, 512, 4096)),
    "index scores": Kernel(_attention({**MLA, **INDEXER}, attention_step), (1024, 4096, 16384)),
    "pick keys": Kernel(_topk_keys, (256, 2048, 8192)),
    "picked attention": Kernel(_topk_attention, (64, 512, 2048)),
    "round": Kernel(_rounded, POINTS, is_product=False, close=0.0),
    "norm": Kernel(_normed, (1, 8), dtypes=("float32",)),
    "grouped attention": Kernel(_attention(MHA, grouped_attention_step), (64, 512, 4096)),
    "dense feed-forward": Kernel(_fed_forward(dense=True), (1, 8)),
    "routed feed-forward": Kernel(_fed_forward(dense=False), (1, 8)),
}
"""All kernels but blocks_step, which joins the steps of all blocks; the question decode measures it."""
BUFFERS = 4
"""Total size of cold inputs and outputs, as a multiple of the last-level cache."""


def rotating(run: Callable[..., object], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the operation on other inputs in each call, with old outputs kept, so that nothing is in a cache."""
    held = sum(t.nbytes for t in inputs)
    n = max(2, min(512, BUFFERS * last_level_cache(inputs[0].device) // max(1, held)))
    many = [tuple(t.clone() for t in inputs) for _ in range(n)]
    kept: list[object] = [None] * min(n, 64)
    calls = itertools.count()

    def turn() -> None:
        i = next(calls)
        kept[i % len(kept)] = run(*many[i % n])

    return turn
