"""Threads: which part of a step gets faster with more cores?

Only products scale with the cores. Memory stops when its bandwidth is full, and calls, which are Python, do not scale.
scaling.py predicts the step on each number of threads.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dsmini.diagnosis.evidence.evidence import Evidence, in_ms, in_turns, timed, to_try
from dsmini.diagnosis.interventions.data import replay
from dsmini.diagnosis.interventions.intervention import Step
from dsmini.diagnosis.interventions.machine import cores
from dsmini.diagnosis.predictions import shape_of
from dsmini.diagnosis.scaling import seconds_with_threads, threads_put_back
from dsmini.diagnosis.subject import Subject
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates
from dsmini.report import Plot, Section, Series


@dataclass(frozen=True, kw_only=True)
class ThreadSweep:
    """Seconds of steps by number of threads, ascending."""

    threads: Sequence[int]
    taken: Sequence[Sequence[float]]
    predicted: Sequence[float] | None


def counts_of(available: int, used: int) -> list[int]:
    """Return the numbers of threads to try: powers of two, all cores, and what the run uses."""
    powers = [2**i for i in range(available.bit_length()) if 2**i <= available]
    return sorted({*powers, available, used})


def numbers(subject: Subject, rates: Rates | None, seconds: float) -> ThreadSweep:
    """Predict, then measure."""
    counts, predicted = counts_of(cores(), torch.get_num_threads()), None
    if rates is not None:
        now = forecast(shape_of(subject.config, subject.rows, subject.config.train.dtype), rates)
        predicted = seconds_with_threads(now, counts, rates)
    with replay(subject) as step, threads_put_back():
        found = in_turns({str(n): partial(_step, step, n) for n in counts}, seconds)
    return ThreadSweep(threads=counts, taken=list(found.values()), predicted=predicted)


def _step(step: Step, threads: int) -> float:
    torch.set_num_threads(threads)
    return step(0.0)


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found, used = numbers(subject, rates, seconds), torch.get_num_threads()
    middle = [statistics.median(each) for each in found.taken]
    figures = [
        timed("threads", {"threads": n}, found.taken[i], None if found.predicted is None else found.predicted[i])
        for i, n in enumerate(found.threads)
    ]
    at = found.threads.index(used)
    for i, n in enumerate(found.threads):
        if n > used:
            said = None if found.predicted is None else 1 - found.predicted[i] / found.predicted[at]
            figures.append(
                to_try("threads", f"{n} threads", f"Set train.threads = {n}.", found.taken[i], middle[at], said)
            )
    x = [float(n) for n in found.threads]
    series = in_ms(x, middle, found.predicted, bars=False)
    series.append(Series(label="if all scaled", x=x, y=[1e3 * middle[0] / n for n in found.threads], dashed=True))
    speedup = middle[0] / middle[-1]
    said = "" if found.predicted is None else f"; {found.predicted[0] / found.predicted[-1]:.2f} times was predicted"
    return Section(
        name="threads",
        title="Which part of a step gets faster with more cores?",
        finding=f"{found.threads[-1]} threads are {speedup:.2f} times as fast as one{said}.",
        figures=figures,
        plots=[Plot(title="A step by its threads", x="threads", y="step, ms", series=series)],
        about="Every step has its batch in memory. Only what waits for arithmetic scales with cores.",
    )


def why_not(subject: Subject) -> str | None:
    """Return why threads cannot be tried."""
    if subject.trainer.device.type != "cpu":
        return f"products run on {subject.trainer.device}"
    return "this process may use one core only" if cores() == 1 else None


THREAD_SWEEP = Evidence(name="threads", why_not=why_not, run=run, weight=10.0, steps=12)
