"""Calls of operations in any size: the one catalogue, for calibration and for python -m benchmarks kernels.

It has torch's operations by kind, and dsmini's own kernels. A kernel has rates of its own: it reads a weight once for
all rows, in the dtype in which the weight is stored. "FP8" is E4M3 codes with scales, as in serving. Training
multiplies no codes.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ops
from dsmini.config import ModelConfig
from dsmini.inference.fused import attention_step, extract_weights, feed_forward_step, grouped_attention_step, normed
from dsmini.measure.costs import cost_of
from dsmini.measure.workloads import random_cache, random_model, random_tokens
from dsmini.nn import RMSNorm
from dsmini.nn.dsa import topk_attention, topk_keys
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear
from dsmini.nn.moe import experts
from dsmini.numerics import AMAX_MIN, WEIGHT_TILE, QuantizedTensor, quantize, round_tiles
from dsmini.numerics.orthogonalize import NEWTON_SCHULZ, MuonMatrices, muon_update

Job = tuple[Callable[..., object], tuple[Tensor, ...], int]
"""Operation, inputs, and bytes or FLOPs."""
Maker = Callable[[int, torch.dtype, torch.device], Job]
"""Maker of a job with this many numbers, or this many rows of a product."""
FP8 = torch.float8_e4m3fn
BYTES = (1 << 8, 1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 27)
ROWS = (1, 4, 16, 64, 256, 1024)
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


# --- torch's operations


def _numbers(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _numbers(dtype, device, max(1, n // width), min(n, width))


def _point(run: Callable[..., object], width: int, inputs: int, moved: int) -> Maker:
    """Return the maker of an operation on rows of this width that moves `moved` times the bytes of one input."""

    def make(n: int, dtype: torch.dtype, device: torch.device) -> Job:
        tensors = tuple(_rows(n, width, dtype, device) for _ in range(inputs))
        return run, tensors, moved * tensors[0].nbytes

    return make


def _cast(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    # the dtype of an operation is that of its result
    a = _rows(n, 512, torch.bfloat16 if dtype == torch.float32 else torch.float32, device)
    return lambda a: a.to(dtype), (a,), a.numel() * 6


def _gather(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 256, dtype, device)
    index = torch.randint(0, len(a), (len(a),), device=device)
    return lambda a: a.index_select(0, index), (a,), 2 * a.nbytes + index.nbytes


def _order(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = torch.randint(0, 64, (max(1, min(n, 1 << 20)),), device=device)
    return lambda a: a.argsort(stable=True), (a,), 3 * a.nbytes


TORCH_POINTS: Mapping[str, Maker] = {
    "pointwise": _point(torch.mul, width=512, inputs=2, moved=3),
    "slow pointwise": _point(F.silu, width=512, inputs=1, moved=2),
    "softmax": _point(lambda a: a.softmax(-1), width=256, inputs=1, moved=2),
    "reduction": _point(lambda a: a.mean(-1), width=512, inputs=1, moved=1),
    "move": _point(lambda a, b: torch.cat((a, b), -1), width=32, inputs=2, moved=4),
    "cast": _cast,
    "gather": _gather,
    "order": _order,
}


def _product(columns: int) -> Maker:
    """Return the maker of a product of rows with a matrix of 1024 rows and this many columns."""

    def make(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
        w, x = (_numbers(dtype, device, n, 1024) for n in (columns, rows))
        return lambda w, x: F.linear(x, w), (w, x), 2 * rows * 1024 * columns

    return make


def _batched(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    k, q = (_numbers(dtype, device, 16, n, 64) for n in (512, rows))
    return lambda k, q: k @ q.mT, (k, q), 2 * 16 * 512 * rows * 64


def _grouped(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = _numbers(dtype, device, 16, 512, 512), _numbers(dtype, device, 16 * rows, 512)
    ends = torch.arange(1, 17, device=device, dtype=torch.int32) * rows
    if hasattr(F, "grouped_mm"):
        return lambda w, x: F.grouped_mm(x, w.mT, offs=ends), (w, x), 2 * 16 * rows * 512 * 512
    return lambda w, x: [F.linear(a, b) for a, b in zip(x.split(rows), w, strict=True)], (w, x), 2 * x.numel() * 512


def _torch_attention(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    q, k, v = (_numbers(dtype, device, 4, 8, rows, 64) for _ in range(3))
    flops = 2 * 32 * (rows * (rows + 1) // 2) * 128
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), flops


TORCH_PRODUCTS: Mapping[str, Maker] = {
    "product": _product(1024),
    "small product": _product(256),
    "batched product": _batched,
    "grouped product": _grouped,
    "attention": _torch_attention,
}


# --- dsmini's kernels


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
        declared = ops.Operation.declared  # of dsmini.functional, which is found by name alone
        forward, gradients = declared["trained_experts"], declared["trained_experts_gradients"]
        if not backward:
            return lambda x, *w: forward(x, *routing, *w), (x, *matrices), flops
        grad, (_, gate, up_) = _numbers(dtype, device, n, width), forward(x, *routing, *matrices)

        def call(grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, *w: Tensor) -> object:
            return gradients(grad, x, *routing, gate, up, *w)

        return call, (grad, x, gate, up_, *matrices), 2 * flops

    return make


def _muon(side: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return an update of matrices whose smaller side is `side`, twice as long."""
    n, steps = max(1, MUON_NUMBERS // (2 * side * side)), NEWTON_SCHULZ["jordan"]
    tensors = tuple(_numbers(torch.float32, device, n, side, 2 * side) for _ in range(3))
    how: Any = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.0, "matmul_dtype": dtype}

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


def _attention(sizes: Mapping[str, Any], run: Any, part: Literal["attention", "scores"] = "attention") -> Maker:
    """Return the maker of a decoding step of one attention whose weights are small next to its cache.

    Args:
        run: the operation.
        part: "attention" attends to all keys; with "scores" an indexer scores all keys and picks a few.
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

        return call, (cached.data,), getattr(cost_of(run.name, None, *rest), part)

    return make


def _topk_keys(keys: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return the picks of some queries, a quarter of the keys."""
    q, k = _numbers(dtype, device, 1, QUERIES, 8, 64), _numbers(dtype, device, 1, keys, 64)
    weights = _numbers(torch.float32, device, 1, QUERIES, 8)
    hidden = torch.zeros(1, QUERIES, keys, dtype=torch.bool, device=device)
    flops = cost_of("topk_keys", None, q, k, weights, keys // 4, hidden).flops
    return lambda q, k: topk_keys(q, k, weights, keys // 4, hidden), (q, k), flops


def _topk_attention(picks: int, dtype: torch.dtype, device: torch.device) -> Job:
    """Return attention of some queries to a quarter of the rows."""
    shapes = ((1, QUERIES, 16, 32), (1, QUERIES, 16, 32), (1, 4 * picks, 288), (16, 32, 256), (16, 256, 32))
    tensors = tuple(_numbers(dtype, device, *shape) for shape in shapes)
    chosen = torch.rand(1, QUERIES, 4 * picks, device=device).topk(picks).indices
    run: Any = topk_attention
    return (
        lambda *tensors: run(*tensors, 0.1, chosen),
        tensors,
        cost_of("topk_attention", None, *tensors, 0.1, chosen).flops,
    )


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

        return call, (_numbers(torch.float32, device, rows, WIDTH), *weights), 1

    return make


def _normed(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    norm = RMSNorm(WIDTH).to(device)
    return lambda x: normed(x, norm), (_numbers(torch.float32, device, rows, WIDTH),), 1


def _rounded(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    x = _numbers(dtype, device, max(1, n // WIDTH), min(n, WIDTH))
    return lambda x: round_tiles(x, (1, 128), "ue8m0", "e4m3", AMAX_MIN, torch.bfloat16), (x,), 1


class Kernel(NamedTuple):
    """Calls of a kernel in several sizes."""

    make: Maker
    sizes: tuple[int, ...]
    """Rows; sides of a matrix for Muon, keys for attention, bytes for what only moves."""
    operations: tuple[str, ...]
    """Names of the operations that have its rates."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of the weights, or of the products where weights are FP32."""
    is_product: bool = True
    close: float = 0.02
    """Largest relative error of the result, next to the plain version; 0: bit for bit."""


TORCH: Mapping[str, Kernel] = {
    **{kind: Kernel(make, BYTES, (), is_product=False) for kind, make in TORCH_POINTS.items()},
    **{kind: Kernel(make, ROWS, ()) for kind, make in TORCH_PRODUCTS.items()},
}
"""Operations of torch that have a curve of rates, by kind."""
POINTS = (1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 27)
TRAINED, NARROW_TRAINED, WEIGHTS = (8, 32, 128, 512), (8, 64, 512), ("float32", "bfloat16", "fp8")
STEPS = ("linear", "quantized_linear", "attention_step", "grouped_attention_step", "feed_forward_step")
KERNELS: Mapping[str, Kernel] = {
    "quantize": Kernel(_quantize, POINTS, ("quantize", "quantize_dequantize"), is_product=False, close=0.0),
    "dequantize": Kernel(_dequantize, POINTS, ("dequantize",), is_product=False, close=0.0),
    "linear": Kernel(_linear, (1, 4, 16, 32, 64, 256, 1024), STEPS, WEIGHTS),
    "experts": Kernel(_experts, (1, 4, 16, 64, 256), ("experts", "quantized_experts"), WEIGHTS),
    "trained experts": Kernel(_trained(backward=False), TRAINED, ("trained_experts",)),
    "trained experts gradients": Kernel(_trained(backward=True), TRAINED, ("trained_experts_gradients",)),
    "narrow trained experts": Kernel(_trained(False, NARROW_WIDTH, NARROW_HIDDEN), NARROW_TRAINED, ()),
    "narrow trained experts gradients": Kernel(_trained(True, NARROW_WIDTH, NARROW_HIDDEN), NARROW_TRAINED, ()),
    # BF16 rounds in each of 15 products: both sides are off by one or two per cent
    "muon": Kernel(_muon, (32, 64, 128, 256, 512), ("muon_update",), close=0.05),
    "cached attention": Kernel(_attention(MLA, attention_step), (64, 512, 4096), ()),
    "index scores": Kernel(_attention({**MLA, **INDEXER}, attention_step, "scores"), (1024, 4096, 16384), ()),
    "pick keys": Kernel(_topk_keys, (256, 2048, 8192), ("topk_keys",)),
    "picked attention": Kernel(_topk_attention, (64, 512, 2048), ("topk_attention",)),
}
"""Kernels that have a curve of rates, by its name."""
OTHERS: Mapping[str, Kernel] = {
    "round": Kernel(_rounded, POINTS, (), is_product=False, close=0.0),
    "norm": Kernel(_normed, (1, 8), (), dtypes=("float32",)),
    "grouped attention": Kernel(_attention(MHA, grouped_attention_step), (64, 512, 4096), ()),
    "dense feed-forward": Kernel(_fed_forward(dense=True), (1, 8), ()),
    "routed feed-forward": Kernel(_fed_forward(dense=False), (1, 8), ()),
}
"""Kernels without a curve. blocks_step joins the steps of all blocks; the question decode measures it."""
NARROW, WIDE = NARROW_WIDTH * NARROW_HIDDEN, EXPERT_WIDTH * EXPERT_HIDDEN
"""Numbers of an expert's matrix in the narrow curves and in the others."""
CURVES: Mapping[str, str] = {name: kind for kind, kernel in KERNELS.items() for name in kernel.operations}
"""Curve of each operation that kernels serve."""
