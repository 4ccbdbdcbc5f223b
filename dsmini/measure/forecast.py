"""Forecast a step on this machine before it runs: from the operations that it would run, and this machine's rates.

    rates = load_or_measure_rates(torch.device("cpu"))
    forecast(StepShape(work="decode", config=config, dtype="bfloat16", batch=1, tokens=1024), rates).seconds

The step at its real size is run dry (dry.py): the code decides which operations and kernels serve, and computes
nothing. Each operation gets the seconds of its class, size and share of cold bytes (prediction.py), times the factor
by which operations of its class take longer inside a step (step_rates.py). No number comes from a run of the model.

    seconds = sum over operations of (seconds * factor of the class) + calls * seconds of a call

Simulated: experts are chosen at random, all alike likely.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dsmini.config import ModelConfig, TrainConfig
from dsmini.measure.dry import dry_count
from dsmini.measure.step_rates import Rates
from dsmini.measure.workloads import StepDtype, StepShape


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Time and memory that a step will take here."""

    shape: StepShape
    seconds: float
    by_class: Mapping[str, float]
    """Seconds by class of operations, and those of "calls", longest first."""
    calls: int
    """Operations and views."""
    flops: int
    bytes: int
    """Bytes that the operations must move."""
    held: int
    """Bytes of all tensors after a step: weights, and gradients or optimizer state or the cache."""
    peak: int
    """The most bytes that tensors take at a time in a step, `held` included."""
    process: int
    """Resident bytes of a process at its peak: `peak`, and what Python, torch and its buffers take."""


def forecast(
    shape: StepShape, rates: Rates, make: Callable[[], Callable[[], object]] | None = None, of: str = ""
) -> Forecast:
    """Forecast a step on the CPU that the rates are of. Takes about a second; computes and holds nothing of the model.

    Args:
        make: makes the step, where it is not a plain one of this shape.
        of: the rates that price it, such as "prefill float32"; "": those of the shape's work and dtype.

    Raises: ValueError where this machine has no rates for the dtype.
    """
    name = of or f"{shape.work} {shape.dtype}"
    if name not in rates.steps:
        raise ValueError(f"there are no rates of {name} here; have {', '.join(rates.steps)}")
    counted = dry_count(make or (lambda: shape.make(torch.device("cpu"))), rates.roofs.cache_bytes)
    parts = rates.steps[name].seconds(counted.operations, counted.views, rates.roofs)
    return Forecast(
        shape=shape,
        seconds=sum(parts.values()),
        by_class=dict(sorted(parts.items(), key=lambda part: -part[1])),
        calls=len(counted.operations) + counted.views,
        flops=counted.flops,
        bytes=counted.bytes,
        held=counted.left,
        peak=counted.peak,
        process=counted.peak + rates.process,
    )


def forecast_training(
    config: ModelConfig, train: TrainConfig, dtype: StepDtype, batch: int, seq_len: int, rates: Rates
) -> Forecast:
    """Forecast an optimizer step over `batch` sequences."""
    shape = StepShape(work="training", config=config, dtype=dtype, batch=batch, tokens=seq_len, train=train)
    return forecast(shape, rates)
