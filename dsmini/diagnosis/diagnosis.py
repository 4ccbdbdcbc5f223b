"""A diagnosis: predictions first, then arms in turns, then the verdict.

The predictions are made before any step runs, and shown next to what was measured whatever came out.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dsmini.diagnosis.arms import Arm, Axis, Comparison, measure, predict
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.findings import Finding
from dsmini.diagnosis.training import Subject
from dsmini.diagnosis.verdict import Verdict, best_arms, gains_by_axis, verdict
from dsmini.measure.forecast import Forecast
from dsmini.measure.step_rates import Rates
from dsmini.measure.turns import Estimate

OnPart = Callable[[float, str], None]
MOST_ROUNDS = 60


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time of a diagnosis, and the arms that it tries."""

    seconds: float = 75.0
    """Time of all rounds; infinite where their number is given."""
    rounds: int = MOST_ROUNDS
    only: Sequence[str] = ()
    """Names of the arms to try; none: all that apply."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Predictions, measurements and conclusions."""

    compared: Comparison
    verdict: Verdict
    findings: Sequence[Finding]
    not_tried: Mapping[str, str] = field(default_factory=dict)
    """Reasons by arm."""
    forecast: Forecast | None = None
    """Forecast of a plain step that waits for nothing; None without stored rates of this machine."""

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
    def best(self) -> dict[Axis, Arm]:
        """Arm of each axis with the largest gain."""
        return best_arms(self.compared)

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


def diagnose(
    subject: Subject | DecodingSubject, plan: Plan, rates: Rates | None, on_part: OnPart = lambda done, what: None
) -> Diagnosis:
    """Diagnose training or decoding.

    Args:
        rates: this machine's; None: nothing is predicted.
        on_part: told the share that is done and what is next.

    Raises: ValueError for an arm that is unknown or does not apply; KeyboardInterrupt if it is interrupted before
        there are rounds enough for an interval.
    """
    arms = chosen(subject.arms(rates), plan.only)
    tried = [arm for arm in arms if arm.why_not is None]
    on_part(0.0, "predicting")
    predicted = predict(tried)
    on_part(0.08, "looking")
    findings = subject.look()

    def on_turn(share: float, number: int) -> None:
        on_part(0.15 + 0.85 * share, f"round {min(number + 1, plan.rounds)}")

    with tried[0].apply() as step:
        step(0.0)  # the first one compiles kernels, and the clock of the rounds does not run yet
    subject.turns.clear()
    until = time.perf_counter() + plan.seconds
    compared = measure(tried, predicted, count=plan.rounds, until=until, on_turn=on_turn)
    not_tried = {arm.name: arm.why_not for arm in arms if arm.why_not is not None}
    return conclude(compared, [*subject.look_back(), *findings], not_tried, subject.forecast())


def conclude(
    compared: Comparison,
    findings: Sequence[Finding],
    not_tried: Mapping[str, str] | None = None,
    forecast: Forecast | None = None,
) -> Diagnosis:
    """Return the diagnosis of what was measured."""
    return Diagnosis(
        compared=compared,
        verdict=verdict(gains_by_axis(compared)),
        findings=findings,
        not_tried=not_tried or {},
        forecast=forecast,
    )


def chosen(arms: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """Return plain steps and the arms of these names, or all; what is estimated from plain steps is in any case.

    Raises: ValueError for a name that is unknown, or of an arm that does not apply.
    """
    by_name = {arm.name: arm for arm in arms[1:] if arm.uncounted}
    for name in only:
        if name not in by_name:
            raise ValueError(f"unknown intervention {name!r}; use one of {', '.join(by_name)}")
        if why := by_name[name].why_not:
            raise ValueError(f"--only {name} does not apply: {why}; leave it out")
    return [arm for arm in arms if not only or arm.name in (arms[0].name, *only) or not arm.uncounted]
