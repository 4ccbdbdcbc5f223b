"""Batch sweep: what does a token cost in a smaller or larger batch?

A step has a part that does not depend on the batch, such as the optimizer, and one that grows with it:

    T(n) = a + b n,  knee = a / b

At the knee both parts are equal. Below it a step is flat, and tokens cost as much as there are few of them; far above
it the time of a token is b. Without waiting: every step has its batch in memory.

Worked example: a = 60 ms, b = 10 ms. The knee is at 6 sequences. A batch of 8 takes 140 ms, 17.5 a sequence; one of 16
takes 220 ms, 13.75 a sequence: 21 % of a token's time goes. From 32 to 64 it is 8 %.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from dsmini.diagnosis.evidence.evidence import (
    LEAST_TURNS,
    Evidence,
    in_ms,
    in_turns,
    medians,
    none_of,
    patched,
    timed,
    to_try,
)
from dsmini.diagnosis.predictions import shape_of
from dsmini.diagnosis.subject import Stub, Subject
from dsmini.machine import memory_bytes
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Plot, Section

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
MOST_MEMORY = 0.5
"""Share of the memory that a step may take by its forecast."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSweep:
    """Seconds of steps by batch, in sequences, ascending."""

    batches: Sequence[int]
    taken: Sequence[Sequence[float]]
    predicted: Sequence[float] | None
    knee: float
    """Number of sequences."""
    predicted_knee: float | None


def knee_of(batches: Sequence[int], seconds: Sequence[float]) -> float:
    """Return a / b of the line a + b n, all batches fitted with the same relative error."""
    if len(batches) < 2:
        return 0.0
    each, fixed = np.polyfit(batches, seconds, 1, w=1 / np.asarray(seconds))
    return max(0.0, float(fixed / each)) if each > 0 else float("inf")


def batches_of(
    rows: int, parts: int, fits: Callable[[int], bool], cost: Callable[[int], float], room: float
) -> list[int]:
    """Return the batches to try, ascending: multiples of the parts of a step that fit into memory and time.

    Args:
        parts: train.grad_accum.
        cost: returns about how many seconds a step takes.
        room: seconds of all steps.
    """
    tried = [round(rows * f) for f in FACTORS if rows * f >= parts and rows * f % parts == 0]
    tried = [n for n in tried if n <= rows or fits(n)]
    while sum(map(cost, tried)) * (1 + LEAST_TURNS) > room and tried[-1] > rows:
        tried.pop()
    return tried


def numbers(subject: Subject, rates: Rates | None, seconds: float) -> BatchSweep:
    """Predict, then measure."""
    config, rows, parts = subject.config, subject.rows, subject.config.train.grad_accum
    predicted = None
    if rates is None:
        one = statistics.median(subject.step().seconds for _ in range(3))
        fits, cost = lambda n: n <= 2 * rows, lambda n: one * n / rows
    else:
        wanted = [round(rows * f) for f in FACTORS]
        seen = {n: forecast(shape_of(config, n, config.train.dtype), rates) for n in wanted if n and n % parts == 0}
        most = MOST_MEMORY * memory_bytes(subject.trainer.device)
        fits, cost = lambda n: seen[n].process < most, lambda n: seen[n].seconds
        predicted = {n: each.seconds for n, each in seen.items()}
    batches = batches_of(rows, parts, fits, cost, seconds)
    with batch_of(subject) as step:
        found = in_turns({str(n): lambda n=n: step(n) for n in batches}, seconds)
    said = None if predicted is None else [predicted[n] for n in batches]
    return BatchSweep(
        batches=batches,
        taken=list(found.values()),
        predicted=said,
        knee=knee_of(batches, medians(found)),
        predicted_knee=None if said is None else knee_of(batches, said),
    )


@contextmanager
def batch_of(subject: Subject) -> Iterator[Callable[[int], float]]:
    """Yield what takes a step of a number of sequences, which are in memory, and returns its seconds."""
    trainer, kept = subject.trainer, {}
    loader = trainer.loader

    def step(rows: int) -> float:
        if rows not in kept:
            kept[rows] = loader.prepared((trainer.sequences, rows))
        train = dataclasses.replace(trainer.config.train, batch_size=rows, batch_start=None)
        with (
            patched(trainer, "config", dataclasses.replace(trainer.config, train=train)),
            patched(trainer, "loader", Stub(lambda _: kept[rows])),
        ):
            return subject.step().seconds

    yield step


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found, tokens = numbers(subject, rates, seconds), subject.config.seq_len
    middle = [statistics.median(each) for each in found.taken]
    figures: list[Figure] = []
    for i, n in enumerate(found.batches):
        said = None if found.predicted is None else found.predicted[i]
        figures.append(timed("batch_sweep", {"batch": n}, found.taken[i], said))
        figures.append(
            Figure(
                question="batch_sweep",
                case={"batch": n},
                metric="tokens_per_s",
                unit="tokens/s",
                measured=n * tokens / middle[i],
                predicted=None if said is None else n * tokens / said,
            )
        )
    at = found.batches.index(subject.rows)
    for i, n in enumerate(found.batches):
        if n > subject.rows:
            share = n / subject.rows
            per_token = [each / share for each in found.taken[i]]
            said = None if found.predicted is None else 1 - found.predicted[i] / share / found.predicted[at]
            action = f"Set train.batch_size = {n}, if fewer and larger steps learn as much from as many tokens."
            figures.append(to_try("batch_sweep", f"batch x {share:g}", action, per_token, middle[at], said))
    figures.append(
        Figure(
            question="batch_sweep",
            case={"batch": "knee"},
            metric="knee",
            unit="sequences",
            measured=found.knee,
            predicted=found.predicted_knee,
            note="at the knee, what does not depend on the batch is half of a step",
        )
    )
    x = [float(n) for n in found.batches]
    series = in_ms(x, middle, found.predicted, bars=False)
    last = 1 - middle[-1] / found.batches[-1] / (middle[at] / subject.rows)
    return Section(
        name="batch_sweep",
        title="What does a token cost in a larger batch?",
        finding=f"The knee is at {found.knee:.1f} sequences; the run has {subject.rows}. In a batch of "
        f"{found.batches[-1]} a token takes {abs(last):.0%} {'less' if last >= 0 else 'more'} time.",
        figures=figures,
        plots=[
            Plot(title="A step by its batch", x="sequences", y="ms", series=series, log_x=True, log_y=True),
        ],
        about="Every step has its batch in memory. How much a larger batch teaches is not measured here.",
    )


BATCH_SWEEP = Evidence(name="batch_sweep", why_not=none_of, run=run, weight=16.0, steps=8)
