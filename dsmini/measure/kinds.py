"""One operation of each kind, of any size, to be timed: what to run, on what, and the bytes or FLOPs of it."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Job = tuple[Callable[..., object], tuple[Tensor, ...], int]
"""An operation, its inputs, the first of which changes when they shall be cold, and its size."""


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.rand(max(1, n // width), min(n, width), device=device).to(dtype)


def _pointwise(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a, b = (_rows(n, 512, dtype, device) for _ in range(2))
    return torch.mul, (a, b), 3 * a.nbytes


def _slow_pointwise(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 512, dtype, device)
    return F.silu, (a,), 2 * a.nbytes


def _softmax(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 256, dtype, device)
    return lambda a: a.softmax(-1), (a,), 2 * a.nbytes


def _reduction(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 512, dtype, device)
    return lambda a: a.mean(-1), (a,), a.nbytes


def _move(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a, b = (_rows(n, 32, dtype, device) for _ in range(2))
    return lambda a, b: torch.cat((a, b), -1), (a, b), 4 * a.nbytes


def _cast(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 512, dtype, device)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    a = a.to(other)  # an operation's dtype is that of its result
    return lambda a: a.to(dtype), (a,), a.numel() * 6


def _gather(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = _rows(n, 256, dtype, device)
    index = torch.randint(0, len(a), (len(a),), device=device)
    return lambda a: a.index_select(0, index), (a,), 2 * a.nbytes + index.nbytes


def _order(n: int, dtype: torch.dtype, device: torch.device) -> Job:
    a = torch.randint(0, 64, (max(1, min(n, 1 << 20)),), device=device)
    return lambda a: a.argsort(stable=True), (a,), 3 * a.nbytes


POINTS: Mapping[str, Callable[[int, torch.dtype, torch.device], Job]] = {
    "pointwise": _pointwise,
    "slow pointwise": _slow_pointwise,
    "softmax": _softmax,
    "reduction": _reduction,
    "move": _move,
    "cast": _cast,
    "gather": _gather,
    "order": _order,
}


def _product(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = (torch.rand(n, 1024, device=device).to(dtype) for n in (1024, rows))
    return lambda w, x: F.linear(x, w), (w, x), 2 * rows * 1024 * 1024


def _small_product(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = (torch.rand(n, 1024, device=device).to(dtype) for n in (256, rows))
    return lambda w, x: F.linear(x, w), (w, x), 2 * rows * 1024 * 256


def _batched(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    k, q = (torch.rand(16, n, 64, device=device).to(dtype) for n in (512, rows))
    return lambda k, q: k @ q.mT, (k, q), 2 * 16 * 512 * rows * 64


def _grouped(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    w, x = torch.rand(16, 512, 512, device=device).to(dtype), torch.rand(16 * rows, 512, device=device).to(dtype)
    ends = torch.arange(1, 17, device=device, dtype=torch.int32) * rows
    if hasattr(F, "grouped_mm"):
        return lambda w, x: F.grouped_mm(x, w.mT, offs=ends), (w, x), 2 * 16 * rows * 512 * 512
    return lambda w, x: [F.linear(a, b) for a, b in zip(x.split(rows), w, strict=True)], (w, x), 2 * x.numel() * 512


def _attention(rows: int, dtype: torch.dtype, device: torch.device) -> Job:
    q, k, v = (torch.rand(4, 8, rows, 64, device=device).to(dtype) for _ in range(3))
    flops = 2 * 32 * (rows * (rows + 1) // 2) * 128
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), flops


PRODUCTS: Mapping[str, Callable[[int, torch.dtype, torch.device], Job]] = {
    "product": _product,
    "small product": _small_product,
    "batched product": _batched,
    "grouped product": _grouped,
    "attention": _attention,
}
