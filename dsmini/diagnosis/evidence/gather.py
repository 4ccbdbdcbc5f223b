"""Gather evidence, one experiment after another, in the time that is left."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmini.diagnosis.evidence.batch_sweep import BATCH_SWEEP
from dsmini.diagnosis.evidence.dense_twin import DENSE_TWIN
from dsmini.diagnosis.evidence.dtypes import DTYPE_STEPS
from dsmini.diagnosis.evidence.evidence import Evidence
from dsmini.diagnosis.evidence.loader_delay import LOADER_DELAY
from dsmini.diagnosis.evidence.numerics import NUMERICS
from dsmini.diagnosis.evidence.roofline import ROOFLINE
from dsmini.diagnosis.evidence.threads import THREAD_SWEEP
from dsmini.diagnosis.evidence.timeline import TIMELINE
from dsmini.diagnosis.evidence.virtual_speedup import VIRTUAL_SPEEDUP
from dsmini.diagnosis.interventions.intervention import StepSubject
from dsmini.measure.step_rates import Rates
from dsmini.report import Section

EVERY: Sequence[Evidence[Any]] = (
    *(TIMELINE, ROOFLINE, BATCH_SWEEP, LOADER_DELAY),
    *(THREAD_SWEEP, DTYPE_STEPS, NUMERICS, DENSE_TWIN, VIRTUAL_SPEEDUP),
)
PREDICTING = 1.5
"""Seconds that an experiment takes to predict, of its time."""
FAR_LONGER = 1.7
"""An experiment that needs this many times its share of the time is not tried."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Sections of all experiments that were made."""

    sections: Sequence[Section] = ()
    not_tried: Mapping[str, str]
    """Reasons by experiment."""
    stopped: bool = False
    """It was interrupted; the sections are those before."""


def gather(
    subject: StepSubject[Any],
    rates: Rates | None,
    seconds: float,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    every: Sequence[Evidence[Any]] = EVERY,
    step: float = 0.0,
) -> Gathered:
    """Make all experiments that apply and fit into the seconds. An interruption keeps those that are done.

    Args:
        on_part: told the share that is done and what is next.
        step: seconds of a plain step. An experiment that would take far longer than its share is not tried.
    """
    not_tried = {each.name: why for each in every if (why := _why_not(each, subject, rates)) is not None}
    tried = [each for each in every if each.name not in not_tried]
    sections: list[Section] = []
    start = time.perf_counter()
    try:
        for number, each in enumerate(tried):
            on_part(number / len(tried), each.name.replace("_", " "))
            left = seconds - (time.perf_counter() - start)
            if left <= 0:
                not_tried[each.name] = "the time was over"
                continue
            share = left * each.weight / sum(later.weight for later in tried[number:])
            if each.steps * step > FAR_LONGER * share:
                not_tried[each.name] = f"it takes about {each.steps * step:.0f} s, and has {share:.0f}"
                continue
            try:
                sections.append(each.run(subject, rates, max(0.0, share - PREDICTING)))
            except (
                ValueError,
                RuntimeError,
                MemoryError,
            ) as error:  # of memory or rates; the verdict stands without it
                lines = str(error).splitlines() or [type(error).__name__]
                not_tried[each.name] = f"it failed: {lines[0]}"
    except KeyboardInterrupt:
        done = {section.name for section in sections} | not_tried.keys()
        not_tried |= {each.name: "it was interrupted" for each in tried if each.name not in done}
        return Gathered(sections=sections, not_tried=not_tried, stopped=True)
    on_part(1.0, "evidence")
    return Gathered(sections=sections, not_tried=not_tried)


def _why_not(each: Evidence[Any], subject: StepSubject[Any], rates: Rates | None) -> str | None:
    if each.needs_rates and rates is None:
        return "this machine's rates are not measured"
    return each.why_not(subject)
