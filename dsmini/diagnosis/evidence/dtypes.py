"""Dtypes: how much faster is a step in another dtype, and how much could it be at most?

A twin of the run, with random weights, takes steps in each dtype that this machine multiplies. The forecast predicts
each. If a step were nothing but products, it would gain the ratio of the peaks:

    speed-up <= peak in the other dtype / peak in the run's dtype

Worked example: peaks of 170 GFLOP/s in FP32 and 380 in BF16. Whole steps gain at most 2.2 times. With 60 % of the time
in products it is 1 / (0.4 + 0.6 / 2.2) = 1.5 times.

FP8 is simulated: values are rounded to E4M3, products run in the compute dtype. It saves no time here.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import get_args

import torch

from dsmini.config import RunConfig
from dsmini.diagnosis.evidence.evidence import LEAST_TURNS, Evidence, in_ms, in_turns, not_compiled, timed, to_try
from dsmini.diagnosis.predictions import shape_of
from dsmini.diagnosis.subject import Subject
from dsmini.machine import DTYPES, slow_bf16
from dsmini.measure.forecast import forecast
from dsmini.measure.step_rates import Rates
from dsmini.measure.workloads import StepDtype
from dsmini.nn import Transformer
from dsmini.report import Figure, Plot, Section
from dsmini.training.trainer import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DtypeSteps:
    """Seconds of steps by dtype of products."""

    now: str
    """Dtype of the run."""
    taken: Mapping[str, Sequence[float]]
    predicted: Mapping[str, float]
    """Predicted seconds; those that would take too long are here alone. Empty without rates."""
    peaks: Mapping[str, float]
    """FLOP/s of products by dtype."""

    def most(self, dtype: str) -> float | None:
        """Return the speed-up that products alone would have; None for FP8, which is simulated."""
        if dtype not in self.peaks or self.now not in self.peaks:
            return None
        return self.peaks[dtype] / self.peaks[self.now]


def dtype_of(config: RunConfig) -> str:
    """Return the dtype of a run's products."""
    return "fp8" if config.model.precision == "fp8" else config.train.dtype


def with_dtype(config: RunConfig, dtype: str) -> RunConfig:
    """Return a run's config with another dtype of products."""
    model = dataclasses.replace(config.model, precision="fp8" if dtype == "fp8" else "native")
    train = dataclasses.replace(config.train, dtype="float32" if dtype == "float32" else "bfloat16")
    return dataclasses.replace(config, model=model, train=train)


def numbers(subject: Subject, rates: Rates | None, seconds: float) -> DtypeSteps:
    """Predict, then measure."""
    config, now = subject.config, dtype_of(subject.config)
    predicted: dict[str, float] = {}
    if rates is None:
        device = subject.trainer.device
        tried = [now, *(d for d in DTYPES if d != now and not (d == "bfloat16" and slow_bf16(device)))]
    else:
        names = [d for d in get_args(StepDtype) if f"training {d}" in rates.steps]
        predicted = {d: forecast(shape_of(with_dtype(config, d), subject.rows, d), rates).seconds for d in names}
        tried, left = [now], seconds / (1 + LEAST_TURNS) - predicted.get(now, 0.0)
        for d in sorted((d for d in names if d != now), key=lambda d: predicted[d]):
            left -= predicted[d]
            tried += [d] if left > 0 else []
    with ExitStack() as stack:
        steps = {d: stack.enter_context(twin(subject, with_dtype(config, d))) for d in tried}
        taken = in_turns({d: partial(_seconds, step) for d, step in steps.items()}, seconds)
    return DtypeSteps(now=now, taken=taken, predicted=predicted, peaks={} if rates is None else rates.roofs.peak)


def _seconds(step: Callable[[], float]) -> float:
    return step()


@contextmanager
def twin(subject: Subject, config: RunConfig) -> Iterator[Callable[[], float]]:
    """Yield what takes a step of a random model of this config on the subject's batch, and returns its seconds."""
    trainer = subject.trainer
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config.model, compute_dtype=DTYPES[config.train.dtype]).to(trainer.device)
    other = Subject(Trainer(model, trainer.corpus, config, trainer.device))
    other.trainer.steps_done, other.at, other.rows = subject.at, subject.at, subject.rows
    batch, loader = subject.one_batch, other.trainer.loader
    try:
        with other.loader(lambda _: batch):
            yield lambda: other.step().seconds
    finally:
        loader.close()


def _limit(other: str, now: str, speedup: float, most: float) -> Figure:
    """Return the figure of the faster dtype over the slower one, with the ratio of their peaks as its limit."""
    fast, slow = (other, now) if most >= 1 else (now, other)
    return Figure(
        question="dtypes",
        case={"dtype": f"{fast} over {slow}"},
        metric="speed_up",
        unit="x",
        measured=speedup if most >= 1 else 1 / speedup,
        predicted=max(most, 1 / most),
        bound=True,
        note="the ratio of the peaks of products is the limit",
    )


def run(subject: Subject, rates: Rates | None, seconds: float) -> Section:
    """Return the section of a page."""
    found = numbers(subject, rates, seconds)
    middle = {d: statistics.median(each) for d, each in found.taken.items()}
    base, said = middle[found.now], found.predicted.get(found.now)
    figures: list[Figure] = []
    for d in {**middle, **found.predicted}:
        taken, guess = found.taken.get(d, ()), found.predicted.get(d)
        figures.append(timed("dtypes", {"dtype": d}, taken, guess))
        if d != found.now and taken:
            gain = None if guess is None or said is None else 1 - guess / said
            action = 'Set model.precision = "fp8".' if d == "fp8" else f'Set train.dtype = "{d}".'
            figures.append(to_try("dtypes", d, action, taken, base, gain))
            if (most := found.most(d)) is not None:
                figures.append(_limit(d, found.now, base / middle[d], most))
    names = list(middle)
    guesses = [found.predicted.get(d, 0.0) for d in names] if found.predicted else None
    bars = in_ms((), list(middle.values()), guesses, bars=True)
    best = min(middle, key=lambda d: middle[d])
    words = (
        f"The run's {found.now} is the fastest dtype tried"
        if best == found.now
        else (f"{best} is {base / middle[best]:.2f} times as fast as the run's {found.now}")
    )
    return Section(
        name="dtypes",
        title="How fast is a step in another dtype?",
        finding=f"{words}, of {', '.join(names)}.",
        figures=figures,
        plots=[Plot(title="A step by its dtype", x="dtype", y="ms", series=bars, labels=names)],
        about="Twins with random weights take the steps, each with its batch in memory. FP8 is simulated.",
    )


DTYPE_STEPS = Evidence(name="dtypes", why_not=not_compiled, run=run, weight=14.0, steps=6)
