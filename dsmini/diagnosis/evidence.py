"""Evidence: experiments next to the verdict, which do not enter it: batches, threads, and the roofline.

A sweep is arms at several places. One over batches fits a line through its arms, all with the same relative error:

    T(n) = a + b n,    knee = a / b        what does not depend on the size, such as the optimizer, is half at the knee

Worked example: a = 60 ms, b = 10 ms. The knee is at 6 sequences. A batch of 8 takes 140 ms, 17.5 a sequence; one of 16
takes 220 ms, 13.75 a sequence: 21 % of a token's time goes. From 32 to 64 it is 8 %.

The roofline says which limits each operation of a step, memory or arithmetic. An operation with F FLOPs that must move
b bytes cannot be faster than

    rate <= min(peak, F / b * bandwidth)

Where F / b is below peak / bandwidth, memory is its limit. An operation without products counts one FLOP for each
element that it writes. Each is timed by itself while a few steps run; its time includes the call. Decoding one sequence
does two FLOPs with each weight that it reads, far below the ridge.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from dsmini.diagnosis.arms import Arm, Comparison, measure, percent, predict
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.pages import plot_of, sentence_of, table_of
from dsmini.diagnosis.training import Subject
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.machine import cores
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.price import quiet
from dsmini.measure.roofs import Roofs
from dsmini.report import Figure, Plot, Section, Series
from dsmini.report.units import human, plural

LEAST_TURNS, MOST_TURNS = 2, 15
PASSES = 3
LEAST_SHARE = 0.005
"""Share of the time below which an operation is left out."""
LEAST_INTENSITY = 0.01
"""FLOPs a byte below which an operation is not drawn: it only looks at its bytes."""
MOST_KINDS = 4
"""Number of kinds that the plot names, by their time."""
ABOUT_BATCHES = (
    "Batches are in memory, and rows of caches random. How much a larger batch teaches is not measured here."
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """An experiment."""

    name: str
    why_not: str | None = None
    """Reason why it cannot be made; None if it can."""
    run: Callable[[float], tuple[Section, Comparison | None]]
    """Makes it in about this many seconds."""


def gather(
    found: Diagnosis,
    subject: Subject | DecodingSubject,
    seconds: float,
    on_part: Callable[[float, str], None] = lambda done, what: None,
) -> None:
    """Add all experiments that apply and fit into the seconds. An interruption keeps those that are done.

    Args:
        on_part: told the share that is done and what is next.
    """
    until = time.perf_counter() + seconds
    if subject.prices is not None:
        subject.prices.of.until, subject.prices.of.on_part = until, quiet
    every = all_evidence(subject, found.seconds)
    found.not_tried |= {each.name: each.why_not for each in every if each.why_not is not None}
    left = [each for each in every if each.why_not is None]
    try:
        for number, each in enumerate(left):
            on_part(number / len(left), each.name)
            share = (until - time.perf_counter()) / (len(left) - number)
            if share <= 0:
                found.not_tried[each.name] = "the time was over"
                continue
            try:
                section, compared = each.run(share)
            except (ValueError, RuntimeError, MemoryError) as error:  # the verdict stands without it
                lines = str(error).splitlines() or [type(error).__name__]
                found.not_tried[each.name] = f"it failed: {lines[0]}"
                continue
            found.sections.append(section)
            if compared is not None:
                found.sweeps[each.name] = compared
                if compared.stopped:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        done = {section.name for section in found.sections} | found.not_tried.keys()
        found.not_tried |= {each.name: "it was interrupted" for each in left if each.name not in done}
        found.warnings.append("It was interrupted after the verdict; some evidence is missing.")
        found.stopped = True
    on_part(1.0, "evidence")


def all_evidence(subject: Subject | DecodingSubject, step: float) -> list[Evidence]:
    """Return all evidence of training or decoding.

    Args:
        step: seconds of a plain step.
    """
    prices, used, most = subject.prices, torch.get_num_threads(), cores()
    own, *sizes = subject.batch_sizes()
    if subject.work == "training":
        of_batch = "Set train.batch_size = {}, if fewer and larger steps learn as much from as many tokens."
        of_threads = "Set train.threads = {}."
    else:
        of_batch = "Decode {} sequences at a time: give dsmini.generate several prompts."
        of_threads = "Decode with {} threads."
    batches = [
        Arm(
            name=f"batch x {n / own:g}" if n != own else f"batch {n}",
            apply=partial(subject.batch_of, n),
            advice=of_batch.format(n),
            predict=lambda p, n=n: p.seconds(batch=n),
            tokens=n / own,
            at=float(n),
        )
        for n in (own, *sizes)
    ]
    numbers = {2**i for i in range(most.bit_length()) if 2**i <= most} | {most}
    threads = [
        Arm(
            name=plural(n, "thread"),
            apply=partial(subject.threads, n),
            axis="Machine",
            advice=of_threads.format(n),
            predict=lambda p, n=n: p.threads(n),
            at=float(n),
        )
        for n in (used, *sorted(numbers - {used}))
    ]
    alone = "this process may use one core only" if most == 1 else None
    alone = f"products run on {subject.device}" if subject.device.type != "cpu" else alone
    no_roof = None if prices else "this machine's rates are not measured"
    if subject.is_compiled:
        no_roof = "the model is compiled; run without --train.compile"

    def roof(_seconds: float) -> tuple[Section, None]:
        assert prices is not None, "without prices there is no roof"
        return roofline(subject.run, prices.of.roofs, subject.compute_dtype), None

    return [
        Evidence(name="batches", run=partial(sweep, "batches", batches, prices, step)),
        Evidence(name="threads", run=partial(sweep, "threads", threads, prices, step), why_not=alone),
        Evidence(name="roofline", run=roof, why_not=no_roof),
    ]


def sweep(name: str, arms: Sequence[Arm], prices: object, step: float, seconds: float) -> tuple[Section, Comparison]:
    """Let arms take turns of one step, the first as the work is, without the longest where the time is short."""
    until, tried = time.perf_counter() + seconds, list(arms)
    while len(tried) > 1 and (1 + LEAST_TURNS) * step * sum(arm.tokens for arm in tried) > seconds:
        tried.remove(max(tried[1:], key=lambda arm: arm.tokens))
    tried = [replace(arm, uncounted=0, counted=1) for arm in tried]
    compared = measure(tried, predict(tried, prices), count=MOST_TURNS, until=until)
    finding, x = sentence_of(compared), "threads"
    title, about = "How much faster is a step with more cores?", "Only what waits for arithmetic scales with cores."
    if name == "batches":
        title, x, about = "What does a token cost in a larger batch?", "sequences", ABOUT_BATCHES
        fixed, each = line_through(compared)
        if each > 0:
            finding = f"The knee is at {max(0.0, fixed / each):.1f} sequences. {finding}"
    shown = {"tables": [table_of(compared)], "plots": [plot_of(compared, title, x)]}
    return Section(name=name, title=title, finding=finding, about=about, **shown), compared


def line_through(compared: Comparison) -> tuple[float, float]:
    """Return a and b of the line a + b n through the measured arms."""
    placed = [arm for arm in compared.arms if arm.name in compared.turns.seconds]
    at, seconds = [arm.at or 0.0 for arm in placed], [compared.turns.median(arm.name) for arm in placed]
    if len(placed) < 2:
        return 0.0, 0.0
    each, fixed = np.polyfit(at, seconds, 1, w=1 / np.asarray(seconds))
    return float(fixed), float(each)


# --- the roofline


@dataclass(frozen=True, kw_only=True)
class Point:
    """All operations of one name and shape in a step; seconds are means over some passes."""

    kind: str
    name: str
    shape: str
    seconds: float
    roof: float
    """Seconds of its bytes from memory, or of its products, whichever is longer."""
    flops: int
    intensity: float
    """FLOPs a byte."""


def points_of(passes: Sequence[Sequence[CountedOperation]], roofs: Roofs, dtype: str) -> list[Point]:
    """Return the operations of a step, longest first. Args: as of roofline."""
    groups: dict[tuple[str, str, str], list[CountedOperation]] = {}
    for op in (op for operations in passes for op in operations):
        shape = " x ".join("[" + ", ".join(map(str, s)) + "]" for s in op.shape[:2])
        groups.setdefault((op.kind, op.name, shape), []).append(op)
    n, found = len(passes), list[Point]()
    for (kind, name, shape), ops in groups.items():
        flops = sum(op.flops or op.written // op.dtype.itemsize for op in ops)
        point = Point(
            kind=kind,
            name=name,
            shape=shape,
            seconds=sum(op.seconds for op in ops) / n,
            roof=sum(roofs.least_seconds(op.cold, op.flops, dtype) for op in ops) / n,
            flops=flops // n,
            intensity=flops / max(1, sum(op.bytes for op in ops)),
        )
        found.append(point)
    return sorted(found, key=lambda point: -point.seconds)


def roofline(step: Callable[[], object], roofs: Roofs, dtype: str) -> Section:
    """Return the section of a page: operations under the roof of this machine.

    Args:
        dtype: of the products.
    """
    passes = [count(step, roofs.cache_bytes).operations for _ in range(1 + PASSES)][1:]
    peak, points = roofs.peak_of(dtype), points_of(passes, roofs, dtype)
    ridge, total = peak / roofs.memory, sum(p.seconds for p in points)
    memory = sum(p.seconds for p in points if p.intensity < ridge) / total
    shown = [p for p in points if p.seconds >= LEAST_SHARE * total and p.flops]
    figures = [
        Figure(
            question="roofline",
            case={"kind": p.kind, "operation": p.name, "shape": p.shape, "intensity": p.intensity},
            metric="seconds_of_a_step",
            unit="s",
            measured=p.seconds,
            predicted=p.roof,
            bound=True,
        )
        for p in shown
    ]
    return Section(
        name="roofline",
        title="Which operations does memory limit, and which arithmetic?",
        finding=f"{percent(memory)} of the time of operations lies below {ridge:.0f} FLOPs a byte, where memory or a "
        f"cache is the limit. Products take {human(sum(op.flops for op in passes[0]), 'FLOP')} a step.",
        figures=figures,
        plots=[roof_plot(shown, roofs.memory, peak)],
        about="Above the sloping roof an operation's bytes come from a cache. Where one call decodes a step, the "
        "operations of its blocks are timed apart, which takes longer.",
    )


def roof_plot(points: Sequence[Point], bandwidth: float, peak: float) -> Plot:
    """Return the operations under the roof of bandwidth and peak."""
    points = [p for p in points if p.intensity >= LEAST_INTENSITY]
    ridge, at = peak / bandwidth, [p.intensity for p in points]
    low, high = min([*at, ridge]) / 2, max([4 * ridge, *(2 * each for each in at)])
    series = [Series(label="roof", x=[low, ridge, high], y=[low * bandwidth, peak, peak], dashed=True)]
    named = list(dict.fromkeys(p.kind for p in points))[:MOST_KINDS]
    for label in (*named, "others"):
        some = [p for p in points if (p.kind if p.kind in named else "others") == label]
        x, y = [p.intensity for p in some], [p.flops / p.seconds for p in some]
        series += [Series(label=label, kind="points", x=x, y=y)] if some else []
    return Plot(title="Operations of a step", x="FLOPs a byte", y="FLOP/s", series=series, log_x=True, log_y=True)
