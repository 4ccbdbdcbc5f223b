"""An arm is all that an experiment is: a step with one thing changed, an axis, and advice. Arms take turns.

    turn 1    plain plain plain   replay replay replay   dense dense dense   ...
    turn 2    plain plain plain   replay replay replay   dense dense dense   ...

The first arm is the work as it is. Of the steps of an arm in a turn the first are not counted, since they find what was
prepared while other arms ran. The gain of an arm is the share of a step's time that would go:

    gain = (T - T_X) / T,    T the mean seconds of plain steps in a turn, T_X those of the arm in the same turn

Worked example: plain steps of 200, 210 and 400 ms, with the batch at hand 100, 104 and 205 ms. The turns gain 0.5,
0.505 and 0.488. The median is 0.5, although the third turn was twice as slow. Intervals are those of measure/turns.py,
widened so that those of all arms of an axis hold together: the best of them is taken.

The clock decides. No arm begins its steps after the time is over, and what is known then is kept.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dsmini.measure.turns import LEAST_TURNS, Estimate, TimeOverError, Turns, in_turns, mean_of, median_of, reported
from dsmini.reading import read_toml

Axis = Literal["Data", "Algorithm", "Machine"]
Work = Literal["training", "decoding"]
AXES: tuple[Axis, ...] = ("Data", "Algorithm", "Machine")
Step = Callable[[float], float]
"""Takes one step. It is told the seconds of this turn's plain step, and returns the seconds of its own."""
Apply = Callable[[], AbstractContextManager[Step]]
"""Changes the work until the context ends, and yields what takes a step."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A step with one thing changed."""

    name: str
    apply: Apply
    axis: Axis = "Machine"
    words: str = ""
    """The change in words."""
    advice: str = ""
    """What to do where it gains, in one sentence."""
    why_not: str | None = None
    """Reason why it cannot be tried; None if it can."""
    predict: Callable[[Any], float] | None = None
    """Returns the seconds of a step by the prices of the work, before any step runs; None where nothing is known."""
    uncounted: int = 1
    counted: int = 2
    """Steps of a turn that are taken first, and those that are counted."""
    tokens: float = 1.0
    """Tokens that a step makes, in those of a plain step."""
    is_rare: bool = False
    """A part of the steps has all of its gain, such as stalls: the mean over turns counts, which a median hides."""
    at: float | None = None
    """Place on the axis of a plot; None for a bar."""


@cache
def words() -> dict[str, Any]:
    """Return the words of arms and evidence by work and name."""
    return read_toml(Path(__file__).with_name("words.toml"))


def arm_of(work: Work, name: str, apply: Apply, **more: Any) -> Arm:
    """Return the arm of that name, with its axis and its words."""
    return Arm(name=name, apply=apply, **words()[work][name], **more)


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
    def gains(self) -> dict[str, Estimate]:
        """Share of a token's time that would go, by arm."""
        axes = [arm.axis for arm in self.measured]
        found: dict[str, Estimate] = {}
        for arm in self.measured:
            per_token = [seconds / arm.tokens for seconds in self.turns.seconds[arm.name]]
            pairs = [*zip(self.turns.seconds[self.plain], per_token, strict=True)]
            if arm.is_rare:
                middle = statistics.fmean(plain for plain, _ in pairs)
                saved = mean_of([(plain - own) / middle for plain, own in pairs])
                few = len(pairs) < LEAST_TURNS
                found[arm.name] = replace(saved, low=-math.inf, high=math.inf) if few else saved
            else:
                found[arm.name] = median_of([1 - own / plain for plain, own in pairs], together=axes.count(arm.axis))
        return found

    def predicted_gain(self, arm: Arm) -> float | None:
        """Return the gain that was predicted; None without a prediction."""
        if arm.name not in self.predicted or self.plain not in self.predicted:
            return None
        return 1 - self.predicted[arm.name] / arm.tokens / self.predicted[self.plain]


def percent(gain: Estimate | float | None, digits: int = 0) -> str:
    """Write a share in percent, with its interval if it has one; nothing for None."""
    if isinstance(gain, Estimate) and gain.is_clear:
        return f"{100 * gain.value:.0f} % ({100 * gain.low:.0f} to {100 * gain.high:.0f})"
    value = gain.value if isinstance(gain, Estimate) else gain
    return "" if value is None else f"{100 * value:.{digits}f} %"


def predict(arms: Sequence[Arm], prices: Any) -> dict[str, float]:
    """Return the predicted seconds of a step of each arm, as far as the time allows; of none without prices."""
    found: dict[str, float] = {}
    with suppress(TimeOverError):
        for arm in arms if prices is not None else ():
            if arm.predict is not None:
                found[arm.name] = arm.predict(prices)
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

    Raises: KeyboardInterrupt if it is interrupted before there are turns enough for an interval.
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
        in_turns(runs, count=count, seconds=until - time.perf_counter(), least=0, clock=reported, on_turn=noted)
    except TimeOverError:
        pass
    except KeyboardInterrupt:
        if found.turns.count < LEAST_TURNS:
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
