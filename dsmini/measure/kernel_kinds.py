"""Calls of dsmini's own kernels in any size, for calibration, as kinds.py has torch's operations.

A kernel has rates of its own: it reads a weight once for all rows, in the dtype in which the weight is stored. "FP8"
is E4M3 codes with scales, as in serving. Training multiplies no codes.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.functional.trained_experts import trained_experts, trained_experts_gradients
from dsmini.inference.fused.operations import attention_step
from dsmini.inference.fused.weights import AttentionWeights, extract_weights
from dsmini.measure.costs import cost_of
from dsmini.measure.kinds import Job, Maker
from dsmini.measure.workloads import random_cache, random_model, random_tokens
from dsmini.nn.dsa import pick_keys, picked_attention
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear
from dsmini.nn.moe import experts
from dsmini.numerics import WEIGHT_TILE, QuantizedTensor, quantize
from dsmini.numerics.orthogonalize import NEWTON_SCHULZ, MuonMatrices, muon_update

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
    return lambda x, *w: multiply(x, _joined(w)), (x, *_weight(dtype, device, WIDTH, WIDTH)), 2 * rows * WIDTH**2


def _routing(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, weights and counts of tokens that choose one expert each, `rows` for each expert."""
    indices = torch.randperm(EXPERTS * rows, device=device).remainder(EXPERTS)[:, None]
    return indices, torch.ones(EXPERTS * rows, 1, device=device), torch.full((EXPERTS,), rows, device=device)


def _experts(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    indices, weights, counts = _routing(rows, device)
    x = _numbers(torch.bfloat16 if dtype == FP8 else dtype, device, EXPERTS * rows, EXPERT_WIDTH)
    up, down = (EXPERTS, EXPERT_HIDDEN, EXPERT_WIDTH), (EXPERTS, EXPERT_WIDTH, EXPERT_HIDDEN)
    matrices = [_weight(dtype, device, *shape) for shape in (up, down, up)]
    parts, run = len(matrices[0]), quantized_experts if dtype == FP8 else experts

    def call(x: Tensor, *w: Tensor) -> Tensor:
        w1, w2, w3 = (_joined(w[i * parts : (i + 1) * parts]) for i in range(3))
        return run(x, indices, weights, counts, w1, w2, w3)

    flops = 6 * EXPERTS * rows * EXPERT_HIDDEN * EXPERT_WIDTH
    return call, (x, *(t for matrix in matrices for t in matrix)), flops


def _trained(backward: bool, width: int = EXPERT_WIDTH, hidden: int = EXPERT_HIDDEN) -> Maker:
    """Return the maker of a call of the experts in training, forward or backward. Matrices are FP32."""

    def make(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
        routing, n = _routing(rows, device), EXPERTS * rows
        x = _numbers(dtype, device, n, width)
        up, down = (EXPERTS, hidden, width), (EXPERTS, width, hidden)
        matrices = [_numbers(torch.float32, device, *shape) for shape in (up, down, up)]
        flops = 6 * n * hidden * width
        if not backward:
            return lambda x, *w: trained_experts(x, *routing, *w), (x, *matrices), flops
        grad, gate, up_ = (_numbers(dtype, device, n, numbers) for numbers in (width, hidden, hidden))

        def call(grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, *w: Tensor) -> object:
            return trained_experts_gradients(grad, x, *routing, gate, up, *w)

        return call, (grad, x, gate, up_, *matrices), 2 * flops

    return make


def _muon(side: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return an update of matrices whose smaller side is `side`, twice as long."""
    n, steps = max(1, MUON_NUMBERS // (2 * side * side)), NEWTON_SCHULZ["jordan"]
    tensors = tuple(_numbers(torch.float32, device, n, side, 2 * side) for _ in range(3))
    how: Any = {"lr": 1e-6, "momentum": 0.95, "weight_decay": 0.0, "matmul_dtype": dtype}

    def call(params: Tensor, grads: Tensor, momenta: Tensor) -> None:
        muon_update(MuonMatrices(params=[params], grads=[grads], momenta=[momenta]), steps, **how)

    matrices = MuonMatrices(params=[tensors[0]], grads=[tensors[1]], momenta=[tensors[2]])
    return call, tensors, cost_of("muon_update", None, matrices, steps, **how).flops


def _quantize(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    x = _numbers(dtype, device, max(1, n // WIDTH), min(n, WIDTH))
    return quantize, (x,), x.nbytes + quantize(x).nbytes


def _dequantize(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    x = _numbers(dtype, device, max(1, n // WIDTH), min(n, WIDTH))
    q = quantize(x)

    def call(codes: Tensor, scales: Tensor) -> Tensor:
        return replace(q, codes=codes, scales=scales).dequantize(dtype)

    return call, (q.codes, q.scales), x.nbytes + q.nbytes


def _attention_step(part: Literal["attention", "scores"]) -> Maker:
    """Return the maker of a decoding step of one attention whose weights are small next to its cache.

    Args:
        part: "attention" attends to all keys; with "scores" an indexer scores all keys and picks a few.
    """
    sizes = {**MLA, **(INDEXER if part == "scores" else {})}

    def make(keys: int, dtype: torch.dtype, device: torch.device) -> Job:
        config = ModelConfig(dim=64, inter_dim=64, n_layers=1, n_dense_layers=1, max_seq_len=keys + 64, **sizes)
        model = random_model(config, device, dtype)
        cache, token = random_cache(model, 1, keys, 64), random_tokens(config, 1, 1, device)
        at = cache.place(config, token)
        taken, view = extract_weights(model.layers[0]), cache.views(at)[0]
        attention = None if taken is None else taken.attention
        assert isinstance(attention, AttentionWeights), "a plain block of MLA can be taken apart"
        x, cos_sin = model.embedded(token).float(), model.rope.cos_sin(at.positions)
        starts = torch.full((1,), keys)

        index = view.store.index
        cached = view.store if index is None else index

        def call(data: Tensor) -> Tensor:
            store, own = copy(view.store), copy(cached)
            own.data = data
            if index is None:
                store = own
            else:
                store.index = own
            return attention_step(x, attention, replace(view, store=store), cos_sin, starts)

        return call, (cached.data,), getattr(cost_of("attention_step", None, x, attention, view, cos_sin, starts), part)

    return make


def _pick_keys(keys: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return the picks of some queries, a quarter of the keys."""
    q, k = _numbers(dtype, device, 1, QUERIES, 8, 64), _numbers(dtype, device, 1, keys, 64)
    weights = _numbers(torch.float32, device, 1, QUERIES, 8)
    hidden = torch.zeros(1, QUERIES, keys, dtype=torch.bool, device=device)
    flops = cost_of("pick_keys", None, q, k, weights, keys // 4, hidden).flops
    return lambda q, k: pick_keys(q, k, weights, keys // 4, hidden), (q, k), flops


def _picked_attention(picks: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return attention of some queries to a quarter of the rows."""
    shapes = ((1, QUERIES, 16, 32), (1, QUERIES, 16, 32), (1, 4 * picks, 288), (16, 32, 256), (16, 256, 32))
    tensors = tuple(_numbers(dtype, device, *shape) for shape in shapes)
    chosen = torch.rand(1, QUERIES, 4 * picks, device=device).topk(picks).indices
    run: Any = picked_attention
    return (
        lambda *tensors: run(*tensors, 0.1, chosen),
        tensors,
        cost_of("picked_attention", None, *tensors, 0.1, chosen).flops,
    )


KERNEL_PRODUCTS: Mapping[str, Maker] = {
    "linear": _linear,
    "experts": _experts,
    "trained experts": _trained(backward=False),
    "trained experts gradients": _trained(backward=True),
    "narrow trained experts": _trained(False, NARROW_WIDTH, NARROW_HIDDEN),
    "narrow trained experts gradients": _trained(True, NARROW_WIDTH, NARROW_HIDDEN),
    "muon": _muon,
    "cached attention": _attention_step("attention"),
    "index scores": _attention_step("scores"),
    "pick keys": _pick_keys,
    "picked attention": _picked_attention,
}
NARROW, WIDE = NARROW_WIDTH * NARROW_HIDDEN, EXPERT_WIDTH * EXPERT_HIDDEN
"""Numbers of an expert's matrix in the narrow curves and in the others."""
KERNEL_ROWS: Mapping[str, tuple[int, ...]] = {
    "linear": (1, 4, 16, 32, 64, 256, 1024),
    "experts": (1, 4, 16, 64, 256),
    "trained experts": (8, 32, 128, 512),
    "trained experts gradients": (8, 32, 128, 512),
    "narrow trained experts": (8, 64, 512),
    "narrow trained experts gradients": (8, 64, 512),
    "muon": (32, 64, 128, 256, 512),
    "cached attention": (64, 512, 4096),
    "index scores": (1024, 4096, 16384),
    "pick keys": (256, 2048, 8192),
    "picked attention": (64, 512, 2048),
}
"""Rows that are measured; sides of a matrix for Muon, and keys for attention."""
KERNEL_DTYPES: Mapping[str, tuple[str, ...]] = {
    "linear": ("float32", "bfloat16", "fp8"),
    "experts": ("float32", "bfloat16", "fp8"),
}
"""Dtypes of the weights; for other kernels those of the products, FP32 and BF16."""
KERNEL_POINTS: Mapping[str, Maker] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
}
KERNEL_CURVES: Mapping[str, str] = {
    **dict.fromkeys(("linear", "quantized_linear", "attention_step", "grouped_attention_step"), "linear"),
    "feed_forward_step": "linear",
    **dict.fromkeys(("experts", "quantized_experts"), "experts"),
    "trained_experts": "trained experts",
    "trained_experts_gradients": "trained experts gradients",
    "muon_update": "muon",
    "pick_keys": "pick keys",
    "picked_attention": "picked attention",
    **dict.fromkeys(("quantize", "quantize_dequantize"), "quantize"),
    "dequantize": "dequantize",
}
"""Curve of each operation that kernels serve."""
