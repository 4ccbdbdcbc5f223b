"""Virtual speed-up: how much faster would steps be if one part of them were?

A part cannot be made faster at will. But everything that runs beside it can be made slower by as much, and the delay
taken off afterwards. To see a part X, whose own time in a step is t, faster by a share s:

    delay all that runs at the same time as X by D = s t
    effective seconds = seconds of a step - D,   gain = 1 - effective seconds / seconds of a plain step

The parts of a step run one after another, and the loader runs beside them. So for a part of the step the loader is
delayed, and for the loader the step. Predicted, with C seconds of computing, w workers and B seconds of a batch:

    a part of the step     max(C - D, B / w)     in sequence: the gain is s times the part's share of the step
    the loader             max(C, B (1 - s) / w)

Worked example: 200 ms of computing, 60 of them attention; batches of 180 ms, one worker. Attention 50 % faster: the
loader is delayed by 30 ms to 210, so that a step takes 210 ms, effectively 180. Not 170: the loader is next to bind.

It cannot see what a real speed-up frees besides time: cores, caches and bandwidth that the part takes from others. It
sees no work outside of the sections (sections.py), and not the order of parts inside a step: where nothing waits, the
curve is the part's measured share, and no more.

Source: Curtsinger and Berger, "Coz: Finding Code that Counts with Causal Profiling", SOSP 2015.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dsmini.diagnosis.evidence.evidence import Evidence, in_turns, patched
from dsmini.diagnosis.evidence.loader_delay import delayed
from dsmini.diagnosis.evidence.sections import MODULES, SectionClock, predicted_sections, watched
from dsmini.diagnosis.predictions import shape_of, time_batches, waiting_seconds
from dsmini.diagnosis.subject import Subject
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Plot, Section, Series

LOADER = "loader"
SHARES = (0.25, 0.5, 0.75)
CANNOT_SEE = (
    "Nothing is made faster: what runs beside a part is delayed, and the delay taken off. What a real speed-up frees "
    "besides time is not seen: cores, caches, bandwidth. Norms, residuals, the embedding and clipping are in no part. "
    "Parts of a step run in sequence: where the loader does not bind, the curve is the part's measured share."
)
CLOCKED = 5
"""Steps whose sections are timed."""


@dataclass(frozen=True, kw_only=True)
class SpeedupCurves:
    """Gains by part, one for each of SHARES."""

    own: Mapping[str, float]
    """Seconds of a part in a step, measured."""
    step: float
    """Seconds of a plain step."""
    gains: Mapping[str, Sequence[float]]
    predicted: Mapping[str, Sequence[float]]
    """Empty without rates."""


def predicted_gains(
    own: Mapping[str, float], computing: float, wait: Callable[[float, float], float]
) -> dict[str, list[float]]:
    """Return the predicted gains of each part, one for each of SHARES.

    Args:
        own: predicted seconds of the parts; those of LOADER are of a batch.
        computing: seconds of a step that waits for nothing.
        wait: returns what the loader adds to this much computing, with batches that take a share of their time.
    """
    plain = computing + wait(computing, 1.0)
    found: dict[str, list[float]] = {}
    for name, seconds in own.items():
        found[name] = []
        for s in SHARES:
            left = computing if name == LOADER else computing - s * seconds
            then = left + wait(left, 1 - s if name == LOADER else 1.0)
            found[name].append(1 - then / plain)
    return found


def numbers(subject: Subject, rates: Rates | None, seconds: float) -> SpeedupCurves:
    """Predict, then measure."""
    batch, workers = time_batches(subject), subject.config.data.workers
    predicted: dict[str, list[float]] = {}
    if rates is not None:
        shape = shape_of(subject.config, subject.rows, subject.config.train.dtype)
        priced = predicted_sections(shape, rates)
        parts = {name: priced[name] for name in MODULES} | {LOADER: batch.seconds}

        def wait(computing: float, share: float) -> float:
            return waiting_seconds(
                replace(batch, seconds=share * batch.seconds, cpu=share * batch.cpu), computing, workers
            )

        predicted = predicted_gains(parts, forecast(shape, rates).seconds, wait)
    own = clocked(subject) | {LOADER: batch.seconds}
    with delayed(subject) as delay_loader, late_takes(subject) as delay_step:
        arms = {"": partial(_turn, subject, 0.0)}
        delays = {LOADER: delay_step}
        for name, t in own.items():
            for s in SHARES:
                beside = s * t if name != LOADER or workers == 0 else s * t / workers
                arms[f"{name} {s}"] = partial(
                    _sped_up, subject, delays.get(name, delay_loader), beside, name == LOADER, workers
                )
        taken = in_turns(arms, seconds)
    plain = statistics.median(taken[""])
    gains = {name: [1 - statistics.median(taken[f"{name} {s}"]) / plain for s in SHARES] for name in own}
    return SpeedupCurves(own=own, step=plain, gains=gains, predicted=predicted)


def _turn(subject: Subject, off: float) -> float:
    for _ in range(
        1 + subject.config.data.workers
    ):  # batches started before, and the first that comes in another rhythm
        subject.step()
    return subject.step().seconds - off


def _sped_up(subject: Subject, delay: Callable[[float], None], beside: float, loader: bool, workers: int) -> float:
    """Return the effective seconds of a step while all that runs beside a part is delayed."""
    if workers == 0:  # nothing runs beside it
        return _turn(subject, beside)
    delay(beside if loader else beside * workers)  # each thread of the loader prepares every w-th batch
    try:
        return _turn(subject, beside)
    finally:
        delay(0.0)


@contextmanager
def late_takes(subject: Subject) -> Iterator[Callable[[float], None]]:
    """Let every step ask for its batch later; yield what sets by how many seconds."""
    loader, late = subject.trainer.loader, [0.0]
    plain = loader.take

    def take(requests: Sequence[tuple[int, int]]) -> Any:
        time.sleep(late[0])
        return plain(requests)

    def delay(seconds: float) -> None:
        late[0] = seconds

    with patched(loader, "take", take):
        yield delay


def clocked(subject: Subject) -> dict[str, float]:
    """Return the seconds of MODULES in a step, medians of a few."""
    trainer, seen = subject.trainer, []
    for _ in range(1 + CLOCKED):
        clock = SectionClock()
        with watched(trainer.model, trainer.optimizers, clock.enter, clock.leave):
            subject.step()
        seen.append(clock.seconds)
    return {name: statistics.median(each.get(name, 0.0) for each in seen[1:]) for name in MODULES}


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    figures = [
        Figure(
            question="virtual_speedup",
            case={"part": name, "faster by": s},
            metric="virtual_gain",
            unit="",
            measured=found.gains[name][i],
            predicted=found.predicted[name][i] if found.predicted else None,
        )
        for name in found.gains
        for i, s in enumerate(SHARES)
    ]
    x = [0.0, *(100 * s for s in SHARES)]
    series: list[Series] = []
    for name, gains in found.gains.items():
        series.append(Series(label=name, x=x, y=[0.0, *(100 * g for g in gains)]))
        if found.predicted:
            y = [0.0, *(100 * g for g in found.predicted[name])]
            series.append(Series(label=f"{name}, predicted", x=x, y=y, dashed=True, of=name))
    best = max(found.gains, key=lambda name: found.gains[name][1])
    return Section(
        name="virtual_speedup",
        title="Which part would make steps faster if it were faster?",
        finding=f"The most comes from {best}: if it took half its time, a step would take "
        f"{found.gains[best][1]:.0%} less.",
        figures=figures,
        plots=[Plot(title="If one part were faster", x="faster by, %", y="a step's time that goes, %", series=series)],
        prose=[("What this cannot see", CANNOT_SEE)],
    )


def why_not(subject: Subject) -> str | None:
    """Return why parts cannot be told apart."""
    if subject.trainer.device.type != "cpu":
        return f"on {subject.trainer.device} work goes on after the call that starts it, so that no section has a time"
    if subject.config.train.compile:
        return "the model is compiled; run without --train.compile"
    if subject.config.train.recompute:
        return "backward runs the forward again inside it; run with --train.recompute false"
    return None


VIRTUAL_SPEEDUP = Evidence(name="virtual_speedup", why_not=why_not, run=run, weight=26.0, steps=150)
