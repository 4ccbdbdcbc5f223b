"""Evidence next to the verdict, which does not enter it: what a token costs in other batches.

A sweep is arms at several places. A line is fitted through its arms, all with the same relative error:

    T(n) = a + b n,    knee = a / b        what does not depend on the size, such as the optimizer, is half at the knee

Worked example: a = 60 ms, b = 10 ms. The knee is at 6 sequences. A batch of 8 takes 140 ms, 17.5 a sequence; one of 16
takes 220 ms, 13.75 a sequence: 21 % of a token's time goes. From 32 to 64 it is 8 %.
"""

import time
from functools import partial

import numpy as np

from dsmini.diagnosis.arms import Arm, Comparison, measure, predict
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.pages import plot_of, sentence_of, table_of
from dsmini.diagnosis.training import Subject
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.measure.price import quiet
from dsmini.report import Section

NAME = "batches"
LEAST_TURNS, MOST_TURNS = 2, 15


def gather(found: Diagnosis, subject: Subject | DecodingSubject, seconds: float) -> None:
    """Add the sweep over batches if there is time, and say why where it is missing. The verdict stands without it."""
    if seconds <= 0:
        found.not_tried[NAME] = "the time was over"
        return
    if subject.prices is not None:
        subject.prices.until, subject.prices.on_part = time.perf_counter() + seconds, quiet
    try:
        found.sweeps[NAME] = compared = sweep(subject, found.seconds, seconds)
        found.sections.append(section_of(compared))
        found.stopped = compared.stopped
    except (ValueError, RuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        found.not_tried[NAME] = f"it failed: {lines[0]}"
    except KeyboardInterrupt:
        found.not_tried[NAME], found.stopped = "it was interrupted", True
    if found.stopped:
        found.warnings.append("It was interrupted after the verdict; some evidence is missing.")


def sweep(subject: Subject | DecodingSubject, step: float, seconds: float) -> Comparison:
    """Let batches take turns of one step, the run's own first, without the largest where the time is short.

    Args:
        step: seconds of a plain step.
    """
    until, (own, *sizes) = time.perf_counter() + seconds, subject.batch_sizes()
    advice = "Decode {} sequences at a time: give dsmini.generate several prompts."
    if subject.work == "training":
        advice = "Set train.batch_size = {}, if fewer and larger steps learn as much from the same tokens."
    tried = [
        Arm(
            name=f"batch x {n / own:g}" if n != own else f"batch {n}",
            apply=partial(subject.batch_of, n),
            advice=advice.format(n),
            predict=lambda n=n: subject.forecast(batch=n).seconds,
            uncounted=0,
            counted=1,
            tokens=n / own,
            at=float(n),
        )
        for n in (own, *sizes)
    ]
    while len(tried) > 1 and (1 + LEAST_TURNS) * step * sum(arm.tokens for arm in tried) > seconds:
        tried.remove(max(tried[1:], key=lambda arm: arm.tokens))
    return measure(tried, predict(tried) if subject.prices else {}, count=MOST_TURNS, until=until)


def section_of(compared: Comparison) -> Section:
    """Return the sweep as a section of the page: its knee, and the batch with the shortest time of a token."""
    finding, title = sentence_of(compared), "What does a token cost in a larger batch?"
    fixed, each = line_through(compared)
    if each > 0:
        finding = f"The knee is at {max(0.0, fixed / each):.1f} sequences. {finding}"
    return Section(
        name=NAME,
        title=title,
        finding=finding,
        about="Batches are in memory, rows of caches random. This does not measure how much a larger batch teaches.",
        tables=[table_of(compared)],
        plots=[plot_of(compared, title, "sequences")],
    )


def line_through(compared: Comparison) -> tuple[float, float]:
    """Return a and b of the line a + b n through the measured arms."""
    placed = [arm for arm in compared.arms if arm.name in compared.turns.seconds]
    at, seconds = [arm.at or 0.0 for arm in placed], [compared.turns.median(arm.name) for arm in placed]
    if len(placed) < 2:
        return 0.0, 0.0
    each, fixed = np.polyfit(at, seconds, 1, w=1 / np.asarray(seconds))
    return float(fixed), float(each)
