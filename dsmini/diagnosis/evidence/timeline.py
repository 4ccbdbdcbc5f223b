"""Time line: when does a step wait, go forward, go backward, and update?

Clocks stand around what the trainer calls: the losses are the forward, the rest of forward and backward, without
waiting, is the backward, and all after it is the update: clipping, the optimizer, the routing bias, the average.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmini.diagnosis.evidence.evidence import Evidence, in_ms, patched, timed
from dsmini.diagnosis.evidence.sections import PHASES, predicted_sections
from dsmini.diagnosis.predictions import shape_of, time_batches, waiting_seconds
from dsmini.diagnosis.subject import Subject
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates
from dsmini.report import Plot, Section

MOST_STEPS = 20
PARTS = ("wait", *PHASES)


@dataclass(frozen=True, kw_only=True)
class StepPhases:
    """Seconds of the parts of steps."""

    taken: Mapping[str, Sequence[float]]
    predicted: Mapping[str, float]
    """Empty without rates."""


def numbers(subject: Subject, rates: Rates | None, seconds: float) -> StepPhases:
    """Predict, then measure."""
    predicted: dict[str, float] = {}
    if rates is not None:
        shape = shape_of(subject.config, subject.rows, subject.config.train.dtype)
        priced = predicted_sections(shape, rates)
        computing, workers = forecast(shape, rates).seconds, subject.config.data.workers
        predicted = {"wait": waiting_seconds(time_batches(subject), computing, workers)} | {
            n: priced[n] for n in PHASES
        }
    taken: dict[str, list[float]] = {name: [] for name in PARTS}
    start = time.perf_counter()
    for number in range(1 + MOST_STEPS):
        parts = _phases(subject)
        if number:
            for name, each in parts.items():
                taken[name].append(each)
        if number >= 3 and time.perf_counter() - start > seconds:
            break
    return StepPhases(taken=taken, predicted=predicted)


def _phases(subject: Subject) -> dict[str, float]:
    """Return the seconds of the parts of one step."""
    trainer = subject.trainer
    passes: Any = trainer.passes
    losses, forward_backward = passes.losses, trainer.forward_backward
    forward = both = waited = 0.0

    def timed_losses(*args: Any, **kwargs: Any) -> Any:
        nonlocal forward
        start = time.perf_counter()
        found = losses(*args, **kwargs)
        forward += time.perf_counter() - start
        return found

    def timed_both(rows: int) -> Any:
        nonlocal both, waited
        start = time.perf_counter()
        found = forward_backward(rows)
        both, waited = time.perf_counter() - start, found[2]
        return found

    with patched(passes, "losses", timed_losses), patched(trainer, "forward_backward", timed_both):
        whole = subject.step().seconds
    return {"wait": waited, "forward": forward, "backward": both - waited - forward, "update": whole - both}


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    figures = [
        timed("timeline", {"part": name}, taken, found.predicted.get(name), metric="seconds")
        for name, taken in found.taken.items()
    ]
    middle = {name: statistics.median(taken) for name, taken in found.taken.items()}
    said = [found.predicted[name] for name in middle] if found.predicted else None
    bars = in_ms((), list(middle.values()), said, bars=True)
    words = ", ".join(f"{name} {1e3 * each:.1f}" for name, each in middle.items())
    return Section(
        name="timeline",
        title="When does a step wait, compute and update?",
        finding=f"In ms, one after another: {words}.",
        figures=figures,
        plots=[Plot(title="A step from its start to its end", x="part", y="ms", series=bars, labels=list(middle))],
    )


def why_not(subject: Subject) -> str | None:
    """Return why clocks around calls would not time the work."""
    if subject.trainer.device.type != "cpu":
        return f"on {subject.trainer.device} work goes on after the call that starts it"
    return None


TIMELINE = Evidence(name="timeline", why_not=why_not, run=run, weight=4.0, steps=4)
