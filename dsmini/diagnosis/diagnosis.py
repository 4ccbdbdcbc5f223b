"""A diagnosis: predictions first, then the experiment, then the verdict.

The predictions are registered before any step runs, and shown next to what was measured whatever came out. An
interrupted diagnosis keeps the rounds that are whole, and gives the verdict that they allow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmini.diagnosis.contention import Watch
from dsmini.diagnosis.experiment import Measured, run_in_turns
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.gains import LEAST_ROUNDS, Gain, gain, gain_of_rounds
from dsmini.diagnosis.interventions.intervention import Intervention, StepSubject
from dsmini.diagnosis.kind import QUIET, KindOfWork
from dsmini.diagnosis.predictions import Prediction
from dsmini.diagnosis.training_work import TRAINING
from dsmini.diagnosis.verdict import Outcome, Verdict, verdict
from dsmini.measure.step_rates import Rates
from dsmini.planner.binding import Axis

OnPart = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Predictions, measurements and conclusions."""

    work: KindOfWork[Any, Any]
    verdict: Verdict
    gains: Mapping[str, Gain]
    """Measured gains by intervention."""
    prediction: Prediction | None
    """None without stored rates of this machine."""
    measured: Measured[Any]
    not_tried: Mapping[str, str]
    """Reasons by intervention."""
    findings: Sequence[Finding]
    stopped: bool
    """The experiment was interrupted; what is here rests on the whole rounds before."""

    @property
    def named(self) -> str:
        """Name of the axis at fault: the one that binds, else that of the first fault that costs no time, else ""."""
        if self.verdict.axis is not None:
            return self.verdict.axis.value
        return next((finding.axis for finding in self.findings if finding.is_fault), "")

    @property
    def best(self) -> Mapping[Axis, str]:
        """Name of each axis's intervention with the largest gain."""
        return self.work.best(self.gains)

    @property
    def sentence(self) -> str:
        """The verdict, with the fault that costs no time, if there is one."""
        faults = [finding for finding in self.findings if finding.is_fault]
        if self.verdict.outcome is Outcome.BINDS or not faults:
            return self.verdict.sentence
        return f"{faults[0].axis} is at fault: {faults[0].sentence} {self.verdict.sentence}"


@dataclass(kw_only=True)
class LookPlan:
    """Time of a diagnosis, and the things that it looks at."""

    rounds: int = 60
    seconds: float = 75.0
    least: int = LEAST_ROUNDS
    interventions: Sequence[Intervention[Any]] | None = None
    """None: all of the kind of work."""


def diagnose(
    subject: StepSubject[Any],
    plan: LookPlan,
    rates: Rates | None,
    on_part: OnPart = lambda done, what: None,
    work: KindOfWork[Any, Any] = TRAINING,
) -> Diagnosis:
    """Diagnose a subject of a kind of work.

    Args:
        rates: this machine's; None: nothing is predicted.
        on_part: told the share that is done and what is next.

    Raises: KeyboardInterrupt if it is interrupted before the least number of rounds.
    """
    wanted = work.interventions if plan.interventions is None else plan.interventions
    not_tried = {each.name: why for each in wanted if (why := each.why_not(subject)) is not None}
    tried = [each for each in wanted if each.name not in not_tried]
    on_part(0.0, "predicting")
    prediction = None if rates is None else work.predict(subject, [each.name for each in tried], rates)
    on_part(0.08, "looking")
    findings = work.look(subject)
    kept: list[Measured[Any]] = []

    def on_round(share: float, measured: Measured[Any]) -> None:
        kept[:] = [measured]
        on_part(0.15 + 0.85 * share, f"round {min(measured.rounds + 1, plan.rounds)}")

    watch = Watch(None if rates is None else rates.roofs, subject.device)
    stopped = False
    try:
        run_in_turns(
            subject,
            tried,
            watch,
            rounds=plan.rounds,
            seconds=plan.seconds,
            least=plan.least,
            on_round=on_round,
        )
    except KeyboardInterrupt:
        if not kept or kept[0].rounds < LEAST_ROUNDS:
            raise
        stopped = True
    findings = [*findings, *work.look_back(subject, kept[0])]
    return conclude(kept[0], prediction, {**work.not_here, **not_tried}, findings, stopped, work)


def conclude(
    measured: Measured[Any],
    prediction: Prediction | None,
    not_tried: Mapping[str, str],
    findings: Sequence[Finding],
    stopped: bool = False,
    work: KindOfWork[Any, Any] = TRAINING,
) -> Diagnosis:
    """Return the diagnosis of what was measured."""
    n = measured.rounds
    gains = {name: gain(measured.plain[:n], taken[:n]) for name, taken in measured.free.items()}
    gains[QUIET.name] = gain_of_rounds([turn.loss for turn in measured.contention])
    gains |= work.estimated(measured, gains)
    axes = work.by_axis(gains)
    return Diagnosis(
        work=work,
        verdict=verdict(axes),
        gains=gains,
        prediction=prediction,
        measured=measured,
        not_tried=not_tried,
        findings=[*(each for each in work.findings(measured, prediction) if each is not None), *findings],
        stopped=stopped,
    )
