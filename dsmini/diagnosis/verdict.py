"""The verdict: which axis binds, from the gains of all axes. The gain of an axis is that of its best measured arm.

    binds           the lower end of one gain is above 10 % and above the upper ends of all others
    nothing binds   all upper ends are at most 10 %: no axis has a tenth of the time to give
    mixed           several lower ends are above 10 %, and the best two intervals overlap
    undetermined    an interval reaches across 10 %, or across the best one: noise hides the answer. Or the best gain
                    is that of a machine without other programs, which is computed: nobody has tried it.

Intervals are those of arms.py: in at most 5 of 100 diagnoses an axis is named whose gain is not above 10 %.

Where nothing binds, a step is the work itself, done at the speed that this machine has: less work, or a faster machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from dsmini.diagnosis.arms import AXES, LEAST, Arm, Axis, Comparison, percent
from dsmini.diagnosis.findings import Finding
from dsmini.measure.price import Forecast
from dsmini.measure.roofs import Roofs
from dsmini.measure.turns import Estimate
from dsmini.report import Section
from dsmini.report.units import human, plural

LEAST_TRIED = 0.02
"""Gain below which nothing is worth a line."""
MOST_ROUNDS = 200
QUIET_MACHINE = "A quiet machine would decide it: stop other programs, and run it again."
OTHERS = "other programs (computed)"
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


def best_arms(compared: Comparison) -> dict[Axis, Arm]:
    """Return for each axis the measured arm that gains most for certain."""
    gains = compared.gains
    ranked = sorted(compared.measured, key=lambda arm: (-gains[arm.name].low, -gains[arm.name].value))
    return {axis: next(a for a in ranked if a.axis == axis) for axis in AXES if any(a.axis == axis for a in ranked)}


def gains_by_axis(compared: Comparison) -> dict[Axis, Estimate]:
    """Return each axis's gain: the best of its measured arms, with the highest upper end of all of them.

    An arm that noise hides may gain more than the best one, and then nobody knows what binds.
    """
    gains, found = compared.gains, dict[Axis, Estimate]()
    for axis, arm in best_arms(compared).items():
        of_axis = [gains[a.name].high for a in compared.measured if a.axis == axis]
        found[axis] = replace(gains[arm.name], high=max(of_axis))
    return found


def verdict(
    gains: Mapping[Axis, Estimate],
    others: Estimate | None = None,
    least_turns: int = 0,
    round_seconds: float = 0.0,
) -> Verdict:
    """Return the verdict of the gains of all axes that could be tried.

    Args:
        others: share of a step that other programs cost, which is computed.
        least_turns: number of rounds that intervals need.
        round_seconds: time of a round.
    """
    if not gains or not all(gain.is_clear for gain in gains.values()):
        return _too_early(gains, least_turns, round_seconds)
    ranked: list[tuple[str, Estimate]] = sorted(gains.items(), key=lambda item: -item[1].low)
    every = ranked if others is None else [*ranked, (OTHERS, others)]
    axis, best = max(gains.items(), key=lambda item: item[1].low)
    if others is not None and others.low > max(LEAST, best.low):
        words = (
            f"Undetermined: other programs lengthen a step by about {percent(others)} of its time. That is computed "
            f"from CPU times and probes, not tried. {_named(ranked[:1])} gains most of what was tried."
        )
        return Verdict(outcome="undetermined", sentence=words, decides=QUIET_MACHINE)
    clear = [(a, g) for a, g in ranked if g.low > LEAST]
    near = [(a, g) for a, g in every if a != axis and g.high >= best.low]
    across = [(a, g) for a, g in every if g.low <= LEAST < g.high]
    if clear and not near:
        words = f"{axis} binds: removing its cost would shorten a step by {percent(best)}."
        return Verdict(outcome="binds", axis=axis, sentence=words)
    if all(g.high <= LEAST for _, g in every):
        most = max(every, key=lambda item: item[1].high)
        words = f"Nothing binds: no change shortens a step by more than {percent(LEAST)}. The most is {_named([most])}."
        return Verdict(outcome="nothing binds", sentence=words)
    outcome, decides = "undetermined", _more_rounds(gains, round_seconds)
    if OTHERS in dict([*near, *across]):
        decides = QUIET_MACHINE
    if len(clear) > 1:
        outcome, words = "mixed", f"Mixed: {_named(clear)}. Their intervals overlap, so neither comes first."
    elif clear:
        words = f"Undetermined: {axis} leads with {percent(best)} of a step, and {_named(near)} may be as much."
    else:
        open_ones = _named(across) if near else f"{axis} costs most, and {percent(best)}"
        words = f"Undetermined: {open_ones} of a step may be above or below {percent(LEAST)}, the least that pays."
    return Verdict(outcome=outcome, sentence=words, decides=decides)


def _named(gains: Sequence[tuple[str, Estimate]], between: str = " ") -> str:
    return " and ".join(f"{axis}{between}{percent(gain)}" for axis, gain in gains)


def _too_early(gains: Mapping[Axis, Estimate], least: int, round_seconds: float) -> Verdict:
    """Return the verdict where the time was over before there were rounds enough."""
    rounds = min((gain.turns for gain in gains.values()), default=0)
    words = f"Undetermined: {plural(rounds, 'round')} in the time, and a verdict on these changes needs {least}."
    saved = [(axis, gain) for axis, gain in gains.items() if gain.value >= LEAST_TRIED]
    if saved:
        words += f" So far a step without the cost of {_named(saved, ' is shorter by ')}, which may be chance."
    elif gains:
        words += " So far no change shortens a step."
    return Verdict(outcome="undetermined", sentence=words, decides=_rounds_that_decide(least, round_seconds))


def _rounds_that_decide(rounds: int, round_seconds: float) -> str:
    return f"About {rounds} rounds, {human(rounds * round_seconds, 's')}, would decide it (--rounds {rounds})."


def _more_rounds(gains: Mapping[Axis, Estimate], round_seconds: float) -> str:
    """Return how many rounds would separate the intervals, which narrow with the root of the rounds."""
    ends = sorted(gains.values(), key=lambda g: -g.low)
    between = abs(ends[0].value - ends[1].value) if len(ends) > 1 else math.inf
    apart = min([between, *(abs(g.value - LEAST) for g in gains.values())])
    width = max((g.high - g.low) / 2 for g in gains.values())
    rounds = max(g.turns for g in gains.values())
    if rounds * (2 * width) ** 2 >= MOST_ROUNDS * apart**2:
        return QUIET_MACHINE
    return _rounds_that_decide(math.ceil(rounds * (2 * width / apart) ** 2), round_seconds)


@dataclass(kw_only=True)
class Diagnosis:
    """Predictions, measurements and conclusions, with the evidence and what was diagnosed."""

    compared: Comparison
    findings: Sequence[Finding]
    others: Estimate | None = None
    """Share of a step that other programs cost, which is computed."""
    not_tried: dict[str, str] = field(default_factory=dict)
    """Reasons by arm, and by experiment."""
    roofs: Roofs | None = None
    """Rates of this machine; None where they are not known."""
    forecast: Forecast | None = None
    """Forecast of a plain step that waits for nothing; None without rates."""
    sections: list[Section] = field(default_factory=list)
    """Evidence: experiments besides the verdict's."""
    sweeps: dict[str, Comparison] = field(default_factory=dict)
    """Comparisons of the evidence by the name of their section."""
    of: str = "a run"
    """Name of the subject."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """More about it."""
    machine: Mapping[str, str] = field(default_factory=dict)
    """Description of the machine."""
    warnings: list[str] = field(default_factory=list)
    """Sentences that a reader must see first."""
    stopped: bool = False
    """It was interrupted."""

    @cached_property
    def verdict(self) -> Verdict:
        compared = self.compared
        return verdict(gains_by_axis(compared), self.others, compared.least_turns, compared.round_seconds)

    @property
    def gains(self) -> dict[str, Estimate]:
        """Measured gains by arm."""
        return self.compared.gains

    @property
    def seconds(self) -> float:
        """Median seconds of a plain step."""
        turns = self.compared.turns
        return turns.median(self.compared.plain) if turns.seconds else math.nan

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_fault]

    @property
    def named(self) -> str:
        """Name of the axis at fault: the one that binds, else that of the first fault that costs no time, else ""."""
        return self.verdict.axis or next((finding.axis for finding in self.faults), "")

    @property
    def sentence(self) -> str:
        """The verdict, with the fault that costs no time, if there is one."""
        if self.verdict.outcome == "binds" or not self.faults:
            return self.verdict.sentence
        return f"{self.faults[0].axis} is at fault: {self.faults[0].sentence} {self.verdict.sentence}"

    @property
    def tries(self) -> list[tuple[Arm, Estimate, float | None]]:
        """Arms that gained, with gain and prediction, best first, each advice once: of verdict and evidence."""
        gained: list[tuple[Arm, Estimate, float | None]] = []
        for compared in (self.compared, *self.sweeps.values()):
            gains = compared.gains
            gained += [(arm, gains[arm.name], compared.predicted_gain(arm)) for arm in compared.measured if arm.advice]
        gained = sorted((each for each in gained if each[1].value >= LEAST_TRIED), key=lambda each: each[1].value)
        return [*{each[0].advice: each for each in gained}.values()][::-1]
