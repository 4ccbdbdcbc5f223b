"""Roofline: which limits each operation of a step, memory or arithmetic, and are bytes and FLOPs as counted?

An operation with F FLOPs that must move b bytes cannot be faster than

    rate <= min(peak, F / b * bandwidth)

Where F / b is below peak / bandwidth, memory is its limit. An operation without products counts one FLOP for each
element that it writes. Each is timed by itself while a few steps run; its time includes the call. Decoding one sequence
does two FLOPs with each weight that it reads, far below the ridge.

FLOPs are also known by formula (dsmini.accounting). In training both must agree within 1 %: what runs beyond the
formula is waste, and what is missing is a mistake. Queries with keys are apart: the formula counts the half of the
square that the mask leaves, and what runs is between it and the whole square. Muon's own products, which the formula
leaves out, are apart too. In decoding the formula of bytes counts inputs and results of every product; kernels that run
several products in one call save some of these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsmini import accounting
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.training import Subject
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.rates import Roofs
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


def passes_of(step: Callable[[], object], roofs: Roofs) -> list[list[CountedOperation]]:
    """Return the operations of a few steps, after one to warm up."""
    return [count(step, roofs.cache_bytes).operations for _ in range(1 + PASSES)][1:]


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


def flops_by_formula(subject: Subject) -> tuple[int, int]:
    """Return the FLOPs of a training step by accounting: with weights, and of queries with keys, half of the square."""
    c = subject.config
    how: dict[str, Any] = {"recompute": c.train.recompute, "dsa_stage": c.train.dsa_stage}
    found = accounting.step_flops(c.model, batch_size=subject.rows, seq_len=c.seq_len, **how)
    of_context = ("over the context", "scores of the indexer", "loss of the indexer")
    context = sum(flops for name, flops in found.by_module.items() if name.endswith(of_context))
    return found.total - context, context


def flops_by_counter(operations: Sequence[CountedOperation]) -> tuple[int, int]:
    """Return the same as counted, without those of the optimizer."""
    model = [op for op in operations if op.flops and "muon" not in op.name]
    weights = sum(op.flops for op in model if op.kind in OF_WEIGHTS)
    return weights, sum(op.flops for op in model) - weights


def training_roofline(subject: Subject) -> Section:
    """Return the section of a training step."""
    assert subject.prices is not None, "without rates there is no roof"
    roofs = subject.prices.rates.roofs
    passes = passes_of(subject.step, roofs)
    counted, formula = flops_by_counter(passes[0]), flops_by_formula(subject)
    half = "the formula counts the half of the square that the mask leaves"
    figures = [
        Figure(
            question="roofline",
            case={"products": name},
            metric="flops",
            unit="FLOP",
            measured=measured,
            predicted=predicted,
            bound=bool(note),
            note=note,
        )
        for name, measured, predicted, note in zip(
            ("with weights", "of queries with keys"), counted, formula, ("", half), strict=True
        )
    ]
    words = f"Products with weights take {counted[0] / 1e9:.2f} GFLOP a step, {formula[0] / 1e9:.2f} by formula."
    return section_of(points_of(passes, roofs), roofs, subject.config.train.dtype, figures, words)


def decoding_roofline(subject: DecodingSubject) -> Section:
    """Return the section of a decoding step."""
    assert subject.prices is not None, "without rates there is no roof"
    roofs, batch, keys = subject.prices.rates.roofs, subject.batch, subject.context + 1
    passes = passes_of(subject.run, roofs)
    flops = accounting.decode_flops_per_token(subject.config, context=keys).total
    dtypes: dict[str, Any] = {"dtype": subject.weight_dtype, "cache_dtype": subject.compute_dtype}
    nbytes = accounting.decode_bytes_per_token(subject.config, context=keys, batch=batch, **dtypes).total
    counted = (sum(op.flops for op in passes[0]) / batch, sum(op.bytes for op in passes[0]) / batch)
    figures = [
        Figure(
            question="roofline",
            case={"of": "a token"},
            metric=metric,
            unit=unit,
            measured=measured,
            predicted=predicted,
        )
        for metric, unit, measured, predicted in zip(
            ("flops", "bytes"), ("FLOP", "bytes"), counted, (flops, nbytes), strict=True
        )
    ]
    words = (
        f"A token takes {counted[0] / 1e6:.2f} MFLOP, {flops / 1e6:.2f} by formula, and moves "
        f"{counted[1] / 1e6:.2f} MB, {nbytes / 1e6:.2f} by formula."
    )
    about = " Each block's operations are timed apart, which takes longer than the one call that decodes."
    return section_of(points_of(passes, roofs), roofs, subject.compute_dtype, figures, words, about)


def section_of(
    points: Sequence[RoofPoint], roofs: Roofs, dtype: str, figures: Sequence[Figure], words: str, about: str = ""
) -> Section:
    """Return the section of a page from operations, the figures of their sums, and a sentence about these."""
    total = sum(point.seconds for point in points)
    peak = roofs.peak.get(dtype, max(roofs.peak.values()))
    ridge = peak / roofs.bandwidth
    shown = [p for p in points if p.seconds >= LEAST_SHARE * total and p.flops and p.bytes]
    memory = sum(p.seconds for p in points if p.intensity < ridge) / total
    of_operations = [
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
        f"is the limit. {words}",
        figures=[*figures, *of_operations],
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
    named = {kind: [kind] for kind in kinds[:MOST_KINDS]} | {"others": kinds[MOST_KINDS:]}
    for label, members in named.items():
        some = [p for p in points if p.kind in members]
        x, y = [p.intensity for p in some], [p.flops / p.seconds for p in some]
        series += [Series(label=label, kind="points", x=x, y=y)] if some else []
    return Plot(title="Operations of a step", x="FLOPs a byte", y="FLOP/s", series=series, log_x=True, log_y=True)
