"""A piece of evidence: an experiment beside the verdict, its time, and what its experiments share.

Each is a file with two functions: `numbers` predicts and then measures, `run` makes a section of a report of it. A
figure of the metric GAIN is something to try: its case says what, its note how, and a page ranks them all.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from dsmini.diagnosis.interventions.intervention import StepSubject, Timed
from dsmini.diagnosis.subject import Subject
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Section, Series, Value

GAIN = "gain_if_tried"
"""Metric of a figure that is worth a try: the share of a token's time that would go."""
LEAST_TURNS, MOST_TURNS = 2, 15
S = TypeVar("S", contravariant=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence(Generic[S]):
    """An experiment whose outcome is shown below the verdict, and does not enter it."""

    name: str
    why_not: Callable[[S], str | None]
    """Returns why it does not apply to a subject; None if it does."""
    run: Callable[[S, Rates | None, float], Section]
    """Predicts, then measures for about this many seconds, and leaves the subject as before."""
    weight: float
    """Seconds that it is worth, next to the others."""
    steps: int
    """About the number of the run's steps that it takes at least."""
    needs_rates: bool = False
    """It says nothing without this machine's rates."""


def in_turns(arms: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Return the seconds that the arms report, turn by turn, after a turn that only warms up.

    Args:
        seconds: time of all turns; two turns are taken in any case.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    start = before = time.perf_counter()
    for turn in range(-1, MOST_TURNS):
        for name, arm in arms.items():
            taken = arm()
            if turn >= 0:
                found[name].append(taken)
        now = time.perf_counter()
        if turn + 1 >= LEAST_TURNS and now - start + (now - before) > seconds:
            break
        before = now
    return found


def medians(found: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the median of each arm."""
    return [statistics.median(taken) for taken in found.values()]


@contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:
    """Put a function in the place of an object's method, and take it back, whatever was there before."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def timed(
    question: str, case: Mapping[str, Value], taken: Sequence[float], predicted: float | None, metric: str = "step"
) -> Figure:
    """Return the figure of seconds of several turns; without any, that of the prediction alone."""
    return Figure(
        question=question,
        case=case,
        metric=metric,
        unit="s",
        measured=statistics.median(taken) if taken else None,
        low=min(taken) if taken else None,
        high=max(taken) if taken else None,
        predicted=predicted,
        note="" if taken else "left out: it would take too long",
    )


def in_ms(x: Sequence[float], seconds: Sequence[float], predicted: Sequence[float] | None, bars: bool) -> list[Series]:
    """Return the series of measured seconds, and of those predicted, in ms."""
    kind = "bars" if bars else "line"
    found = [Series(label="measured", x=x, y=[1e3 * each for each in seconds], kind=kind)]
    if predicted is not None:
        y = [1e3 * each for each in predicted]
        found.append(Series(label="predicted", x=x, y=y, kind=kind, dashed=True, of="measured"))
    return found


def to_try(
    question: str, what: str, action: str, taken: Sequence[float], now: float, predicted: float | None
) -> Figure:
    """Return the figure of something to try.

    Args:
        taken: seconds with it, of several turns, for as many tokens as `now` has.
        now: seconds of the run as it is.
        predicted: share that was predicted to go.
    """
    gains = sorted(1 - each / now for each in taken)
    return Figure(
        question=question,
        case={"try": what},
        metric=GAIN,
        unit="",
        measured=statistics.median(gains),
        low=gains[len(gains) // 4],
        high=gains[-1 - len(gains) // 4],
        predicted=predicted,
        better="higher",
        note=action,
    )


def none_of(subject: StepSubject[Timed]) -> str | None:
    """Return no reason: it applies to every subject."""
    return None


def not_compiled(subject: Subject) -> str | None:
    """Return the reason of what changes modules: a compiled model does not see the change."""
    return "the model is compiled; run without --train.compile" if subject.config.train.compile else None
