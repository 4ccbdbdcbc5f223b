"""Predictions, made before any step runs: the seconds of a plain decoding step, and of each alternative.

A model like the subject's is made and decodes without computing anything (measure/dry.py). The operations that would
run are priced by this machine's rates. Nothing is timed for it, but for two things: the rates on other numbers of
threads, and no seconds but a count, the guesses that are accepted.

    all_threads     memory by the ratio of bandwidths, the rest by that of products, calls as they are

A class of operations moves as many of its seconds by memory as its share of bytes that no cache holds.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch

from dsmini.diagnosis.decoding.alternatives import ALTERNATIVES, tokens_of
from dsmini.diagnosis.decoding.arm import PLAIN, Arm
from dsmini.diagnosis.decoding.steps import Point
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.interventions.machine import THREADS, cores
from dsmini.diagnosis.predictions import Prediction
from dsmini.machine import matmul_rate
from dsmini.measure.calibration import read_bandwidth
from dsmini.measure.dry import Dry, dry_count
from dsmini.measure.forecast import Forecast
from dsmini.measure.step_rates import Rates, class_of
from dsmini.measure.workloads import StepShape
from dsmini.nn import Transformer


def like(subject: DecodingSubject) -> Transformer:
    """Return a model of the same config and dtypes; made dry, it takes no memory."""
    model = Transformer(subject.config, compute_dtype=subject.model.compute_dtype)
    return model.to(subject.model.embed.weight.dtype).eval()


def counted(subject: DecodingSubject, arm: Arm, point: Point, cache_bytes: int) -> Dry:
    """Return the operations of an arm's step, which does not run."""
    return dry_count(lambda: arm.steps(like(subject), point), cache_bytes)


def priced(subject: DecodingSubject, arm: Arm, rates: Rates, point: Point | None = None) -> Forecast:
    """Return the forecast of an arm's step.

    Args:
        point: None: the subject's.
    """
    point = Point(batch=subject.batch, context=subject.context) if point is None else point
    dry = counted(subject, arm, point, rates.roofs.cache_bytes)
    dtype = arm.dtype or subject.weight_dtype
    parts = rates.steps[f"{arm.rates_of} {dtype}"].seconds(dry.operations, dry.views, rates.roofs)
    return Forecast(
        shape=StepShape(work="decode", config=subject.config, dtype=dtype, batch=point.batch, tokens=point.context),
        seconds=sum(parts.values()),
        by_class=dict(sorted(parts.items(), key=lambda part: -part[1])),
        calls=len(dry.operations) + dry.views,
        flops=dry.flops,
        bytes=dry.bytes,
        held=dry.left,
        peak=dry.peak,
        process=dry.peak + rates.process,
    )


def predict(subject: DecodingSubject, names: Sequence[str], rates: Rates) -> Prediction:
    """Predict a subject's steps with each of the interventions named."""
    seconds = cache(lambda arm: priced(subject, arm, rates).seconds)
    plain = priced(subject, PLAIN, rates)
    free: dict[str, float] = {}
    for name in names:
        if name in ALTERNATIVES:
            free[name] = ALTERNATIVES[name].seconds(plain.seconds, seconds, tokens_of(subject, name))
    if THREADS.name in names:
        free[THREADS.name] = seconds_with_threads(subject, plain, rates, [cores()])[0]
    return Prediction(plain=plain.seconds, free=free, forecast=plain)


def seconds_with_threads(subject: DecodingSubject, now: Forecast, rates: Rates, counts: Sequence[int]) -> list[float]:
    """Return the predicted seconds of a step on each number of threads."""
    before, dtype = torch.get_num_threads(), getattr(torch, subject.compute_dtype)
    measured: dict[int, tuple[float, float]] = {}
    try:
        for threads in {before, *counts}:
            torch.set_num_threads(threads)
            measured[threads] = matmul_rate(subject.device, dtype, 0.3), read_bandwidth(subject.device, 1 << 27, 2)
    finally:
        torch.set_num_threads(before)
    point = Point(batch=subject.batch, context=subject.context)
    cold = cold_shares(counted(subject, PLAIN, point, rates.roofs.cache_bytes))
    return [scaled(now.by_class, cold, measured[before], measured[threads]) for threads in counts]


def cold_shares(dry: Dry) -> dict[str, float]:
    """Return the share of bytes that come from memory, by class of operations."""
    moved: dict[str, list[int]] = {}
    for op in dry.operations:
        total = moved.setdefault(class_of(op), [0, 0])
        total[0] += op.cold
        total[1] += op.bytes
    return {name: cold / max(1, total) for name, (cold, total) in moved.items()}


def scaled(
    by_class: Mapping[str, float], cold: Mapping[str, float], now: tuple[float, float], then: tuple[float, float]
) -> float:
    """Return the seconds of classes of operations when the rates of (products, memory) change; calls stay."""

    def faster(name: str) -> float:
        share = cold[name]
        return (1 - share) * now[0] / then[0] + share * now[1] / then[1]

    return sum(seconds * (1.0 if name == "calls" else faster(name)) for name, seconds in by_class.items())
