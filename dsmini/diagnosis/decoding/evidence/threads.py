"""Threads: how much faster is a decoding step with more cores?

A step of one sequence multiplies vectors with matrices. From memory that is as fast as the bandwidth, which one core
nearly fills; from the processor's caches it scales with the cores. Calls do not scale.
"""

import statistics
from functools import partial

import torch

from dsmini.diagnosis.decoding.arm import PLAIN
from dsmini.diagnosis.decoding.predictions import Prices, seconds_with_threads
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.evidence.evidence import Evidence, in_ms, in_turns, timed, to_try
from dsmini.diagnosis.evidence.threads import ThreadSweep, counts_of, threads_put_back
from dsmini.diagnosis.interventions.machine import cores
from dsmini.measure.step_rates import Rates
from dsmini.report import Plot, Section, Series


def numbers(subject: DecodingSubject, rates: Rates | None, seconds: float) -> ThreadSweep:
    """Predict, then measure."""
    counts, predicted = counts_of(cores(), torch.get_num_threads()), None
    if rates is not None:
        prices = Prices(subject, rates)
        predicted = seconds_with_threads(prices, prices.forecast(PLAIN), counts)
    with threads_put_back():
        found = in_turns({str(n): partial(_step, subject, n) for n in counts}, seconds)
    return ThreadSweep(threads=counts, taken=list(found.values()), predicted=predicted)


def _step(subject: DecodingSubject, threads: int) -> float:
    torch.set_num_threads(threads)
    return subject.step().seconds


def run(subject: DecodingSubject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found, used = numbers(subject, rates, seconds), torch.get_num_threads()
    middle = [statistics.median(each) for each in found.taken]
    said = found.predicted
    figures = [
        timed("threads", {"threads": n}, found.taken[i], None if said is None else said[i])
        for i, n in enumerate(found.threads)
    ]
    at = found.threads.index(used)
    for i, n in enumerate(found.threads):
        if n > used:
            gain = None if said is None else 1 - said[i] / said[at]
            figures.append(
                to_try("threads", f"{n} threads", f"Decode with {n} threads.", found.taken[i], middle[at], gain)
            )
    x = [float(n) for n in found.threads]
    series = in_ms(x, middle, said, bars=False)
    series.append(Series(label="if all scaled", x=x, y=[1e3 * middle[0] / n for n in found.threads], dashed=True))
    words = "" if said is None else f"; {said[0] / said[-1]:.2f} times was predicted"
    return Section(
        name="threads",
        title="How much faster is a step with more cores?",
        finding=f"{found.threads[-1]} threads are {middle[0] / middle[-1]:.2f} times as fast as one{words}.",
        figures=figures,
        plots=[Plot(title="A step by its threads", x="threads", y="ms", series=series)],
    )


def _why_not(subject: DecodingSubject) -> str | None:
    if subject.device.type != "cpu":
        return f"products run on {subject.device}"
    return "this process may use one core only" if cores() == 1 else None


DECODING_THREADS = Evidence[DecodingSubject](name="threads", why_not=_why_not, run=run, weight=8.0, steps=12)
