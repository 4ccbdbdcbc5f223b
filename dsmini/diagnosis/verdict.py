"""The verdict: which axis binds, from the gains of all axes. The gain of an axis is that of its best arm.

    binds           the lower end of one gain is above 10 % and above the upper ends of all others
    nothing binds   all upper ends are at most 10 %: no axis has a tenth of the time to give
    mixed           several lower ends are above 10 %, and the best two intervals overlap
    undetermined    an interval reaches across 10 %, or across the best one: noise hides the answer

Where nothing binds, a step is the work itself, done at the speed that this machine has: less work, or a faster machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsmini.diagnosis.arms import AXES, Arm, Axis, Comparison
from dsmini.measure.turns import LEAST_TURNS, Estimate

LEAST = 0.10
"""Gain that is worth an action."""
MOST_ROUNDS = 200
NARROW = 0.04
"""Width of an interval that more rounds need not narrow."""
ON_THE_LINE = "The interval is narrow already: the gain lies on that line, and little is lost either way."
QUIET_MACHINE = "A quiet machine would decide it: stop other programs, and run it again."
Outcome = Literal["binds", "nothing binds", "mixed", "undetermined"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Conclusion from the gains of all axes."""

    outcome: Outcome
    axis: Axis | None = None
    """Axis that binds; None for the other outcomes."""
    sentence: str
    decides: str = ""
    """The way to decide it where it is open."""


def percent(gain: Estimate | float | None) -> str:
    """Write a share in percent, with its interval if it has one; nothing for None."""
    if isinstance(gain, Estimate) and gain.is_clear:
        return f"{100 * gain.value:.0f} % ({100 * gain.low:.0f} to {100 * gain.high:.0f})"
    value = gain.value if isinstance(gain, Estimate) else gain
    return "" if value is None else f"{100 * value:.0f} %"


def best_arms(compared: Comparison) -> dict[Axis, Arm]:
    """Return for each axis the arm that gains most for certain."""
    gains = compared.gains
    ranked = sorted(compared.measured, key=lambda arm: (-gains[arm.name].low, -gains[arm.name].value))
    return {
        axis: next(arm for arm in ranked if arm.axis == axis) for axis in AXES if any(a.axis == axis for a in ranked)
    }


def gains_by_axis(compared: Comparison) -> dict[Axis, Estimate]:
    """Return each axis's gain: the best of its arms, with the highest upper end of all of them.

    An arm that noise hides may gain more than the best one, and then nobody knows what binds.
    """
    gains = compared.gains
    highest = {
        axis: max(gains[a.name].high for a in compared.measured if a.axis == axis) for axis in best_arms(compared)
    }
    return {axis: replace(gains[arm.name], high=highest[axis]) for axis, arm in best_arms(compared).items()}


def verdict(gains: Mapping[Axis, Estimate]) -> Verdict:
    """Return the verdict of the gains of all axes that could be tried."""
    if not gains or not all(gain.is_clear for gain in gains.values()):
        return _too_early(gains)
    ranked = sorted(gains.items(), key=lambda item: -item[1].low)
    (axis, best), others = ranked[0], ranked[1:]
    clear = [(a, g) for a, g in ranked if g.low > LEAST]
    near = [(a, g) for a, g in others if g.high >= best.low]
    across = [(a, g) for a, g in gains.items() if g.low <= LEAST < g.high]
    if clear and not near:
        words = f"{axis} binds: {percent(best)} of a step would go if it were free."
        return Verdict(outcome="binds", axis=axis, sentence=words)
    if all(g.high <= LEAST for g in gains.values()):
        most = _named([max(gains.items(), key=lambda item: item[1].high)], ", ")
        words = f"Nothing binds: no axis has {LEAST:.0%} of a step to give. The most is {most}."
        return Verdict(outcome="nothing binds", sentence=words)
    if len(clear) > 1:
        words = f"Mixed: {_named(clear)}. Their intervals overlap, so neither comes first."
        return Verdict(outcome="mixed", sentence=words, decides=_more_rounds(gains))
    if clear:
        words = f"Undetermined: {axis} {percent(best)} of a step leads, and {_named(near)} may be as much."
        return Verdict(outcome="undetermined", sentence=words, decides=_more_rounds(gains))
    words = (
        f"Undetermined: {_named(across)} of a step may be more or less than the {LEAST:.0%} that is worth an action."
    )
    narrow = all(g.high - g.low <= NARROW for _, g in across)
    return Verdict(outcome="undetermined", sentence=words, decides=ON_THE_LINE if narrow else _more_rounds(gains))


def _named(gains: Sequence[tuple[str, Estimate]], between: str = " ") -> str:
    """Return axes with their gains in words."""
    return " and ".join(f"{axis}{between}{percent(gain)}" for axis, gain in gains)


def _too_early(gains: Mapping[Axis, Estimate]) -> Verdict:
    """Return the verdict where the time was over before there were rounds enough."""
    rounds = min((gain.turns for gain in gains.values()), default=0)
    known = ", ".join(f"{axis} {percent(gain)}" for axis, gain in gains.items())
    words = f"Undetermined: {rounds} of {LEAST_TURNS} rounds were over in the time, too few for an interval"
    words = f"{words}. So far: {known} of a step." if known else f"{words}."
    return Verdict(
        outcome="undetermined", sentence=words, decides=f"More time would decide it (--rounds {LEAST_TURNS})."
    )


def _more_rounds(gains: Mapping[Axis, Estimate]) -> str:
    """Return how many rounds would separate the intervals, which narrow with the root of the rounds."""
    ends = sorted(gains.values(), key=lambda g: -g.low)
    between = abs(ends[0].value - ends[1].value) if len(ends) > 1 else math.inf
    apart = min([between, *(abs(g.value - LEAST) for g in gains.values())])
    width = max((g.high - g.low) / 2 for g in gains.values())
    rounds = max(g.turns for g in gains.values())
    needed = math.ceil(rounds * (2 * width / apart) ** 2) if apart > 0 else math.inf
    if needed <= MOST_ROUNDS:
        return f"About {needed} rounds instead of {rounds} would decide it (--rounds {needed})."
    return QUIET_MACHINE
