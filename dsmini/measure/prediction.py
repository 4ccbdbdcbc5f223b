"""Predict the time of a step from its counted operations and this machine's measured rates.

    seconds = sum over operations of bytes / rate of the class, or FLOPs / rate of the class
              + number of calls, views included, * cost of a call

The rate of a class depends on the size, on whether the bytes are in a cache or in memory, and for products on the rows
that share a matrix. Rates are measured once, on separate tensors, without the model. Bytes are in the cache if a cache
of the tensors that were used last would hold them.

If a measured time is far above the prediction, the machine was busy, or an operation is slower than its class.
"""

from collections.abc import Callable

import torch

from dsmini.measure.counting import Count, CountedOperation, count
from dsmini.measure.kernels import CURVES, NARROW, WIDE
from dsmini.measure.rates import Roofs, between, flops_rate, point_seconds, product_rate

CLASSES = {"scatter": "gather", "optimizer": "pointwise"}
"""Classes for the kinds of operations that have no rate of their own."""


def predicted_seconds(step: Callable[[], object], roofs: Roofs) -> float:
    """Predict the seconds of a step: run it once to warm up, then once while counting its operations."""
    step()
    return seconds(count(step, roofs.cache_bytes), roofs)


def seconds(count: Count, roofs: Roofs) -> float:
    """Predict the seconds of the counted operations."""
    work = sum(operation_seconds(op, roofs) - smallest_seconds(op, roofs) for op in count.operations)
    return work + (len(count.operations) + count.views) * roofs.call


def smallest_seconds(op: CountedOperation, roofs: Roofs) -> float:
    """Return the seconds of the smallest operation in this dtype: the call, without Python around it."""
    return roofs.curves[f"warm pointwise {_dtype(op, roofs)}"].costs[0]


def operation_seconds(op: CountedOperation, roofs: Roofs) -> float:
    """Predict the seconds of one operation, its call included."""
    if op.is_kernel and (found := _kernel_seconds(op, roofs)) is not None:
        return found
    dtype = _dtype(op, roofs)
    if op.flops:
        if op.kind == "product":
            rate = product_rate(roofs, dtype, op.rows, op.flops / (2 * op.rows), op.cold_share)
        else:
            rate = flops_rate(roofs, op.kind, dtype, op.rows, op.cold_share)
        return smallest_seconds(op, roofs) + op.flops / rate
    return point_seconds(roofs, _class(op), dtype, op.bytes, op.cold_share)


def _kernel_seconds(op: CountedOperation, roofs: Roofs) -> float | None:
    """Return the seconds of a kernel by its own curve; None for one that has none here."""
    kind = CURVES.get(op.name)
    dtype = "fp8" if op.dtype == torch.float8_e4m3fn else str(op.dtype).removeprefix("torch.")
    if kind is None or f"warm kernel {kind} {dtype}" not in roofs.curves:
        dtype = "float32"
    if kind is None or f"warm kernel {kind} {dtype}" not in roofs.curves:
        return None
    if not op.flops:
        return point_seconds(roofs, f"kernel {kind}", dtype, op.bytes, op.cold_share)
    rate = flops_rate(roofs, f"kernel {kind}", dtype, op.rows, op.cold_share)
    if op.matrix:
        narrow = flops_rate(roofs, f"kernel narrow {kind}", dtype, op.rows, op.cold_share)
        rate = between(narrow, rate, op.matrix, NARROW, WIDE)
    seconds = (op.flops - op.attention - op.scores) / rate
    cached = "bfloat16" if dtype == "fp8" else dtype
    for part, of in ((op.attention, "cached attention"), (op.scores, "index scores")):
        if part:
            seconds += part / flops_rate(roofs, f"kernel {of}", cached, 4096, op.cold_share)
    return seconds


def _dtype(op: CountedOperation, roofs: Roofs) -> str:
    name = str(op.dtype).removeprefix("torch.")
    return name if name in roofs.peak else "float32"


def _class(op: CountedOperation) -> str:
    if op.name in ("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"):
        return "softmax"
    if op.name == "_to_copy":
        return "cast"
    return CLASSES.get(op.kind, op.kind)
