"""Roofline: which limits each operation of a step, memory or arithmetic?

An operation with F FLOPs that must move b bytes cannot be faster than

    rate <= min(peak, F / b * bandwidth)

Where F / b is below peak / bandwidth, memory is its limit. An operation without products counts one FLOP for each
element that it writes. Each is timed by itself while a few steps run; its time includes the call.

The FLOPs of the model's products are also known by formula (dsmini.accounting.step_flops), and both must agree within 1
%: what runs beyond the formula is waste, and what is missing is a mistake. Queries with keys are apart: the formula
counts the half of the square that the mask leaves, and what runs is between it and the whole square. Muon's own
products, which the formula leaves out, are apart too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsmini.accounting import step_flops
from dsmini.diagnosis.evidence.evidence import Evidence, not_compiled
from dsmini.diagnosis.subject import Subject
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Plot, Section, Series

PASSES = 3
OF_WEIGHTS = ("product", "grouped product")
"""Kinds of products with weights; those of queries with keys are batched, or one attention."""
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


def points_of(passes: Sequence[Sequence[CountedOperation]], rates: Rates) -> list[RoofPoint]:
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
            predicted=sum(operation_seconds(op, rates.roofs) for op in ops) / n,
            flops=sum(op.flops or op.written // op.dtype.itemsize for op in ops) // n,
            bytes=sum(op.bytes for op in ops) // n,
        )
        for (kind, name, shape), ops in groups.items()
    ]
    return sorted(found, key=lambda point: -point.seconds)


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of a step: those of products with weights, and those of queries with keys."""

    weights: int
    context: int


def flops_by_formula(subject: Subject) -> StepFlops:
    """Return the FLOPs of a step by accounting, with half of the square of queries and keys."""
    c = subject.config
    how: dict[str, Any] = {"recompute": c.train.recompute, "dsa_stage": c.train.dsa_stage}
    found = step_flops(c.model, batch_size=subject.rows, seq_len=c.seq_len, **how)
    of_context = ("over the context", "scores of the indexer", "loss of the indexer")
    context = sum(flops for name, flops in found.by_module.items() if name.endswith(of_context))
    return StepFlops(weights=found.total - context, context=context)


def flops_by_counter(operations: Sequence[CountedOperation]) -> StepFlops:
    """Return the FLOPs of a step as counted, without those of the optimizer."""
    model = [op for op in operations if op.flops and "muon" not in op.name]
    weights = sum(op.flops for op in model if op.kind in OF_WEIGHTS)
    return StepFlops(weights=weights, context=sum(op.flops for op in model) - weights)


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    assert rates is not None, "without rates there is no roof"
    passes = [count(subject.step, rates.roofs.cache_bytes) for _ in range(1 + PASSES)][1:]
    points = points_of([each.operations for each in passes], rates)
    counted, formula = flops_by_counter(passes[0].operations), flops_by_formula(subject)
    figures = [
        Figure(
            question="roofline",
            case={"products": "with weights"},
            metric="flops",
            unit="FLOP",
            measured=counted.weights,
            predicted=formula.weights,
        ),
        Figure(
            question="roofline",
            case={"products": "of queries with keys"},
            metric="flops",
            unit="FLOP",
            measured=counted.context,
            predicted=formula.context,
            bound=True,
            note="the formula counts the half of the square that the mask leaves",
        ),
    ]
    said = (
        f"Products with weights take {counted.weights / 1e9:.2f} GFLOP a step, {formula.weights / 1e9:.2f} by formula."
    )
    return section_of(points, rates, subject.config.train.dtype, figures, said)


def section_of(
    points: Sequence[RoofPoint], rates: Rates, dtype: str, figures: Sequence[Figure], said: str, about: str = ""
) -> Section:
    """Return the section of a page from operations, the figures of their sums, and a sentence about these."""
    total = sum(point.seconds for point in points)
    peak = rates.roofs.peak.get(dtype, max(rates.roofs.peak.values()))
    ridge = peak / rates.roofs.bandwidth
    shown = [p for p in points if p.seconds >= LEAST_SHARE * total and p.flops and p.bytes]
    memory = sum(p.seconds for p in points if p.intensity < ridge) / total
    return Section(
        name="roofline",
        title="Which operations does memory limit, and which arithmetic?",
        finding=f"{memory:.0%} of the time of operations lies below {ridge:.0f} FLOPs a byte, where memory or a cache "
        f"is the limit. {said}",
        figures=[*figures, *operation_figures(shown)],
        plots=[roof_plot(shown, rates.roofs.bandwidth, peak)],
        about=f"Above the sloping roof an operation's bytes come from a cache.{about}",
    )


def operation_figures(points: Sequence[RoofPoint]) -> list[Figure]:
    """Return the measured and predicted seconds of each operation."""
    return [
        Figure(
            question="roofline",
            case={"kind": p.kind, "operation": p.name, "shape": p.shape, "intensity": p.intensity},
            metric="seconds_of_a_step",
            unit="s",
            measured=p.seconds,
            predicted=p.predicted,
        )
        for p in points
    ]


def roof_plot(points: Sequence[RoofPoint], bandwidth: float, peak: float) -> Plot:
    """Return the operations under the roof of bandwidth and peak."""
    points = [p for p in points if p.intensity >= LEAST_INTENSITY]
    ridge, at = peak / bandwidth, [p.intensity for p in points]
    low, high = min([*at, ridge]) / 2, max([4 * ridge, *(2 * each for each in at)])
    series = [Series(label="roof", x=[low, ridge, high], y=[low * bandwidth, peak, peak], dashed=True)]
    kinds = list(dict.fromkeys(p.kind for p in points))
    named = {kind: [kind] for kind in kinds[:MOST_KINDS]} | {"others": kinds[MOST_KINDS:]}
    for label, members in named.items():
        some = [p for p in points if p.kind in members]
        x, y = [p.intensity for p in some], [p.flops / p.seconds for p in some]
        series += [Series(label=label, kind="points", x=x, y=y)] if some else []
    return Plot(title="Operations of a step", x="FLOPs a byte", y="FLOP/s", series=series, log_x=True, log_y=True)


ROOFLINE = Evidence(name="roofline", why_not=not_compiled, run=run, weight=5.0, steps=12, needs_rates=True)
