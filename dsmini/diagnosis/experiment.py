"""The experiment: plain steps and steps with one thing made free, in turns.

A round is a turn of plain steps and a turn of each intervention. A turn takes a few steps and counts the last ones: the
first still finds a batch that was prepared while the turn before it ran. The seconds of a turn are the median of those
that count. The first round only warms up.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dsmini.diagnosis.contention import Contention, Watch
from dsmini.diagnosis.interventions.intervention import Intervention, StepSubject, Timed

UNCOUNTED, COUNTED = 1, 2
"""Steps of a turn."""
R = TypeVar("R", bound=Timed)


@dataclass
class Measured(Generic[R]):
    """Seconds of turns, round by round; lists of equal length."""

    plain: list[float] = field(default_factory=list)
    free: dict[str, list[float]] = field(default_factory=dict)
    """Seconds with one thing made free, by intervention."""
    contention: list[Contention] = field(default_factory=list)
    steps: list[R] = field(default_factory=list)
    """Plain steps that count."""

    @property
    def rounds(self) -> int:
        return len(self.contention)

    @property
    def seconds(self) -> float:
        """Median seconds of a plain step."""
        return statistics.median(self.plain[: self.rounds])


def run_in_turns(
    subject: StepSubject[R],
    interventions: Sequence[Intervention[Any]],
    watch: Watch,
    *,
    rounds: int,
    seconds: float,
    least: int,
    on_round: Callable[[float, Measured[R]], None] = lambda share, measured: None,
) -> Measured[R]:
    """Take turns until the rounds or the seconds are over.

    Args:
        least: number of rounds to measure, even if they take longer.
        on_round: told the share that is done; may raise to end the experiment, whose whole rounds are kept in the
            Measured that it was given.
    """
    measured: Measured[R] = Measured(free={each.name: [] for each in interventions})
    start = time.perf_counter()
    on_round(0.0, measured)
    _round(subject, interventions, watch, Measured(free={each.name: [] for each in interventions}))
    while measured.rounds < rounds:
        spent = time.perf_counter() - start
        if measured.rounds >= least and spent > seconds:
            break
        on_round(max(measured.rounds / rounds, min(0.99, spent / max(seconds, spent, 1e-9))), measured)
        _round(subject, interventions, watch, measured)
    on_round(1.0, measured)
    return measured


def _round(
    subject: StepSubject[R], interventions: Sequence[Intervention[Any]], watch: Watch, into: Measured[R]
) -> None:
    """Take one round. Its measurements are added at its end, so that an interrupted one leaves nothing."""
    watch.begin()
    steps = [subject.step() for _ in range(UNCOUNTED + COUNTED)][UNCOUNTED:]
    contention = watch.end()
    base = statistics.median(step.seconds for step in steps)
    free: dict[str, float] = {}
    turn = into.rounds % max(1, len(interventions))
    for each in [*interventions[turn:], *interventions[:turn]]:  # nobody is always the first after the plain steps
        with each.apply(subject) as step:
            free[each.name] = statistics.median([step(base) for _ in range(UNCOUNTED + COUNTED)][UNCOUNTED:])
    into.plain.append(base)
    into.steps += steps
    for name, taken in free.items():
        into.free[name].append(taken)
    into.contention.append(contention)
