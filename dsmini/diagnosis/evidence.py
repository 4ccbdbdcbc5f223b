"""Evidence: experiments next to the verdict, which do not enter it: other batches, and other numbers of threads.

A sweep is arms at several places. One over batches fits a line through its arms, all with the same relative error:

    T(n) = a + b n,    knee = a / b        what does not depend on the size, such as the optimizer, is half at the knee

Worked example: a = 60 ms, b = 10 ms. The knee is at 6 sequences. A batch of 8 takes 140 ms, 17.5 a sequence; one of 16
takes 220 ms, 13.75 a sequence: 21 % of a token's time goes. From 32 to 64 it is 8 %.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from dsmini.diagnosis.arms import Arm, Comparison, measure, predict
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.pages import plot_of, sentence_of, table_of
from dsmini.diagnosis.training import Subject
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.machine import cores
from dsmini.measure.price import quiet
from dsmini.report import Section
from dsmini.report.units import plural

LEAST_TURNS, MOST_TURNS = 2, 15
ABOUT_BATCHES = (
    "Batches are in memory, and rows of caches random. This does not measure how much a larger batch teaches."
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """An experiment."""

    name: str
    why_not: str | None = None
    """Reason why it cannot be made; None if it can."""
    run: Callable[[float], tuple[Section, Comparison]]
    """Makes it in about this many seconds."""


def gather(
    found: Diagnosis,
    subject: Subject | DecodingSubject,
    seconds: float,
    on_part: Callable[[float, str], None] = lambda done, what: None,
) -> None:
    """Add all experiments that apply and fit into the seconds. An interruption keeps those that are done.

    Args:
        on_part: told the share that is done and what is next.
    """
    until = time.perf_counter() + seconds
    if subject.prices is not None:
        subject.prices.until, subject.prices.on_part = until, quiet
    every = all_evidence(subject, found.seconds)
    found.not_tried |= {each.name: each.why_not for each in every if each.why_not is not None}
    left = [each for each in every if each.why_not is None]
    try:
        for number, each in enumerate(left):
            on_part(number / len(left), each.name)
            share = (until - time.perf_counter()) / (len(left) - number)
            if share <= 0:
                found.not_tried[each.name] = "the time was over"
                continue
            try:
                section, compared = each.run(share)
            except (ValueError, RuntimeError, MemoryError) as error:  # the verdict stands without it
                lines = str(error).splitlines() or [type(error).__name__]
                found.not_tried[each.name] = f"it failed: {lines[0]}"
                continue
            found.sections.append(section)
            found.sweeps[each.name] = compared
            if compared.stopped:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        done = {section.name for section in found.sections} | found.not_tried.keys()
        found.not_tried |= {each.name: "it was interrupted" for each in left if each.name not in done}
        found.warnings.append("It was interrupted after the verdict; some evidence is missing.")
        found.stopped = True
    on_part(1.0, "evidence")


def all_evidence(subject: Subject | DecodingSubject, step: float) -> list[Evidence]:
    """Return all evidence of training or decoding.

    Args:
        step: seconds of a plain step.
    """
    used, most = torch.get_num_threads(), cores()
    own, *sizes = subject.batch_sizes()
    if subject.work == "training":
        of_batch = "Set train.batch_size = {}, if fewer and larger steps learn as much from the same tokens."
        of_threads = "Set train.threads = {}."
    else:
        of_batch = "Decode {} sequences at a time: give dsmini.generate several prompts."
        of_threads = "Decode with {} threads."
    batches = [
        Arm(
            name=f"batch x {n / own:g}" if n != own else f"batch {n}",
            apply=partial(subject.batch_of, n),
            advice=of_batch.format(n),
            predict=lambda n=n: subject.forecast(batch=n).seconds,
            tokens=n / own,
            at=float(n),
        )
        for n in (own, *sizes)
    ]
    numbers = {2**i for i in range(most.bit_length()) if 2**i <= most} | {most}
    threads = [
        Arm(
            name=plural(n, "thread"),
            apply=partial(subject.threads, n),
            axis="Machine",
            advice=of_threads.format(n),
            predict=lambda n=n: subject.seconds_on(n),
            at=float(n),
        )
        for n in (used, *sorted(numbers - {used}))
    ]
    alone = "this process may use one core only" if most == 1 else None
    alone = f"products run on {subject.device}" if subject.device.type != "cpu" else alone
    predicting = subject.prices is not None
    return [
        Evidence(name="batches", run=partial(sweep, "batches", batches, predicting, step)),
        Evidence(name="threads", run=partial(sweep, "threads", threads, predicting, step), why_not=alone),
    ]


def sweep(name: str, arms: Sequence[Arm], predicting: bool, step: float, seconds: float) -> tuple[Section, Comparison]:
    """Let arms take turns of one step, the first as the work is, without the longest where the time is short."""
    until, tried = time.perf_counter() + seconds, list(arms)
    while len(tried) > 1 and (1 + LEAST_TURNS) * step * sum(arm.tokens for arm in tried) > seconds:
        tried.remove(max(tried[1:], key=lambda arm: arm.tokens))
    tried = [replace(arm, uncounted=0, counted=1) for arm in tried]
    compared = measure(tried, predict(tried) if predicting else {}, count=MOST_TURNS, until=until)
    finding, x = sentence_of(compared), "threads"
    title, about = "How much faster is a step with more cores?", "Only what waits for arithmetic scales with cores."
    if name == "batches":
        title, x, about = "What does a token cost in a larger batch?", "sequences", ABOUT_BATCHES
        fixed, each = line_through(compared)
        if each > 0:
            finding = f"The knee is at {max(0.0, fixed / each):.1f} sequences. {finding}"
    shown = {"tables": [table_of(compared)], "plots": [plot_of(compared, title, x)]}
    return Section(name=name, title=title, finding=finding, about=about, **shown), compared


def line_through(compared: Comparison) -> tuple[float, float]:
    """Return a and b of the line a + b n through the measured arms."""
    placed = [arm for arm in compared.arms if arm.name in compared.turns.seconds]
    at, seconds = [arm.at or 0.0 for arm in placed], [compared.turns.median(arm.name) for arm in placed]
    if len(placed) < 2:
        return 0.0, 0.0
    each, fixed = np.polyfit(at, seconds, 1, w=1 / np.asarray(seconds))
    return float(fixed), float(each)
