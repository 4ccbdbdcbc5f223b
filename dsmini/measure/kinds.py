"""An operation of each kind in any size, for calibration: the operation, its inputs, and its bytes or FLOPs."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Job = tuple[Callable[..., object], tuple[Tensor, ...], int]
"""Operation, inputs, and bytes or FLOPs."""
Maker = Callable[[int, torch.dtype, torch.device], Job]
"""Maker of a job with this many numbers, or this many rows of a product."""


def _random(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.rand(*shape, device=device).to(dtype)


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _random(dtype, device, max(1, n // width), min(n, width))


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


POINTS: Mapping[str, Maker] = {
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
        w, x = (_random(dtype, device, n, 1024) for n in (columns, rows))
        return lambda w, x: F.linear(x, w), (w, x), 2 * rows * 1024 * columns

    return make


def _batched(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    k, q = (_random(dtype, device, 16, n, 64) for n in (512, rows))
    return lambda k, q: k @ q.mT, (k, q), 2 * 16 * 512 * rows * 64


def _grouped(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = _random(dtype, device, 16, 512, 512), _random(dtype, device, 16 * rows, 512)
    ends = torch.arange(1, 17, device=device, dtype=torch.int32) * rows
    if hasattr(F, "grouped_mm"):
        return lambda w, x: F.grouped_mm(x, w.mT, offs=ends), (w, x), 2 * 16 * rows * 512 * 512
    return lambda w, x: [F.linear(a, b) for a, b in zip(x.split(rows), w, strict=True)], (w, x), 2 * x.numel() * 512


def _attention(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    q, k, v = (_random(dtype, device, 4, 8, rows, 64) for _ in range(3))
    flops = 2 * 32 * (rows * (rows + 1) // 2) * 128
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), flops


PRODUCTS: Mapping[str, Maker] = {
    "product": _product(1024),
    "small product": _product(256),
    "batched product": _batched,
    "grouped product": _grouped,
    "attention": _attention,
}
