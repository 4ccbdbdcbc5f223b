"""An arm is one experiment: a step with one thing changed, an axis, and advice. Arms take turns.

    turn 1    plain plain plain   replay replay replay   dense dense dense   ...
    turn 2    plain plain plain   dense dense dense   replay replay replay   ...

The first arm is the work as it is. It begins each turn, and the others change places. An arm's first
steps in a turn are not counted, since they find what was prepared while other arms ran. The gain of an arm is the
share of a step's time that it saves:

    gain = (T - T_X) / T,    T the mean seconds of plain steps in a turn, T_X those of the arm in the same turn

Worked example: plain steps of 200, 210 and 400 ms, with the batch at hand 100, 104 and 205 ms. The turns gain 0.5,
0.505 and 0.488. The median is 0.5, although the third turn was twice as slow.

A verdict takes the best of all arms. So each of m arms has an interval (measure/turns.py) whose lower end is above the
truth in at most 5 / m of 100 cases: in at most 5 of 100 diagnoses some lower end is. 4 arms need 7 turns for that, and
8 arms 8; after fewer there are no intervals.

The clock decides. No arm begins its steps after the time is over, and what is known then is kept.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dsmini.measure.turns import (
    Estimate,
    TimeOverError,
    Turns,
    in_turns,
    least_turns,
    mean_of,
    median_of,
    reported,
)
from dsmini.report.units import percent as percent_of

Axis = Literal["Data", "Algorithm", "Machine"]
Work = Literal["training", "decoding"]
AXES: tuple[Axis, ...] = ("Data", "Algorithm", "Machine")
LEAST = 0.10
"""Gain that is worth an action."""
ALARMS = 0.05
"""Largest share of diagnoses in which the lower end of some arm's interval is above the truth."""
Step = Callable[[float], float]
"""Takes one step. It is told the seconds of this turn's plain step, and returns the seconds of its own."""
Apply = Callable[[], AbstractContextManager[Step]]
"""Changes the work until the context ends, and yields what takes a step."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A step with one thing changed."""

    name: str
    apply: Apply
    axis: Axis | None = None
    """Axis whose cost it removes; None for other choices, such as the size of a batch."""
    words: str = ""
    """The change in words."""
    advice: str = ""
    """Advice where it gains, in one sentence."""
    why_not: str | None = None
    """Reason why it cannot be tried; None if it can."""
    predict: Callable[[], float] | None = None
    """Returns the seconds of a step by this machine's prices, before any step runs; None where nothing is known."""
    uncounted: int = 1
    counted: int = 2
    """Steps of a turn that are taken first, and those that are counted."""
    tokens: float = 1.0
    """Tokens that a step makes, in those of a plain step."""
    is_rare: bool = False
    """A part of the steps has all of its gain, such as stalls: the mean over turns counts, which a median hides."""
    at: float | None = None
    """Place on the axis of a plot; None for a bar."""


@dataclass(kw_only=True)
class Comparison:
    """Arms, the first of which is the work as it is, with their seconds: predicted, and measured turn by turn."""

    arms: Sequence[Arm]
    turns: Turns = field(default_factory=Turns)
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a step, by arm; empty where nothing is predicted."""
    stopped: bool = False
    """It was interrupted; the whole turns before are here."""

    @property
    def plain(self) -> str:
        return self.arms[0].name

    @property
    def measured(self) -> list[Arm]:
        """The arms that took steps, without the first."""
        return [arm for arm in self.arms[1:] if arm.name in self.turns.seconds]

    @property
    def tail(self) -> float:
        """Largest chance that the lower end of an arm's interval is above the truth."""
        return ALARMS / max(1, len(self.arms) - 1)

    @property
    def least_turns(self) -> int:
        """Number of turns without which gains have no intervals."""
        return least_turns(self.tail)

    @property
    def round_seconds(self) -> float:
        """Seconds of a round, by the steps of its arms."""
        arms = [arm for arm in self.arms if arm.name in self.turns.seconds]
        return sum((arm.uncounted + arm.counted) * self.turns.median(arm.name) for arm in arms)

    @property
    def gains(self) -> dict[str, Estimate]:
        """Share of a token's time that each arm saves."""
        found: dict[str, Estimate] = {}
        for arm in self.measured:
            per_token = [seconds / arm.tokens for seconds in self.turns.seconds[arm.name]]
            pairs = [*zip(self.turns.seconds[self.plain], per_token, strict=True)]
            if arm.is_rare:
                middle = statistics.fmean(plain for plain, _ in pairs)
                saved = mean_of([(plain - own) / middle for plain, own in pairs], self.tail)
                few = len(pairs) < self.least_turns
                found[arm.name] = replace(saved, low=-math.inf, high=math.inf) if few else saved
            else:
                found[arm.name] = median_of([1 - own / plain for plain, own in pairs], tail=self.tail)
        return found

    def predicted_gain(self, arm: Arm) -> float | None:
        """Return the gain that was predicted; None without a prediction."""
        if arm.name not in self.predicted or self.plain not in self.predicted:
            return None
        return 1 - self.predicted[arm.name] / arm.tokens / self.predicted[self.plain]


def percent(gain: Estimate | float | None, decimals: int = 0) -> str:
    """Write a share in percent, with its interval if it has one; nothing for None.

    A loss of more than a whole step is a factor: 3 times as long. An end that would be rounded to LEAST has a decimal,
    because a verdict hangs on which side of it that lies.
    """
    if gain is None:
        return ""
    if isinstance(gain, Estimate) and gain.value < -1:
        return f"{1 - gain.value:.0f} times as long"
    if isinstance(gain, Estimate) and gain.is_clear:
        ends = (100 * gain.low, 100 * gain.high)
        low, high = (f"{end:.{int(round(end) == 100 * LEAST)}f}".removesuffix(".0") for end in ends)
        return f"{percent_of(gain.value)} ({low} to {high})"
    return percent_of(gain.value if isinstance(gain, Estimate) else gain, decimals)


def predict(arms: Sequence[Arm]) -> dict[str, float]:
    """Return the predicted seconds of a step of each arm, as far as the time allows."""
    found: dict[str, float] = {}
    with suppress(TimeOverError):
        for arm in arms:
            if arm.predict is not None:
                found[arm.name] = arm.predict()
    return found


def measure(
    arms: Sequence[Arm],
    predicted: Mapping[str, float] | None = None,
    *,
    count: int,
    until: float = math.inf,
    on_turn: Callable[[float, int], None] = lambda share, number: None,
) -> Comparison:
    """Let arms take turns until there are enough, or the time is over.

    Args:
        until: moment of time.perf_counter after which no arm begins. Where no turn is whole then, what was measured to
            warm up is kept.
        on_turn: told the share that is done and the number of whole turns.

    Raises: KeyboardInterrupt if it is interrupted before there are turns enough for intervals.
    """
    found = Comparison(arms=arms, predicted=predicted or {})
    last: dict[str, float] = {}

    def steps_of(arm: Arm) -> float:
        if time.perf_counter() >= until:
            raise TimeOverError
        with arm.apply() as step:
            for _ in range(arm.uncounted):
                step(last.get(found.plain, 0.0))
            last[arm.name] = statistics.fmean(step(last.get(found.plain, 0.0)) for _ in range(arm.counted))
        return last[arm.name]

    def noted(share: float, turns: Turns) -> None:
        found.turns = turns
        on_turn(share, turns.count)

    runs = {arm.name: lambda arm=arm: steps_of(arm) for arm in arms}
    try:
        how = {"count": count, "seconds": until - time.perf_counter(), "least": 0}
        in_turns(runs, first=found.plain, clock=reported, on_turn=noted, **how)
    except TimeOverError:
        pass
    except KeyboardInterrupt:
        if found.turns.count < found.least_turns:
            raise
        found.stopped = True
    if not found.turns.count:
        found.turns = Turns({name: [seconds] for name, seconds in last.items()})
    return found


@contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:
    """Put a value in the place of an object's attribute, and take it back, whatever was there before."""
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
