"""Training as a kind of work: what can be made free, and what its plain steps tell."""

from collections.abc import Mapping, Sequence

from dsmini.diagnosis.experiment import Measured
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings import steps as of_steps
from dsmini.diagnosis.findings.batches import batch_findings, look_at
from dsmini.diagnosis.findings.reading import reading_findings, text_rates
from dsmini.diagnosis.findings.text import text_findings
from dsmini.diagnosis.gains import Gain, gain_of_rounds
from dsmini.diagnosis.interventions.algorithm import DENSE, UNIFORM
from dsmini.diagnosis.interventions.data import REPLAY
from dsmini.diagnosis.interventions.intervention import MadeFree
from dsmini.diagnosis.interventions.machine import DTYPE, THREADS
from dsmini.diagnosis.kind import QUIET, KindOfWork
from dsmini.diagnosis.predictions import Prediction, predict
from dsmini.diagnosis.subject import Subject
from dsmini.diagnosis.verdict import LEAST
from dsmini.planner.binding import Axis
from dsmini.training.trainer import StepResult

BATCHES = 4
"""Batches whose targets are looked at."""
WAITING = MadeFree(
    name="waiting",
    axis=Axis.DATA,
    words="nothing waits, by the step's own clock; replaying a batch confirms it",
    action=REPLAY.action,
)
"""Gain without the time that steps see pass while they wait."""
VOCABULARY = (
    ("Data", "the next batch is not there", "Data", "Data"),
    ("Algorithm", "more work, or smaller pieces, than the result needs", "Algorithm", "Algorithm"),
    ("Machine", "cores, dtype or other programs give less than this machine has", "Machine", "Machine"),
    ("", "memory traffic of the step itself", "Machine", "Data"),
)


def _look(subject: Subject) -> Sequence[Finding]:
    batches = look_at(subject, BATCHES).batches
    return [*text_findings(subject.trainer.corpus, batches), *batch_findings(subject, batches)]


def _look_back(subject: Subject, measured: Measured[StepResult]) -> Sequence[Finding]:
    # prepared again: the first time also reads the text from the disk
    data, seconds = subject.config.data, look_at(subject, BATCHES).seconds
    return reading_findings(subject.trainer.corpus, text_rates(data), seconds, data.workers, measured.steps)


def _findings(measured: Measured[StepResult], prediction: Prediction | None) -> Sequence[Finding | None]:
    return [
        of_steps.waiting(measured.steps),
        of_steps.load(measured.steps),
        of_steps.imbalance_loss(measured.steps, None if prediction is None else prediction.forecast),
        of_steps.contention(measured.contention),
    ]


def _waiting(measured: Measured[StepResult], gains: Mapping[str, Gain]) -> Mapping[str, Gain]:
    """Return the time that steps themselves saw pass while they waited, as a gain, if replaying a batch confirms it.

    A step's own clock is more exact than the difference of two steps. It does not see what preparing batches costs the
    step that runs meanwhile, so that replaying decides where the two disagree, or where its interval could hide a gain
    that is worth an action.
    """
    share, replay = gain_of_rounds([step.data_wait for step in measured.steps]), gains.get(REPLAY.name)
    if replay is None or replay.low <= share.value <= replay.high <= share.value + LEAST:
        return {WAITING.name: share}
    return {}


def _parts(measured: Measured[StepResult]) -> Mapping[str, float]:
    wait = sorted(step.data_wait * step.seconds for step in measured.steps)
    return {"waiting for the batch": wait[len(wait) // 2]}


TRAINING = KindOfWork[Subject, StepResult](
    interventions=(REPLAY, UNIFORM, DENSE, THREADS, DTYPE),
    predict=predict,
    look=_look,
    look_back=_look_back,
    findings=_findings,
    estimates=(QUIET, WAITING),
    estimated=_waiting,
    exact={Axis.DATA: WAITING.name},
    parts=_parts,
    vocabulary=VOCABULARY,
    about_words="Both agree that waiting for a batch is Data. They differ on memory traffic: the article counts it to "
    "the Machine, whose bandwidth is the limit; the textbook to Data, whose bytes must move.",
)
