"""Roofline: which limits each operation of a step, memory or arithmetic, and are bytes and FLOPs as counted?

An operation with F FLOPs that must move b bytes cannot be faster than

    rate <= min(peak, F / b * bandwidth)

Where F / b is below peak / bandwidth, memory is its limit. An operation without products counts one FLOP for each
element that it writes. Each is timed by itself while a few steps run; its time includes the call. Decoding one sequence
does two FLOPs with each weight that it reads, far below the ridge.

FLOPs are also known by formula (dsmini.accounting), without the optimizer. In training the formula takes the half of
the square of queries and keys that the mask leaves. What runs is between it and the whole square.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.rates import Roofs
from dsmini.report import Figure, Plot, Section, Series
from dsmini.report.units import human

PASSES = 3
LEAST_SHARE = 0.005
"""Share of the time below which an operation is left out."""
LEAST_INTENSITY = 0.01
"""FLOPs a byte below which an operation is not drawn: it only looks at its bytes."""
MOST_KINDS = 4
"""Number of kinds that the plot names, by their time."""


@dataclass(frozen=True, kw_only=True)
class RoofPoint:
    """All operations of one name and shape in a step."""

    kind: str
    name: str
    shape: str
    seconds: float
    predicted: float
    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / max(1, self.bytes)


def points_of(passes: Sequence[Sequence[CountedOperation]], roofs: Roofs) -> list[RoofPoint]:
    """Return the operations of a step by name and shape, longest first; seconds are means over the passes."""
    groups: dict[tuple[str, str, str], list[CountedOperation]] = {}
    for op in (op for operations in passes for op in operations):
        shape = " x ".join("[" + ", ".join(map(str, s)) + "]" for s in op.shape[:2])
        groups.setdefault((op.kind, op.name, shape), []).append(op)
    n = len(passes)
    found = [
        RoofPoint(
            kind=kind,
            name=name,
            shape=shape,
            seconds=sum(op.seconds for op in ops) / n,
            predicted=sum(operation_seconds(op, roofs) for op in ops) / n,
            flops=sum(op.flops or op.written // op.dtype.itemsize for op in ops) // n,
            bytes=sum(op.bytes for op in ops) // n,
        )
        for (kind, name, shape), ops in groups.items()
    ]
    return sorted(found, key=lambda point: -point.seconds)


def flops_of(operations: Sequence[CountedOperation]) -> int:
    """Return the FLOPs that were counted, without those of the optimizer."""
    return sum(op.flops for op in operations if "muon" not in op.name)


def roofline(step: Callable[[], object], roofs: Roofs, dtype: str, formula: int, about: str = "") -> Section:
    """Return the section of a page: operations under the roof of this machine, and FLOPs next to their formula.

    Args:
        dtype: of the products.
        formula: FLOPs of a step by formula.
    """
    passes = [count(step, roofs.cache_bytes).operations for _ in range(1 + PASSES)][1:]
    points = points_of(passes, roofs)
    total, peak = sum(point.seconds for point in points), roofs.peak.get(dtype, max(roofs.peak.values()))
    ridge = peak / roofs.bandwidth
    memory = sum(p.seconds for p in points if p.intensity < ridge) / total
    shown = [p for p in points if p.seconds >= LEAST_SHARE * total and p.flops and p.bytes]
    figures = [
        Figure(
            question="roofline",
            case={"kind": p.kind, "operation": p.name, "shape": p.shape, "intensity": p.intensity},
            metric="seconds_of_a_step",
            unit="s",
            measured=p.seconds,
            predicted=p.predicted,
        )
        for p in shown
    ]
    return Section(
        name="roofline",
        title="Which operations does memory limit, and which arithmetic?",
        finding=f"{memory:.0%} of the time of operations lies below {ridge:.0f} FLOPs a byte, where memory or a cache "
        f"is the limit. Products take {human(flops_of(passes[0]), 'FLOP')} a step, "
        f"{human(formula, 'FLOP')} by formula.",
        figures=figures,
        plots=[roof_plot(shown, roofs.bandwidth, peak)],
        about=f"Above the sloping roof an operation's bytes come from a cache.{about}",
    )


def roof_plot(points: Sequence[RoofPoint], bandwidth: float, peak: float) -> Plot:
    """Return the operations under the roof of bandwidth and peak."""
    points = [p for p in points if p.intensity >= LEAST_INTENSITY]
    ridge, at = peak / bandwidth, [p.intensity for p in points]
    low, high = min([*at, ridge]) / 2, max([4 * ridge, *(2 * each for each in at)])
    series = [Series(label="roof", x=[low, ridge, high], y=[low * bandwidth, peak, peak], dashed=True)]
    kinds = list(dict.fromkeys(p.kind for p in points))
    for label in dict.fromkeys((*kinds[:MOST_KINDS], "others")):
        some = [p for p in points if (p.kind if p.kind in kinds[:MOST_KINDS] else "others") == label]
        x, y = [p.intensity for p in some], [p.flops / p.seconds for p in some]
        series += [Series(label=label, kind="points", x=x, y=y)] if some else []
    return Plot(title="Operations of a step", x="FLOPs a byte", y="FLOP/s", series=series, log_x=True, log_y=True)
