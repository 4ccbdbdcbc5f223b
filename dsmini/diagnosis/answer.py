"""The answer of the command: reads what is named, measures this machine if need be, and diagnoses."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsmini.diagnosis.diagnosis import LookPlan, diagnose
from dsmini.diagnosis.evidence.evidence import Evidence
from dsmini.diagnosis.evidence.gather import EVERY, Gathered, gather
from dsmini.diagnosis.interventions.intervention import Intervention, StepSubject
from dsmini.diagnosis.kind import KindOfWork
from dsmini.diagnosis.pages import report_of, short_report_of
from dsmini.diagnosis.record import record_of
from dsmini.diagnosis.subject import config_of, subject_of
from dsmini.diagnosis.training_work import TRAINING
from dsmini.machine import card
from dsmini.measure.step_rates import load_or_measure_rates, stored_rates
from dsmini.report import Report

SECONDS, QUICK_SECONDS = 75.0, 25.0
"""Time of the rounds."""
TOTAL_SECONDS = 150.0
"""Time of predictions, rounds and evidence, so that a command takes less than three minutes where rates are stored. A
quick diagnosis gathers no evidence."""

RATES, ROUNDS = 0.3, 0.65
"""Shares of the progress after which rates are there, and rounds are over."""
OnPart = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class DiagnosisAnswer:
    """Output of the command."""

    report: Report
    """All of it, for a page."""
    short: Report
    """Report for a terminal."""
    record: dict[str, Any]
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The request for a diagnosis, whatever the kind of work."""

    quick: bool
    rounds: int | None
    only: Sequence[str] = ()
    """Names of the interventions to try; none: all that apply."""
    command: str
    on_part: OnPart
    seconds: float
    """Time of the rounds."""
    evidence: Sequence[Evidence[Any]] = field(default=EVERY)


def answer(
    what: Path | None,
    *,
    quick: bool,
    rounds: int | None,
    only: Sequence[str] = (),
    command: str,
    on_part: OnPart,
) -> DiagnosisAnswer:
    """Diagnose training by a config or a run.

    Raises: ValueError for what is neither, a run that is finished or damaged, and an intervention that does not apply.
    """
    chosen_of(TRAINING, only)
    config, run = config_of(what)
    on_part(0.0, "reading")
    subject = subject_of(config, run)
    train = subject.config.train
    facts = {
        "what": str(what or "the default run"),
        "batch": f"{subject.rows} x {subject.config.seq_len} tokens",
        "products": f"{train.dtype}, threads: {torch.get_num_threads()}",
        "text": subject.trainer.corpus.source,
        "weights": f"after step {subject.at}" if subject.at else "random",
    }
    seconds = QUICK_SECONDS if quick else SECONDS
    asked = Asked(quick=quick, rounds=rounds, only=only, command=command, on_part=on_part, seconds=seconds)
    return answer_of(subject, TRAINING, f"Diagnosis of {what or 'the default run'}", facts, asked)


def answer_of(
    subject: StepSubject[Any], work: KindOfWork[Any, Any], title: str, facts: Mapping[str, str], asked: Asked
) -> DiagnosisAnswer:
    """Diagnose a subject, and gather evidence in the time that is left.

    Args:
        facts: what was diagnosed, for the page.

    Raises: ValueError for an intervention that does not apply.
    """
    chosen, quick, on_part = chosen_of(work, asked.only), asked.quick, asked.on_part
    rates, device = None, subject.device
    if device.type == "cpu":
        rates = (
            stored_rates(device) if quick else load_or_measure_rates(device, on_part=lambda s, w: on_part(RATES * s, w))
        )
    if asked.only:
        for each in chosen:
            if why := each.why_not(subject):
                raise ValueError(f"--only {each.name} does not apply: {why}; leave it out")
    plan = LookPlan(seconds=asked.seconds, interventions=chosen)
    if asked.rounds is not None:
        plan.rounds, plan.least = asked.rounds, asked.rounds
    start, rounds_end = time.perf_counter(), 1.0 if quick else ROUNDS
    found = diagnose(subject, plan, rates, lambda s, part: on_part(RATES + (rounds_end - RATES) * s, part), work)
    gathered = Gathered(not_tried={})
    if not quick and not found.stopped:
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        step = found.measured.seconds

        def on_evidence(share: float, part: str) -> None:
            on_part(ROUNDS + (1 - ROUNDS) * share, part)

        gathered = gather(subject, rates, left, on_evidence, every=asked.evidence, step=step)
    all_facts = {"The run": dict(facts), "The machine": card(device)}
    evidence = {section.name: [figure.as_json() for figure in section.figures] for section in gathered.sections}
    warned = {section.name: list(section.warnings) for section in gathered.sections if section.warnings}
    return DiagnosisAnswer(
        report=report_of(found, title, all_facts, asked.command, gathered),
        short=short_report_of(found, title, gathered),
        record=record_of(found)
        | {"evidence": evidence, "evidence_warnings": warned, "evidence_not_tried": dict(gathered.not_tried)},
        stopped=found.stopped or gathered.stopped,
    )


def chosen_of(work: KindOfWork[Any, Any], only: Sequence[str]) -> Sequence[Intervention[Any]]:
    """Return the interventions of these names, or all; raise ValueError for an unknown name."""
    by_name = {each.name: each for each in work.interventions}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise ValueError(f"unknown intervention {unknown[0]!r}; use one of {', '.join(by_name)}")
    return [by_name[name] for name in only] or work.interventions
