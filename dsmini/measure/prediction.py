"""How long should it take? From counted operations and this machine's roofs.

    seconds = sum over operations of bytes / rate of that class, or FLOPs / rate of that class
              + calls, views among them, * what a call costs in a model of no size

The rate of a class depends on the size, on whether its bytes lie in a cache or in memory, and for products on how many
rows share a matrix. It is measured apart, on tensors of its own, once: it knows nothing of the model. Which bytes lie
in the cache is a model too: of a cache that keeps what was used last.
"""

from collections.abc import Iterable

from dsmini.measure.counting import Count, Operation
from dsmini.measure.rates import Roofs, flops_rate, point_seconds, product_rate

CLASSES = {"scatter": "gather", "other": "pointwise"}


def seconds(count: Count, roofs: Roofs) -> float:
    """The predicted time of what was counted."""
    work = sum(operation_seconds(op, roofs) - smallest_seconds(op, roofs) for op in count.operations)
    return work + (len(count.operations) + count.views) * roofs.call


def smallest_seconds(op: Operation, roofs: Roofs) -> float:
    """What the least work takes that is timed as operations of its dtype are: the call, without Python around it."""
    return roofs.curves[f"warm pointwise {_dtype(op, roofs)}"].costs[0]


def operation_seconds(op: Operation, roofs: Roofs) -> float:
    """The predicted time of one operation, its call included."""
    dtype = _dtype(op, roofs)
    if op.flops:
        if op.kind == "product":
            rate = product_rate(roofs, dtype, op.rows, op.flops / (2 * op.rows), op.cold_share)
        else:
            rate = flops_rate(roofs, op.kind, dtype, op.rows, op.cold_share)
        return smallest_seconds(op, roofs) + op.flops / rate
    return point_seconds(roofs, _class(op), dtype, op.bytes, op.cold_share)


def _dtype(op: Operation, roofs: Roofs) -> str:
    name = str(op.dtype).removeprefix("torch.")
    return name if name in roofs.peak else "float32"


def _class(op: Operation) -> str:
    if op.name in ("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"):
        return "softmax"
    if op.name == "_to_copy":
        return "cast"
    return CLASSES.get(op.kind, "pointwise" if op.kind == "optimizer" else op.kind)


def by_kind(operations: Iterable[Operation], roofs: Roofs) -> dict[str, dict[str, float]]:
    """Of each kind the calls, FLOPs, bytes, the seconds that were measured and those predicted."""
    totals: dict[str, dict[str, float]] = {}
    for op in operations:
        total = totals.setdefault(op.kind, dict.fromkeys(("calls", "flops", "bytes", "measured", "predicted"), 0.0))
        total["calls"] += 1
        total["flops"] += op.flops
        total["bytes"] += op.bytes
        total["measured"] += op.seconds
        total["predicted"] += operation_seconds(op, roofs)
    return totals
