"""Weights: how much faster is a step with weights of fewer bytes, and how much could it be at most?

A step of one sequence reads each weight once, so that memory limits it. With weights of half the bytes it gains at most

    speed-up <= bytes of a step now / bytes of a step then        cache and activations included

A step whose weights fit into the processor's caches gains less: there arithmetic and calls count.

Worked example: 100 MB of weights in FP32 and 10 MB of cache. In BF16 a step moves 60 MB: at most 1.83 times as fast.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dsmini.diagnosis.decoding.alternatives import BFLOAT16, FP8, no_kernels
from dsmini.diagnosis.decoding.arm import PLAIN, Arm
from dsmini.diagnosis.decoding.predictions import Prices
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.decoding.variants import with_weights_in
from dsmini.diagnosis.evidence.evidence import Evidence, in_ms, in_turns, timed
from dsmini.measure.forecast import Forecast
from dsmini.measure.step_rates import Rates
from dsmini.nn import Transformer
from dsmini.report import Figure, Plot, Section


def _in_float32(model: Transformer) -> Transformer:
    return with_weights_in(model, torch.float32)


ARMS: Mapping[str, Arm] = {
    "float32": Arm(change=_in_float32, dtype="float32"),
    "bfloat16": BFLOAT16,
    "fp8": FP8,
}


@dataclass(frozen=True, kw_only=True)
class WeightSteps:
    """Steps by dtype of the weights."""

    now: str
    """Dtype of the subject's weights."""
    taken: Mapping[str, Sequence[float]]
    predicted: Mapping[str, Forecast]
    """Empty without rates."""

    def most(self, dtype: str) -> float:
        """Return the speed-up over the subject's weights if bytes were all that counts."""
        return self.predicted[self.now].bytes / self.predicted[dtype].bytes


def numbers(subject: DecodingSubject, rates: Rates | None, seconds: float) -> WeightSteps:
    """Predict, then measure."""
    now = subject.weight_dtype
    arms = {now: PLAIN} | {dtype: arm for dtype, arm in ARMS.items() if dtype != now}
    prices = None if rates is None else Prices(subject, rates)
    predicted = {} if prices is None else {dtype: prices.forecast(arm) for dtype, arm in arms.items()}
    taken = in_turns({dtype: partial(subject.seconds, arm) for dtype, arm in arms.items()}, seconds)
    return WeightSteps(now=now, taken=taken, predicted=predicted)


def run(subject: DecodingSubject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    middle = {dtype: statistics.median(each) for dtype, each in found.taken.items()}
    figures: list[Figure] = []
    for dtype, taken in found.taken.items():
        said = found.predicted[dtype].seconds if found.predicted else None
        figures.append(timed("weights", {"weights": dtype}, taken, said))
        if found.predicted and dtype != found.now:
            figures.append(
                Figure(
                    question="weights",
                    case={"weights": f"{dtype} over {found.now}"},
                    metric="speed_up",
                    unit="x",
                    measured=middle[found.now] / middle[dtype],
                    predicted=found.most(dtype),
                    bound=True,
                    note="the ratio of bytes that a step moves is the limit",
                )
            )
    best = min(middle, key=lambda dtype: middle[dtype])
    guesses = [found.predicted[dtype].seconds for dtype in middle] if found.predicted else None
    bars = in_ms((), list(middle.values()), guesses, bars=True)
    words = f"Weights in {found.now}, as they are, decode fastest of {', '.join(middle)}."
    if best != found.now:
        times = middle[found.now] / middle[best]
        words = f"With weights in {best} a step is {times:.2f} times as fast as with those in {found.now}."
    return Section(
        name="weights",
        title="How fast is a step with weights of other bytes?",
        finding=words,
        figures=figures,
        plots=[Plot(title="A step by its weights", x="weights", y="ms", series=bars, labels=list(middle))],
        about="FP8 weights are codes with scales, which kernels read as they lie. Accuracy is not measured here.",
    )


WEIGHTS = Evidence[DecodingSubject](name="weights", why_not=no_kernels, run=run, weight=6.0, steps=30)
