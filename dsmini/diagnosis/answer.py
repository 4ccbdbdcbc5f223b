"""The answer of the command: reads what is named, measures this machine if need be, and diagnoses."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.diagnosis import OnPart, Plan, diagnose
from dsmini.diagnosis.evidence import gather
from dsmini.diagnosis.loading import decoded_model, training_subject
from dsmini.diagnosis.pages import Gathered, record_of, report_of, short_report_of
from dsmini.diagnosis.training import Subject
from dsmini.machine import card
from dsmini.measure.step_rates import load_or_measure_rates, stored_rates
from dsmini.report import Report

SECONDS = {"train": (75.0, 25.0), "decode": (30.0, 18.0)}
"""Time of the rounds, and that of a quick diagnosis; decoding steps are short."""
TOTAL_SECONDS = 150.0
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
    work: Literal["train", "decode"] = "train",
    context: int | None = None,
    batch: int | None = None,
    quick: bool,
    rounds: int | None,
    only: Sequence[str] = (),
    command: str,
    on_part: OnPart,
) -> DiagnosisAnswer:
    """Diagnose training or decoding by a config, a run or a model's folder; gather evidence in the time that is left.

    Args:
        only: names of the arms to try; none: all that apply.

    Raises: ValueError for what is none of them, a damaged run, a context longer than the model's, and an arm that does
        not apply.
    """
    on_part(0.0, "reading")
    subject: Subject | DecodingSubject
    if work == "train":
        subject = training_subject(what)
        title, facts = f"Diagnosis of {what or 'the default run'}", training_facts(subject, what)
    else:
        subject = DecodingSubject(decoded_model(what), batch or 1, context)
        title, facts = f"Diagnosis of decoding, {what or 'the default config'}", decoding_facts(subject, what)
    device, rates = subject.device, None
    if device.type == "cpu":
        rates = (
            stored_rates(device) if quick else load_or_measure_rates(device, on_part=lambda s, w: on_part(RATES * s, w))
        )
    plan = Plan(seconds=SECONDS[work][quick], only=only)
    if rounds is not None:
        plan = Plan(seconds=math.inf, rounds=rounds, only=only)
    start, end = time.perf_counter(), 1.0 if quick else ROUNDS
    found = diagnose(subject, plan, rates, lambda share, part: on_part(RATES + (end - RATES) * share, part))
    gathered = Gathered()
    if not quick and not found.compared.stopped:
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        gathered = gather(subject, found.seconds, left, lambda share, part: on_part(end + (1 - end) * share, part))
    all_facts = {"The run": facts, "The machine": card(device)}
    return DiagnosisAnswer(
        report=report_of(found, gathered, title, all_facts, command),
        short=short_report_of(found, gathered, title),
        record=record_of(found, gathered),
        stopped=found.compared.stopped or gathered.stopped,
    )


def training_facts(subject: Subject, what: Path | None) -> Mapping[str, str]:
    """Return what was diagnosed, for the page."""
    train = subject.config.train
    return {
        "what": str(what or "the default run"),
        "batch": f"{subject.rows} x {subject.config.seq_len} tokens",
        "products": f"{train.dtype}, threads: {torch.get_num_threads()}",
        "text": subject.trainer.corpus.source,
        "weights": f"after step {subject.at}" if subject.at else "random",
    }


def decoding_facts(subject: DecodingSubject, what: Path | None) -> Mapping[str, str]:
    """Return what was diagnosed, for the page."""
    return {
        "what": str(what or "the default config") + ("" if subject.trained else ", random weights"),
        "step": f"1 token of each of {subject.batch} sequences, {subject.context} tokens in the cache of each",
        "weights": f"{subject.weight_dtype}, products and cache: {subject.compute_dtype}, "
        f"threads: {torch.get_num_threads()}",
        "text": subject.source,
    }
