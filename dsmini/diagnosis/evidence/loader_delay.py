"""Loader delay: how much later may a batch come before steps take longer?

Each batch is held back by d, a share of a step. With w workers a step takes

    T(d) = max(busy, (B + d) / w)        B: seconds to prepare a batch, busy: seconds of computing, as in predictions.py
    T(d) = computing + B + d             without workers

so that T is flat until d exceeds the slack, w busy - B, and then grows by 1 / w for each second.

Worked example: one worker, 200 ms of computing, batches of 20 ms. The slack is 180 ms. Held back by 100 ms a step takes
200 ms as before, by 200 ms it takes 220, by 400 it takes 420.
"""

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from dsmini.diagnosis.evidence.evidence import Evidence, in_ms, in_turns, none_of, patched, timed
from dsmini.diagnosis.predictions import BatchTime, shape_of, time_batches, waiting_seconds
from dsmini.diagnosis.subject import Subject
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Plot, Section, Series

SHARES = (0.0, 0.5, 1.0, 2.0)
"""Delays, in steps."""


@dataclass(frozen=True, kw_only=True)
class DelayedSteps:
    """Seconds of steps whose batches come later."""

    delays: Sequence[float]
    taken: Sequence[Sequence[float]]
    """Seconds of each turn, by delay."""
    predicted: Sequence[float] | None
    slack: float
    """Seconds that a batch may come later, by the steps measured."""
    predicted_slack: float | None
    workers: int


def slack_of(delays: Sequence[float], seconds: Sequence[float], workers: int) -> float:
    """Return where the level of no delay meets the line of slope 1 / w through the last point; 0 without workers."""
    if workers == 0:
        return 0.0
    return max(0.0, delays[-1] - workers * (seconds[-1] - seconds[0]))


def predicted_steps(delays: Sequence[float], computing: float, batch: BatchTime, workers: int) -> list[float]:
    """Return the predicted seconds of a step for each delay."""
    later = [replace(batch, seconds=batch.seconds + delay) for delay in delays]
    return [computing + waiting_seconds(each, computing, workers) for each in later]


def numbers(subject: Subject, rates: Rates | None, seconds: float) -> DelayedSteps:
    """Predict, then measure."""
    config, workers = subject.config, subject.config.data.workers
    predicted = slack = None
    if rates is None:
        step = statistics.median(subject.step().seconds for _ in range(3))
        delays = [share * step for share in SHARES]
    else:
        computing = forecast(shape_of(config, subject.rows, config.train.dtype), rates).seconds
        batch = time_batches(subject)
        (plain,) = predicted_steps([0.0], computing, batch, workers)
        delays = [share * plain for share in SHARES]
        predicted = predicted_steps(delays, computing, batch, workers)
        slack = max(0.0, workers * plain - batch.seconds)
    with delayed(subject) as delay:
        arms = {f"{share:g}": partial(_turn, subject, delay, d) for share, d in zip(SHARES, delays, strict=True)}
        taken = list(in_turns(arms, seconds).values())
    return DelayedSteps(
        delays=delays,
        taken=taken,
        predicted=predicted,
        slack=slack_of(delays, [statistics.median(each) for each in taken], workers),
        predicted_slack=slack,
        workers=workers,
    )


@contextmanager
def delayed(subject: Subject) -> Iterator[Callable[[float], None]]:
    """Hold every batch back; yield what sets by how many seconds. Batches still held at the end are let go."""
    loader, over, held = subject.trainer.loader, threading.Event(), [0.0]
    plain = loader.prepared

    def prepared(request: tuple[int, int]) -> tuple[Tensor, Tensor]:
        over.wait(held[0])
        return plain(request)

    def delay(seconds: float) -> None:
        held[0] = seconds

    try:
        with patched(loader, "prepared", prepared):
            yield delay
    finally:
        over.set()


def _turn(subject: Subject, delay: Callable[[float], None], seconds: float) -> float:
    """Return the mean seconds of the steps that count: several workers deliver in bursts."""
    delay(seconds)
    workers = subject.config.data.workers
    for _ in range(1 + workers):  # batches started before, and the first that comes in another rhythm
        subject.step()
    return statistics.fmean(subject.step().seconds for _ in range(max(1, workers)))


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    middle = [statistics.median(each) for each in found.taken]
    said: Sequence[float | None] = found.predicted or [None] * len(SHARES)
    figures = [
        timed("loader_delay", {"delay in steps": share}, taken, guess)
        for share, taken, guess in zip(SHARES, found.taken, said, strict=True)
    ]
    slope = "as much" if found.workers <= 1 else f"1/{found.workers} of it"
    note = f"a batch may come this much later; beyond it a step grows by {slope}"
    figures.append(
        Figure(
            question="loader_delay",
            case={"delay in steps": "slack"},
            metric="slack",
            unit="s",
            measured=found.slack,
            predicted=found.predicted_slack,
            note=note,
        )
    )
    x = [1e3 * delay for delay in found.delays]
    series = in_ms(x, middle, None, bars=False)
    if found.predicted is not None:
        corner = [*x, 1e3 * (found.predicted_slack or 0.0)]
        y = [*found.predicted, found.predicted[0]]
        points = sorted(zip(corner, y, strict=True))
        line = Series(label="p", x=[a for a, _ in points], y=[1e3 * b for _, b in points], dashed=True, of="measured")
        series.append(line)
    return Section(
        name="loader_delay",
        title="How much later may a batch come?",
        finding=f"A batch may come {1e3 * found.slack:.0f} ms later before a step of {1e3 * middle[0]:.0f} ms grows"
        + (f"; {1e3 * found.predicted_slack:.0f} ms were predicted." if found.predicted_slack is not None else "."),
        figures=figures,
        plots=[Plot(title="A step whose batch comes later", x="delay of a batch, ms", y="step, ms", series=series)],
        about="Each batch is held back in the thread that prepares it. A held thread takes no core.",
    )


LOADER_DELAY = Evidence(name="loader_delay", why_not=none_of, run=run, weight=14.0, steps=45)
