"""Evidence: experiments next to the verdict, which do not enter it. Most are arms at several places: a sweep.

    training   timeline, roofline, batch_sweep, threads
    decoding   context_slope, batches, threads, roofline

A sweep over a size fits a line through its arms, all with the same relative error:

    T(n) = a + b n,    knee = a / b        what does not depend on the size, such as the optimizer, is half at the knee

Worked example: a = 60 ms, b = 10 ms. The knee is at 6 sequences. A batch of 8 takes 140 ms, 17.5 a sequence; one of 16
takes 220 ms, 13.75 a sequence: 21 % of a token's time goes. From 32 to 64 it is 8 %.

The roofline says which limits each operation of a step, memory or arithmetic. An operation with F FLOPs that must move
b bytes cannot be faster than

    rate <= min(peak, F / b * bandwidth)

Where F / b is below peak / bandwidth, memory is its limit. An operation without products counts one FLOP for each
element that it writes. Each is timed by itself while a few steps run; its time includes the call. Decoding one sequence
does two FLOPs with each weight that it reads, far below the ridge.

FLOPs are also known by formula (dsmini.accounting), without the optimizer. In training the formula takes the half of
the square of queries and keys that the mask leaves. What runs is between it and the whole square.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dsmini import accounting
from dsmini.accounting import kv_bytes_per_token, mha_twin
from dsmini.diagnosis.arms import Arm, Comparison, Step, measure, patched, predict, words
from dsmini.diagnosis.contention import cores
from dsmini.diagnosis.decoding import DecodingSubject, no_forms, no_mha
from dsmini.diagnosis.decoding_steps import EXPANDED, MHA, PLAIN, Point, Variant, timed
from dsmini.diagnosis.pages import Gathered, plot_of, sentence_of, table_of
from dsmini.diagnosis.training import Stub, Subject
from dsmini.inference.fused import MOST_TOKENS
from dsmini.machine import memory_bytes
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.forecast import forecast
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.rates import Roofs
from dsmini.nn.cache import KEY_STEP
from dsmini.report import Figure, Plot, Section, Series
from dsmini.report.units import human

LEAST_TURNS, MOST_TURNS = 2, 15
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
BATCHES = (1, 2, 4, 8, 16, 32)
"""Sequences that are decoded together; above MOST_TOKENS other code decodes."""
CONTEXTS = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the longest context, which is LONGER contexts of the subject where the model allows it."""
LONGER = 4
MOST_MEMORY = 0.25
"""Share of memory that a sweep's largest arm, or all of its caches together, may take."""
PHASE_STEPS = 10
PASSES = 3
LEAST_SHARE = 0.005
"""Share of the time below which an operation is left out."""
LEAST_INTENSITY = 0.01
"""FLOPs a byte below which an operation is not drawn: it only looks at its bytes."""
MOST_KINDS = 4
"""Number of kinds that the plot names, by their time."""
NO_RATES = "this machine's rates are not measured"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """An experiment."""

    name: str
    why_not: str | None = None
    """Reason why it cannot be made; None if it can."""
    run: Callable[[float], tuple[Section, Comparison | None]]
    """Makes it in about this many seconds."""


def gather(
    subject: Subject | DecodingSubject,
    step: float,
    seconds: float,
    on_part: Callable[[float, str], None] = lambda done, what: None,
) -> Gathered:
    """Make all experiments that apply and fit into the seconds. An interruption keeps those that are done.

    Args:
        step: seconds of a plain step.
        on_part: told the share that is done and what is next.
    """
    found, until = Gathered(), time.perf_counter() + seconds
    every = training_evidence(subject, step) if isinstance(subject, Subject) else decoding_evidence(subject, step)
    found.not_tried |= {each.name: each.why_not for each in every if each.why_not is not None}
    left = [each for each in every if each.why_not is None]
    try:
        for number, each in enumerate(left):
            on_part(number / len(left), each.name.replace("_", " "))
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
                found.compared[each.name] = compared
                if compared.stopped:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        done = {section.name for section in found.sections} | found.not_tried.keys()
        found.not_tried |= {each.name: "it was interrupted" for each in left if each.name not in done}
        found.stopped = True
    on_part(1.0, "evidence")
    return found


def sweep(
    name: str,
    arms: Sequence[Arm],
    step: float,
    say: Callable[[Comparison], str] = sentence_of,
    why_not: str | None = None,
    of: str = "",
) -> Evidence:
    """Return the experiment in which arms take turns of one step, the first as the work is.

    Args:
        say: returns the answer in a sentence.
        of: name of its words; "": that of the experiment.
    """
    said = words()["evidence"][of or name]

    def run(seconds: float) -> tuple[Section, Comparison]:
        start = time.perf_counter()
        tried = [replace(arm, uncounted=0, counted=1) for arm in affordable(arms, step, seconds)]
        predicted = predict(tried)
        compared = measure(tried, predicted, count=MOST_TURNS, until=start + seconds)
        shown = {"tables": [table_of(compared)], "plots": [plot_of(compared, said["title"], said["x"])]}
        section = Section(name=name, title=said["title"], finding=say(compared), about=said["about"], **shown)
        return section, compared

    return Evidence(name=name, why_not=why_not, run=run)


def affordable(arms: Sequence[Arm], step: float, seconds: float) -> list[Arm]:
    """Return the arms without those that take longest, until a few turns fit into the seconds."""
    left = list(arms)
    while len(left) > 1 and (1 + LEAST_TURNS) * step * sum(arm.cost for arm in left) > seconds:
        left.remove(max(left[1:], key=lambda arm: arm.cost))
    return left


def line_through(compared: Comparison, line: str = "measured") -> tuple[float, float]:
    """Return a and b of the line a + b n through the measured arms of a line."""
    placed = [arm for arm in compared.arms if arm.line == line and arm.name in compared.turns.seconds]
    at, seconds = [arm.at or 0.0 for arm in placed], [compared.turns.median(arm.name) for arm in placed]
    if len(placed) < 2:
        return seconds[0] if seconds else 0.0, 0.0
    each, fixed = np.polyfit(at, seconds, 1, w=1 / np.asarray(seconds))
    return float(fixed), float(each)


def knee_words(compared: Comparison) -> str:
    """Return where the knee is, and which batch is best."""
    fixed, each = line_through(compared)
    knee = f"The knee is at {max(0.0, fixed / each):.1f} sequences. " if each > 0 else ""
    return knee + sentence_of(compared)


def batch_arms(
    sizes: Sequence[int],
    apply: Callable[[int], AbstractContextManager[Step]],
    price: Callable[[int], float] | None,
    advice: str,
) -> list[Arm]:
    """Return an arm for each number of sequences, the one in use first."""
    own = sizes[0]
    return [
        Arm(
            name=f"batch x {n / own:g}" if n != own else f"batch {n}",
            apply=partial(apply, n),
            advice=advice.format(n),
            predict=price and partial(price, n),
            tokens=n / own,
            cost=n / own,
            at=float(n),
        )
        for n in sizes
    ]


def thread_sweep(
    subject: Subject | DecodingSubject, make: Callable[[int], AbstractContextManager[Step]], step: float, advice: str
) -> Evidence:
    """Return the sweep over numbers of threads: powers of two, all cores, and the one in use, which is first."""
    used, most = torch.get_num_threads(), cores()
    counts = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most} - {used})
    price = None if subject.prices is None else subject.prices.threads
    arms = [
        Arm(
            name=f"{n} threads",
            apply=partial(make, n),
            advice=advice.format(n),
            predict=price and partial(price, n),
            at=float(n),
        )
        for n in (used, *(n for n in counts if n != used))
    ]
    why_not = "this process may use one core only" if most == 1 else None
    if subject.device.type != "cpu":
        why_not = f"products run on {subject.device}"
    of = "training_threads" if isinstance(subject, Subject) else "decoding_threads"
    return sweep("threads", arms, step, why_not=why_not, of=of)


# --- training


def training_evidence(subject: Subject, step: float) -> list[Evidence]:
    """Return all evidence of training."""
    prices, config, device, rows = subject.prices, subject.config, subject.device, subject.rows
    compiled = "the model is compiled; run without --train.compile" if config.train.compile else None
    on_device = None if device.type == "cpu" else f"on {device} work continues after the call that starts it"

    @contextmanager
    def batch_of(n: int) -> Iterator[Step]:
        """Let steps take a number of sequences, which are in memory."""
        trainer = subject.trainer
        batch = trainer.loader.prepared((trainer.sequences, n))
        train = replace(config.train, batch_size=n, batch_start=None)
        with (
            patched(trainer, "config", replace(config, train=train)),
            patched(trainer, "loader", Stub(lambda _: batch)),
        ):
            yield lambda _base: subject.step().seconds

    @contextmanager
    def threads(n: int) -> Iterator[Step]:
        with subject.replayed() as step, subject.threads(n):
            yield step

    sizes = [round(rows * f) for f in FACTORS if rows * f >= config.train.grad_accum]
    sizes = [n for n in sizes if n % config.train.grad_accum == 0 and n != rows and fits(subject, n)]
    advice = "Set train.batch_size = {}, if fewer and larger steps learn as much from as many tokens."
    batches = batch_arms([rows, *sizes], batch_of, prices and prices.batch, advice)
    return [
        Evidence(name="timeline", why_not=on_device, run=lambda _: (timeline(subject), None)),
        Evidence(
            name="roofline",
            why_not=compiled or (None if prices else NO_RATES),
            run=lambda _: (training_roofline(subject), None),
        ),
        sweep("batch_sweep", batches, step, knee_words),
        thread_sweep(subject, threads, step, "Set train.threads = {}."),
    ]


def fits(subject: Subject, rows: int) -> bool:
    """Return if a step of this many sequences fits into memory, by its forecast; without one, up to twice the run's."""
    if rows <= subject.rows or subject.prices is None:
        return rows <= 2 * subject.rows
    needed = forecast(subject.prices.shape(rows), subject.prices.rates).process
    return needed < 2 * MOST_MEMORY * memory_bytes(subject.device)


def training_roofline(subject: Subject) -> Section:
    """Return the section of a training step's operations."""
    assert subject.prices is not None, "without rates there is no roof"
    c, train = subject.config, subject.config.train
    how: dict[str, Any] = {"recompute": train.recompute, "dsa_stage": train.dsa_stage}
    formula = accounting.step_flops(c.model, batch_size=subject.rows, seq_len=c.seq_len, **how).total
    about = " The formula takes the half of the square of queries and keys that the mask leaves."
    return roofline(subject.step, subject.prices.rates.roofs, train.dtype, formula, about)


def timeline(subject: Subject) -> Section:
    """Return the section of the seconds in which a step waits, goes forward and backward, and updates."""
    totals: dict[str, float] = {name: 0.0 for name in ("wait", "forward", "backward", "optimizer")}
    last, name = 0.0, "wait"

    def begins(phase: str) -> None:
        nonlocal last, name
        now = time.perf_counter()
        totals[name] += now - last
        last, name = now, phase

    subject.step()
    with patched(subject.trainer, "phase", begins):
        for _ in range(PHASE_STEPS):
            last, name = time.perf_counter(), "wait"
            subject.step()
            begins("wait")
    ms = {part: 1e3 * seconds / PHASE_STEPS for part, seconds in totals.items()}
    known: dict[str, Any] = {"question": "timeline", "metric": "seconds", "unit": "s"}
    bars = [Series(label="measured", x=(), y=list(ms.values()), kind="bars")]
    return Section(
        name="timeline",
        title="When does a step wait, compute and update?",
        finding=f"In ms: {', '.join(f'{part} {each:.1f}' for part, each in ms.items())}.",
        figures=[Figure(case={"part": part}, measured=each / 1e3, **known) for part, each in ms.items()],
        plots=[Plot(title="A step from its start to its end", x="part", y="ms", series=bars, labels=list(ms))],
        about=f"Means of {PHASE_STEPS} steps.",
    )


# --- decoding


def decoding_evidence(subject: DecodingSubject, step: float) -> list[Evidence]:
    """Return all evidence of decoding."""
    prices, c, batch = subject.prices, subject.config, subject.batch
    made: dict[object, Callable[[], float]] = {}

    @contextmanager
    def at(variant: Variant, n: int, context: int) -> Iterator[Step]:
        if (variant, n, context) not in made:
            made[variant, n, context] = timed(variant.steps(subject.model, Point(batch=n, context=context)))
        yield lambda _base: made[variant, n, context]()

    forms = {"absorbed" if no_forms(c) is None else c.attention.upper(): PLAIN}
    forms |= {"expanded": EXPANDED} if no_forms(c) is None else {}
    forms |= {"MHA": MHA} if no_mha(c) is None else {}
    slopes = [
        Arm(
            name=f"{form} {n}",
            apply=partial(at, variant, batch, n),
            predict=prices and partial(prices.seconds, variant, context=n),
            line=form,
            at=float(n),
        )
        for form, variant in forms.items()
        for n in contexts_of(subject, len(forms))
    ]

    def slope_words(compared: Comparison) -> str:
        each = [f"{1e6 * line_through(compared, form)[1]:.3g} us {form}" for form in forms]
        bound = ""
        if prices is not None:
            nbytes = kv_bytes_per_token(c, 2 if subject.compute_dtype == "bfloat16" else 4)
            least = 1e6 * batch * nbytes / prices.rates.roofs.bandwidth
            bound = f"; reading its {nbytes:,.0f} bytes from memory takes {least:.3g} us"
        return f"One more cached token costs {', '.join(each)}{bound}."

    sizes = [n for n in BATCHES if n <= MOST_TOKENS and n != batch]
    row = kv_bytes_per_token(c, 4) * subject.context
    while sizes and (batch + sum(sizes)) * row > MOST_MEMORY * memory_bytes(subject.device):
        sizes.pop()
    advice = "Decode {} sequences at a time: give dsmini.generate several prompts."
    price = prices and (lambda n: prices.seconds(batch=n))
    batches = batch_arms([batch, *sizes], lambda n: at(PLAIN, n, subject.context), price, advice)
    no_rates = None if prices else NO_RATES
    few = "the model allows too few cached tokens for a line" if c.max_seq_len < 16 else None
    return [
        sweep("context_slope", slopes, step, slope_words, few),
        sweep("batches", batches, step, knee_words),
        thread_sweep(subject, subject.threads, step, "Decode with {} threads."),
        Evidence(name="roofline", why_not=no_rates, run=lambda _: (decoding_roofline(subject), None)),
    ]


def decoding_roofline(subject: DecodingSubject) -> Section:
    """Return the section of a decoding step's operations."""
    assert subject.prices is not None, "without rates there is no roof"
    formula = accounting.decode_flops_per_token(subject.config, context=subject.context + 1).total
    about = " Each block's operations are timed apart, which takes longer than the one call that decodes."
    roofs = subject.prices.rates.roofs
    return roofline(subject.run, roofs, subject.compute_dtype, round(subject.batch * formula), about)


def contexts_of(subject: DecodingSubject, forms: int) -> list[int]:
    """Return the cached tokens to try, ascending: as many as the model allows and memory holds.

    With as many rows as a multiple of KEY_STEP, the new one included, nothing needs a mask.
    """
    c = subject.config
    most = min(c.max_seq_len - 1, LONGER * subject.context)
    row = kv_bytes_per_token(mha_twin(c) if no_mha(c) is None else c, 4) * subject.batch * forms * sum(CONTEXTS)
    most = max(1, min(most, int(MOST_MEMORY * memory_bytes(subject.device) / row)))
    wanted = [max(1, round((most * share + 1) / KEY_STEP)) * KEY_STEP - 1 for share in CONTEXTS]
    return sorted({n if n <= most else max(1, round(most * share)) for n, share in zip(wanted, CONTEXTS, strict=True)})


# --- the roofline


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
