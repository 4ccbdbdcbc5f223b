"""How long should it take? From counted operations and this machine's roofs.

    seconds = sum over operations of max(bytes / rate of that class, FLOPs / rate of that class)
              + calls * what a call costs

The rate of a class is measured apart, on tensors of its own, once: it knows nothing of the model.
"""

from collections.abc import Iterable

from benchmarks.counting import Count, Operation
from benchmarks.roofs import Roofs, product_rate

CLASSES = {"scatter": "gather", "other": "pointwise"}


def seconds(count: Count, roofs: Roofs) -> float:
    """The predicted time of what was counted."""
    return sum(operation_seconds(op, roofs) for op in count.operations) + count.views * roofs.call


def operation_seconds(op: Operation, roofs: Roofs) -> float:
    """The predicted time of one operation, its call included."""
    dtype = str(op.dtype).removeprefix("torch.")
    dtype = dtype if dtype in roofs.peak else "float32"
    if op.flops:
        warm = op.flops / product_rate(roofs, op.kind, dtype, op.rows)
        if op.kind == "product":
            # a matrix of a large model comes from memory
            warm = max(warm, op.bytes / roofs.bandwidth)
        return roofs.curves[f"pointwise {dtype}"].costs[0] + warm
    name = _class(op)
    return roofs.curves[f"{name} {dtype}"].at(op.bytes)


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
