"""The answer of the command: reads what is named, measures this machine if need be, and diagnoses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmini.diagnosis.diagnosis import INTERVENTIONS, Plan, diagnose
from dsmini.diagnosis.interventions.intervention import Intervention
from dsmini.diagnosis.pages import report_of
from dsmini.diagnosis.record import record_of
from dsmini.diagnosis.subject import config_of, subject_of
from dsmini.machine import card
from dsmini.measure.step_rates import load_or_measure_rates, stored_rates
from dsmini.report import Report

SECONDS, QUICK_SECONDS = 75.0, 25.0
"""Time of the rounds."""


@dataclass(frozen=True, kw_only=True)
class DiagnosisAnswer:
    """What the command shows and writes."""

    report: Report
    record: dict[str, Any]
    stopped: bool


def answer(
    what: Path | None,
    *,
    quick: bool,
    rounds: int | None,
    only: Sequence[str] = (),
    command: str,
    on_part: Callable[[float, str], None],
) -> DiagnosisAnswer:
    """Diagnose a config or a run.

    Raises: ValueError for what is neither, a run that is finished or damaged, and an intervention that does not apply.
    """
    chosen = _chosen(only)
    config, run = config_of(what)
    on_part(0.0, "reading")
    subject = subject_of(config, run)
    device = subject.trainer.device
    rates = None
    if device.type == "cpu":
        rates = (
            stored_rates(device) if quick else load_or_measure_rates(device, on_part=lambda s, w: on_part(0.4 * s, w))
        )
    if only:
        for each in chosen:
            if why := each.why_not(subject):
                raise ValueError(f"--only {each.name} does not apply: {why}; leave it out")
    plan = Plan(seconds=QUICK_SECONDS if quick else SECONDS, interventions=chosen)
    if rounds is not None:
        plan.rounds, plan.least = rounds, rounds
    found = diagnose(subject, plan, rates, lambda share, part: on_part(0.4 + 0.6 * share, part))
    train = subject.config.train
    facts = {
        "The run": {
            "what": str(what or "the default run"),
            "batch": f"{subject.rows} x {subject.config.seq_len} tokens",
            "products": f"{train.dtype}, threads: {torch.get_num_threads()}",
            "text": subject.trainer.corpus.source,
        },
        "The machine": card(device),
    }
    title = f"Diagnosis of {what or 'the default run'}"
    return DiagnosisAnswer(
        report=report_of(found, title, facts, command), record=record_of(found), stopped=found.stopped
    )


def _chosen(only: Sequence[str]) -> Sequence[Intervention]:
    by_name = {each.name: each for each in INTERVENTIONS}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise ValueError(f"unknown intervention {unknown[0]!r}; use one of {', '.join(by_name)}")
    return [by_name[name] for name in only] or INTERVENTIONS
