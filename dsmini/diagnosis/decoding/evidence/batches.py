"""Batch sweep: what does a token cost when more sequences are decoded together?

All sequences share the weights of a step, and each has a cache of its own:

    T(n) = a + b n,  knee = a / b           a: weights and calls; b: products and cache of one sequence

Below the knee a step is flat, and a second sequence costs little. A product with n rows reads a weight of w bytes once
and does 2 n FLOPs with it, so that arithmetic, not memory, limits it from n = ridge * w / 2 on, with the ridge in FLOPs
a byte. Experts come later: n tokens visit more of them, and each has fewer rows.

Worked example: a ridge of 10 FLOPs a byte and weights of 2 bytes: dense products reach it at 10 sequences.
"""

import statistics
from dataclasses import dataclass
from functools import partial

from dsmini.accounting.kv_cache import kv_bytes_per_token
from dsmini.diagnosis.decoding.arm import PLAIN
from dsmini.diagnosis.decoding.predictions import Prices
from dsmini.diagnosis.decoding.steps import Point, seconds_of, steps_in_turn
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.evidence.batch_sweep import BatchSweep, knee_of
from dsmini.diagnosis.evidence.evidence import Evidence, in_ms, in_turns, medians, none_of, timed, to_try
from dsmini.inference.fused.decoder import MOST_TOKENS
from dsmini.machine import memory_bytes
from dsmini.measure.step_rates import Rates
from dsmini.report import Figure, Plot, Section

BATCHES = (1, 2, 4, 8, 16, 32)
"""Numbers of sequences; above MOST_TOKENS other code decodes."""
MOST_MEMORY = 0.25
"""Share of memory that all caches together may take."""


@dataclass(frozen=True, kw_only=True)
class DecodingBatches(BatchSweep):
    """The sweep, and where arithmetic begins to limit it."""

    ridge: float | None
    """Number of sequences at which dense products reach this machine's ridge; None without rates."""


def batches_of(subject: DecodingSubject) -> list[int]:
    """Return the batches to try, ascending."""
    tried = sorted({n for n in (*BATCHES, subject.batch) if n <= MOST_TOKENS or n == subject.batch})
    row, room = kv_bytes_per_token(subject.config, 4), MOST_MEMORY * memory_bytes(subject.device)
    while len(tried) > 1 and sum(tried) * subject.context * row > room and tried[-1] > subject.batch:
        tried.pop()
    return tried


def ridge_batch(weight_bytes: float, rates: Rates, dtype: str) -> float:
    """Return the number of sequences at which a dense product reaches the ridge of FLOPs a byte."""
    peak = rates.roofs.peak.get(dtype, max(rates.roofs.peak.values()))
    return peak / rates.roofs.bandwidth * weight_bytes / 2


def numbers(subject: DecodingSubject, rates: Rates | None, seconds: float) -> DecodingBatches:
    """Predict, then measure."""
    batches = batches_of(subject)
    points = [Point(batch=n, context=subject.context) for n in batches]
    said = None
    if rates is not None:
        prices = Prices(subject, rates)
        said = [prices.forecast(PLAIN, point).seconds for point in points]
    turns = {}
    for n, point in zip(batches, points, strict=True):
        run = PLAIN.steps(subject.model, point)
        turns[str(n)] = partial(seconds_of, run, steps_in_turn(run))
    found = in_turns(turns, seconds)
    size = subject.model.embed.weight.element_size()
    return DecodingBatches(
        batches=batches,
        taken=list(found.values()),
        predicted=said,
        knee=knee_of(batches, medians(found)),
        predicted_knee=None if said is None else knee_of(batches, said),
        ridge=None if rates is None else ridge_batch(size, rates, subject.compute_dtype),
    )


def run(subject: DecodingSubject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    middle = [statistics.median(each) for each in found.taken]
    at = found.batches.index(subject.batch)
    figures: list[Figure] = []
    for i, n in enumerate(found.batches):
        said = None if found.predicted is None else found.predicted[i]
        figures.append(timed("batches", {"batch": n}, found.taken[i], said))
        if n > subject.batch:
            share = n / subject.batch
            per_token = [each / share for each in found.taken[i]]
            gain = None if found.predicted is None else 1 - found.predicted[i] / share / found.predicted[at]
            action = f"Decode {n} sequences at a time: give dsmini.generate several prompts."
            figures.append(to_try("batches", f"batch {n}", action, per_token, middle[at], gain))
    for metric, measured, said, note in (
        ("knee", found.knee, found.predicted_knee, "what all sequences share is half of a step there"),
        ("ridge", None, found.ridge, "dense products reach the ridge of this machine's roofs there"),
    ):
        figures.append(
            Figure(
                question="batches",
                case={"batch": metric},
                metric=metric,
                unit="sequences",
                measured=measured,
                predicted=said,
                note=f"{metric}: {note}",
            )
        )
    tokens = found.batches[-1] / middle[-1] / (found.batches[0] / middle[0])
    words = "" if found.ridge is None else f"; dense products reach the ridge at {found.ridge:.1f}"
    series = in_ms([float(n) for n in found.batches], middle, found.predicted, bars=False)
    return Section(
        name="batches",
        title="What does a token cost when more sequences are decoded together?",
        finding=f"The knee is at {found.knee:.1f} sequences{words}. {found.batches[-1]} sequences make {tokens:.1f} "
        f"times as many tokens a second as {found.batches[0]}.",
        figures=figures,
        plots=[
            Plot(title="A step by its batch", x="sequences", y="ms", series=series, log_x=True, log_y=True),
        ],
        about="Rows of the caches are random, so that experts are chosen as they come.",
    )


BATCHES_TOGETHER = Evidence[DecodingSubject](name="batches", why_not=none_of, run=run, weight=14.0, steps=80)
