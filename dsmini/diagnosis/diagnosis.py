"""A diagnosis: predictions first, then the experiment, then the verdict.

The predictions are registered before any step runs, and shown next to what was measured whatever came out. An
interrupted diagnosis keeps the rounds that are whole, and gives the verdict that they allow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dsmini.diagnosis.contention import Watch
from dsmini.diagnosis.experiment import Measured, run_in_turns
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings import steps as of_steps
from dsmini.diagnosis.findings.batches import batch_findings, look_at
from dsmini.diagnosis.findings.reading import reading_findings, text_rates
from dsmini.diagnosis.findings.text import text_findings
from dsmini.diagnosis.gains import LEAST_ROUNDS, Gain, gain, gain_of_rounds
from dsmini.diagnosis.interventions.algorithm import DENSE, UNIFORM
from dsmini.diagnosis.interventions.data import REPLAY
from dsmini.diagnosis.interventions.intervention import Intervention
from dsmini.diagnosis.interventions.machine import DTYPE, THREADS
from dsmini.diagnosis.predictions import Prediction, predict
from dsmini.diagnosis.subject import Subject
from dsmini.diagnosis.verdict import Outcome, Verdict, verdict
from dsmini.measure.step_rates import Rates
from dsmini.planner.binding import Axis

INTERVENTIONS = (REPLAY, UNIFORM, DENSE, THREADS, DTYPE)
QUIET = "quiet_machine"
"""Gain without other programs. It is estimated, as they cannot be stopped to see."""
WAITING = "waiting"
"""Gain without the time that steps see pass while they wait."""
WORDS = {each.name: each.words for each in INTERVENTIONS} | {
    QUIET: "other programs take nothing; estimated",
    WAITING: "nothing waits, by the step's own clock; replaying a batch confirms it",
}
ACTIONS = {each.name: each.action for each in INTERVENTIONS} | {
    QUIET: "Stop other programs, or leave them a core and set train.threads to the rest.",
    WAITING: REPLAY.action,
}
AXES = {each.name: each.axis for each in INTERVENTIONS} | {QUIET: Axis.MACHINE, WAITING: Axis.DATA}
OnPart = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Predictions, measurements and conclusions."""

    verdict: Verdict
    gains: Mapping[str, Gain]
    """Measured gains by intervention."""
    prediction: Prediction | None
    """None without stored rates of this machine."""
    measured: Measured
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
        return best_of(self.gains)

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
    interventions: Sequence[Intervention] = INTERVENTIONS
    batches: int = 4
    """Batches whose targets are looked at."""


def diagnose(
    subject: Subject, plan: LookPlan, rates: Rates | None, on_part: OnPart = lambda done, what: None
) -> Diagnosis:
    """Diagnose a training run.

    Args:
        rates: this machine's; None: nothing is predicted.
        on_part: told the share that is done and what is next.

    Raises: KeyboardInterrupt if it is interrupted before the least number of rounds.
    """
    not_tried = {each.name: why for each in plan.interventions if (why := each.why_not(subject)) is not None}
    tried = [each for each in plan.interventions if each.name not in not_tried]
    on_part(0.0, "predicting")
    prediction = None if rates is None else predict(subject, [each.name for each in tried], rates)
    on_part(0.08, "looking at the data")
    corpus, data, looked = subject.trainer.corpus, subject.config.data, look_at(subject, plan.batches)
    findings = [*text_findings(corpus, looked.batches), *batch_findings(subject, looked.batches)]
    text = text_rates(data)
    kept: list[Measured] = []

    def on_round(share: float, measured: Measured) -> None:
        kept[:] = [measured]
        on_part(0.15 + 0.85 * share, f"round {measured.rounds + 1}")

    watch = Watch(None if rates is None else rates.roofs, subject.trainer.device)
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
    findings += reading_findings(corpus, text, looked.seconds, data.workers, kept[0].steps)
    return conclude(kept[0], prediction, not_tried, findings, stopped)


def conclude(
    measured: Measured,
    prediction: Prediction | None,
    not_tried: Mapping[str, str],
    findings: Sequence[Finding],
    stopped: bool = False,
) -> Diagnosis:
    """Return the diagnosis of what was measured."""
    n = measured.rounds
    gains = {name: gain(measured.plain[:n], taken[:n]) for name, taken in measured.free.items()}
    gains[QUIET] = gain_of_rounds([turn.loss for turn in measured.contention])
    gains |= _waiting(measured, gains.get(REPLAY.name))
    axes = {axis: gains[name] for axis, name in best_of(gains).items()}
    seen = [
        of_steps.waiting(measured.steps),
        of_steps.load(measured.steps),
        of_steps.imbalance_loss(measured.steps, None if prediction is None else prediction.forecast),
        of_steps.contention(measured.contention),
    ]
    return Diagnosis(
        verdict=verdict(axes),
        gains=gains,
        prediction=prediction,
        measured=measured,
        not_tried=not_tried,
        findings=[*(finding for finding in seen if finding is not None), *findings],
        stopped=stopped,
    )


def _waiting(measured: Measured, replay: Gain | None) -> dict[str, Gain]:
    """Return the time that steps themselves saw pass while they waited, as a gain, if replaying a batch confirms it.

    A step's own clock is more exact than the difference of two steps. It does not see what preparing batches costs the
    step that runs meanwhile, so that replaying decides where the two disagree.
    """
    share = gain_of_rounds([step.data_wait for step in measured.steps])
    if replay is None or replay.low <= share.value <= replay.high:
        return {WAITING: share}
    return {}


def best_of(gains: Mapping[str, Gain]) -> dict[Axis, str]:
    """Return for each axis the intervention that gains most for certain."""
    best: dict[Axis, str] = {}
    for name, found in gains.items():
        axis = AXES[name]
        if axis not in best or found.low > gains[best[axis]].low:
            best[axis] = name
    if WAITING in gains:  # confirmed by replaying, and more exact
        best[Axis.DATA] = WAITING
    return {axis: best[axis] for axis in Axis if axis in best}
