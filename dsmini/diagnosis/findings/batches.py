"""Findings in the batches that a run takes: their padding, the rows that experts multiply, the guesses that agree."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsmini.diagnosis.finding import Finding
from dsmini.diagnosis.findings.guesses import acceptance
from dsmini.diagnosis.findings.padding import padded_rows, padding
from dsmini.diagnosis.subject import Subject


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """Batches, prepared one after another with nothing else at work."""

    batches: Sequence[tuple[Tensor, Tensor]]
    """Tokens and targets, [b, s] each."""
    seconds: Sequence[float]
    """Time that each took to prepare."""


def look_at(subject: Subject, number: int) -> LookedAt:
    """Prepare the first batches of the run's text."""
    batches: list[tuple[Tensor, Tensor]] = []
    seconds: list[float] = []
    for i in range(number):
        start = time.perf_counter()
        batches.append(subject.trainer.loader.prepared((i * subject.rows, subject.rows)))
        seconds.append(time.perf_counter() - start)
    return LookedAt(batches=batches, seconds=seconds)


def batch_findings(subject: Subject, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Finding]:
    """Return the findings of batches and of the model that reads one of them, in two forwards."""
    trainer = subject.trainer
    tokens = batches[0][0].chunk(subject.config.train.grad_accum)[0]
    documents = trainer.corpus.documents(tokens) if subject.config.data.document_mask else None
    tokens = tokens.to(trainer.device)
    documents = None if documents is None else documents.to(trainer.device)
    found = [
        padding([targets for _, targets in batches]),
        padded_rows(trainer.model, tokens),
        acceptance(trainer.model, tokens, documents, subject.at),
    ]
    return [finding for finding in found if finding is not None]
