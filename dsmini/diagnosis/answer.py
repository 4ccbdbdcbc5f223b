"""The answer of the command: reads what is named, measures this machine if need be, and diagnoses."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmini.diagnosis.diagnosis import INTERVENTIONS, LookPlan, diagnose
from dsmini.diagnosis.evidence.gather import Gathered, gather
from dsmini.diagnosis.interventions.intervention import Intervention
from dsmini.diagnosis.pages import report_of, short_report_of
from dsmini.diagnosis.record import record_of
from dsmini.diagnosis.subject import config_of, subject_of
from dsmini.machine import card
from dsmini.measure.step_rates import load_or_measure_rates, stored_rates
from dsmini.report import Report

SECONDS, QUICK_SECONDS = 75.0, 25.0
"""Time of the rounds."""
TOTAL_SECONDS = 160.0
"""Time of predictions, rounds and evidence, so that a command takes less than three minutes where rates are stored. A
quick diagnosis gathers no evidence."""

RATES, ROUNDS = 0.3, 0.65
"""Shares of the progress after which rates are there, and rounds are over."""


@dataclass(frozen=True, kw_only=True)
class DiagnosisAnswer:
    """Output of the command."""

    report: Report
    """All of it, for a page."""
    short: Report
    """Report for a terminal."""
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
            stored_rates(device) if quick else load_or_measure_rates(device, on_part=lambda s, w: on_part(RATES * s, w))
        )
    if only:
        for each in chosen:
            if why := each.why_not(subject):
                raise ValueError(f"--only {each.name} does not apply: {why}; leave it out")
    plan = LookPlan(seconds=QUICK_SECONDS if quick else SECONDS, interventions=chosen)
    if rounds is not None:
        plan.rounds, plan.least = rounds, rounds
    start, rounds_end = time.perf_counter(), 1.0 if quick else ROUNDS
    found = diagnose(subject, plan, rates, lambda share, part: on_part(RATES + (rounds_end - RATES) * share, part))
    gathered = Gathered(not_tried={})
    if not quick and not found.stopped:
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        step = found.measured.seconds
        gathered = gather(subject, rates, left, lambda s, part: on_part(ROUNDS + (1 - ROUNDS) * s, part), step=step)
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
    evidence = {section.name: [figure.as_json() for figure in section.figures] for section in gathered.sections}
    warned = {section.name: list(section.warnings) for section in gathered.sections if section.warnings}
    return DiagnosisAnswer(
        report=report_of(found, title, facts, command, gathered),
        short=short_report_of(found, title, gathered),
        record=record_of(found)
        | {"evidence": evidence, "evidence_warnings": warned, "evidence_not_tried": dict(gathered.not_tried)},
        stopped=found.stopped or gathered.stopped,
    )


def _chosen(only: Sequence[str]) -> Sequence[Intervention]:
    by_name = {each.name: each for each in INTERVENTIONS}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise ValueError(f"unknown intervention {unknown[0]!r}; use one of {', '.join(by_name)}")
    return [by_name[name] for name in only] or INTERVENTIONS
