"""The verdict: which axis binds, from the gains of all axes.

    BINDS          the lower end of one gain is above 10 % and above the upper ends of all others
    NOTHING_BINDS  all upper ends are at most 10 %: no axis has a tenth of the time to give
    MIXED          several lower ends are above 10 %, and the best two intervals overlap
    UNDETERMINED   an interval reaches across 10 %, or across the best one: noise hides the answer

Where nothing binds, a step is the work itself, done at the speed that this machine has: less work, or a faster machine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dsmini.diagnosis.gains import Gain
from dsmini.planner.binding import Axis

LEAST = 0.10
"""Gain that is worth an action."""
MOST_ROUNDS = 200
NARROW = 0.04
"""Width of an interval that more rounds need not narrow."""
ON_THE_LINE = "The interval is narrow already: the gain lies on that line, and little is lost either way."


class Outcome(Enum):
    """Kind of a verdict."""

    BINDS = "binds"
    NOTHING_BINDS = "nothing binds"
    MIXED = "mixed"
    UNDETERMINED = "undetermined"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Conclusion from the gains of all axes."""

    outcome: Outcome
    axis: Axis | None
    """Axis that binds; None for the other outcomes."""
    gains: Mapping[Axis, Gain]
    sentence: str
    decides: str
    """The way to decide it, for MIXED and UNDETERMINED; else ""."""


def verdict(gains: Mapping[Axis, Gain]) -> Verdict:
    """Return the verdict of the gains of all axes that could be tried."""
    if not gains:
        raise ValueError("no gain was measured, and a verdict needs one; let it run longer")
    ranked = sorted(gains.items(), key=lambda item: -item[1].low)
    (axis, best), others = ranked[0], [g for _, g in ranked[1:]]
    highest = max((g.high for g in others), default=-math.inf)
    if best.low > LEAST and best.low > highest:
        words = f"{axis.value} binds: {best} of a step would go if it were free."
        return _verdict(Outcome.BINDS, axis, gains, words)
    if all(g.high <= LEAST for g in gains.values()):
        most = max(gains.items(), key=lambda item: item[1].high)
        words = f"Nothing binds: no axis has {LEAST:.0%} of a step to give. The most is {most[0].value}, {most[1]}."
        return _verdict(Outcome.NOTHING_BINDS, None, gains, words)
    clear = [a for a, g in ranked if g.low > LEAST]
    if len(clear) > 1:
        both = " and ".join(f"{a.value} {gains[a]}" for a in clear)
        words = f"Mixed: {both}. Their intervals overlap, so neither comes first."
        return _verdict(Outcome.MIXED, None, gains, words, _more_rounds(gains))
    if best.low > LEAST:
        near = " and ".join(f"{a.value} {g}" for a, g in ranked[1:] if g.high >= best.low)
        words = f"Undetermined: {axis.value} {best} of a step leads, and {near} may be as much."
        return _verdict(Outcome.UNDETERMINED, None, gains, words, _more_rounds(gains))
    across = {a: g for a, g in gains.items() if g.low <= LEAST < g.high}
    named = " and ".join(f"{a.value} {g}" for a, g in across.items())
    words = f"Undetermined: {named} of a step may be more or less than the {LEAST:.0%} that is worth an action."
    narrow = all(g.high - g.low <= NARROW for g in across.values())
    return _verdict(Outcome.UNDETERMINED, None, gains, words, ON_THE_LINE if narrow else _more_rounds(gains))


def _verdict(outcome: Outcome, axis: Axis | None, gains: Mapping[Axis, Gain], words: str, decides: str = "") -> Verdict:
    return Verdict(outcome=outcome, axis=axis, gains=dict(gains), sentence=words, decides=decides)


def _more_rounds(gains: Mapping[Axis, Gain]) -> str:
    """Return how many rounds would separate the intervals, which narrow with the root of the rounds."""
    ends = sorted((g for g in gains.values()), key=lambda g: -g.low)
    between = abs(ends[0].value - ends[1].value) if len(ends) > 1 else math.inf
    apart = min([between, *(abs(g.value - LEAST) for g in gains.values())])
    width = max((g.high - g.low) / 2 for g in gains.values())
    rounds = max(g.rounds for g in gains.values())
    needed = math.ceil(rounds * (2 * width / apart) ** 2) if apart > 0 else math.inf
    if needed <= MOST_ROUNDS:
        return f"About {needed} rounds instead of {rounds} would decide it (--rounds {needed})."
    return "A quiet machine would decide it: stop other programs, and run it again."
