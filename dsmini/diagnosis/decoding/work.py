"""Decoding as a kind of work: what can be made free, and what is looked at besides time."""

from collections.abc import Sequence
from dataclasses import replace

from dsmini.diagnosis.decoding.alternatives import INTERVENTIONS
from dsmini.diagnosis.decoding.drafts import acceptance_finding
from dsmini.diagnosis.decoding.predictions import predict
from dsmini.diagnosis.decoding.subject import DecodedStep, DecodingSubject
from dsmini.diagnosis.experiment import Measured
from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings import steps as of_steps
from dsmini.diagnosis.kind import QUIET, KindOfWork
from dsmini.diagnosis.predictions import Prediction

VOCABULARY = (
    ("Algorithm", "more work, or smaller pieces, than the result needs", "Algorithm", "Algorithm"),
    ("Machine", "cores, dtype or other programs give less than this machine has", "Machine", "Machine"),
    ("Machine", "rows of the cache that each token reads: memory traffic", "Machine", "Data"),
)


LEAVE_A_CORE = "Stop other programs, or leave them a core."


def _look(subject: DecodingSubject) -> Sequence[Finding]:
    found = subject.acceptance
    return [] if found is None else [acceptance_finding(found, subject.trained)]


def _findings(measured: Measured[DecodedStep], prediction: Prediction | None) -> Sequence[Finding | None]:
    return [of_steps.contention(measured.contention, LEAVE_A_CORE)]


DECODING = KindOfWork[DecodingSubject, DecodedStep](
    interventions=INTERVENTIONS,
    predict=predict,
    look=_look,
    findings=_findings,
    estimates=(replace(QUIET, action=LEAVE_A_CORE),),
    not_here={"replay": "decoding waits for no data: the model makes each token itself"},
    vocabulary=VOCABULARY,
    about_words="They differ on memory traffic, here the rows of the cache that a token reads: the article counts it "
    "to the Machine, whose bandwidth is the limit; the textbook to Data, whose bytes must move. Data has no other part "
    "in decoding: the model makes each token itself.",
)
