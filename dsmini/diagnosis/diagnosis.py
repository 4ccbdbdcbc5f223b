"""A diagnosis: predictions first, then arms in turns, then the verdict. `answer` is all that the command does.

The predictions are made before any step runs, and shown next to what was measured whatever came out.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsmini.diagnosis import evidence
from dsmini.diagnosis.arms import Arm, Comparison, measure, predict
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.findings import Finding
from dsmini.diagnosis.loading import decoded_model, training_subject
from dsmini.diagnosis.pages import Diagnosis
from dsmini.diagnosis.training import Subject
from dsmini.diagnosis.verdict import gains_by_axis, verdict
from dsmini.machine import card
from dsmini.measure import step_rates
from dsmini.measure.forecast import Forecast
from dsmini.measure.rates import BUSY, BUSY_WORDS
from dsmini.measure.step_rates import Rates

OnPart = Callable[[float, str], None]
MOST_ROUNDS = 60
SECONDS = {"train": (75.0, 25.0), "decode": (30.0, 18.0)}
"""Time of the rounds, and that of a quick diagnosis; decoding steps are short."""
TOTAL_SECONDS = 150.0
"""Time of predictions, rounds and evidence, so that a command takes less than three minutes where rates are stored. A
quick diagnosis gathers no evidence."""
RATES, ROUNDS = 0.3, 0.65
"""Shares of the progress after which rates are there, and rounds are over."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time of a diagnosis, and the arms that it tries."""

    seconds: float = 75.0
    """Time of all rounds; infinite where their number is given."""
    rounds: int = MOST_ROUNDS
    only: Sequence[str] = ()
    """Names of the arms to try; none: all that apply."""


def answer(
    what: Path | None,
    *,
    work: Literal["train", "decode"] = "train",
    context: int | None = None,
    batch: int | None = None,
    quick: bool = False,
    rounds: int | None = None,
    only: Sequence[str] = (),
    on_part: OnPart = lambda done, what: None,
) -> Diagnosis:
    """Diagnose training or decoding by a config, a run or a model's folder; gather evidence in the time that is left.

    Args:
        only: names of the arms to try; none: all that apply.

    Raises: ValueError for what is none of them, a damaged run, a context longer than the model's, and an arm that does
        not apply.
    """
    on_part(0.0, "reading")
    subject: Subject | DecodingSubject
    subject = training_subject(what) if work == "train" else DecodingSubject(decoded_model(what), batch or 1, context)
    device, rates = subject.device, None
    if device.type == "cpu" and quick:
        rates = step_rates.stored_rates(device)
    elif device.type == "cpu":
        rates = step_rates.load_or_measure_rates(device, on_part=lambda s, w: on_part(RATES * s, w))
    plan = Plan(seconds=SECONDS[work][quick], only=only)
    if rounds is not None:
        plan = Plan(seconds=math.inf, rounds=rounds, only=only)
    start, end = time.perf_counter(), 1.0 if quick else ROUNDS
    found = diagnose(subject, plan, rates, lambda share, part: on_part(RATES + (end - RATES) * share, part))
    if not quick and not found.compared.stopped:
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        found.gathered = evidence.gather(
            subject, found.seconds, left, lambda share, part: on_part(end + (1 - end) * share, part)
        )
    found.of = f"{'decoding, ' if work == 'decode' else ''}{what or 'the default run'}"
    found.facts, found.machine = subject.facts, card(device)
    if rates is not None and rates.busy > BUSY:
        found.warnings.append(f"{BUSY_WORDS.format(rates.busy).capitalize()}.")
    return found


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
