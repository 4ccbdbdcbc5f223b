"""Predict the seconds of a step on another number of threads.

The rates of products and of memory are measured with each number. If they alone decided, a step would take

    ideal(n) = sum of products * P(used) / P(n) + sum of memory * M(used) / M(n) + calls

It does not get that far: small operations stay on one thread, and threads wait for each other. So a step of another
model, one of those that this machine's rates come from, is timed with each number as well. It says which share of the
ideal change a step really gets:

    share = (1 - measured(n) / measured(used)) / (1 - ideal(n) / forecast(used)), of that other model
    T(n)  = T(used) * (1 - share * (1 - ideal(n) / T(used)))

Worked example: 100 ms of products, 60 of memory and 40 of calls on one thread. Two threads double products and read
memory 1.2 times as fast: ideal are 50 + 50 + 40 = 140 ms, a change of 0.3. The other model changes by 0.2 where 0.4 is
ideal: a share of a half. 200 * (1 - 0.5 * 0.3) = 170 ms.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from dsmini.machine import matmul_rate
from dsmini.measure.calibration import read_bandwidth
from dsmini.measure.forecast import Forecast, forecast
from dsmini.measure.step_rates import SHAPES, Rates
from dsmini.measure.timing import interleaved
from dsmini.measure.workloads import StepShape

MOVED = ("move", "copy", "pointwise", "reduce", "gather", "scatter", "softmax", "cast", "optimizer")
"""Classes of operations that memory serves."""
TURNS = 4
LEAST_CHANGE = 0.02
"""Ideal change of the other model below which its share says nothing."""


@contextmanager
def threads_put_back() -> Iterator[None]:
    """Let the number of threads be afterwards what it was before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rates_by_threads(device: torch.device, dtype: torch.dtype, counts: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Return the rates of products, in FLOP/s, and of reading memory, in bytes/s, by number of threads."""
    found: dict[int, tuple[float, float]] = {}
    with threads_put_back():
        for threads in counts:
            torch.set_num_threads(threads)
            found[threads] = matmul_rate(device, dtype, 0.3), read_bandwidth(device, 1 << 27, 2)
    return found


def seconds_with_threads(now: Forecast, counts: Sequence[int], rates: Rates) -> list[float]:
    """Return the predicted seconds of a step on each number of threads. Takes about two seconds.

    Args:
        now: forecast with the threads that are in use.
    """
    device, used = torch.device("cpu"), torch.get_num_threads()
    dtype = torch.float32 if now.shape.dtype == "float32" else torch.bfloat16
    every = sorted({used, *counts})
    found = rates_by_threads(device, dtype, every)
    with threads_put_back():
        config, batch, tokens = SHAPES[now.shape.work][-1]
        other = StepShape(work=now.shape.work, config=config, dtype=now.shape.dtype, batch=batch, tokens=tokens)
        forecast_of_other = forecast(other, rates)
        measured = _measured(other, every, device)
    seconds: list[float] = []
    for threads in counts:
        ideal = _change(now, found[used], found[threads])
        of_other = _change(forecast_of_other, found[used], found[threads])
        real = 1 - measured[threads] / measured[used]
        share = real / of_other if abs(of_other) > LEAST_CHANGE else 1.0
        seconds.append(now.seconds * (1 - share * ideal))
    return seconds


def ideal_seconds(by_class: Mapping[str, float], now: tuple[float, float], then: tuple[float, float]) -> float:
    """Return the seconds of classes of operations when the rates of (products, memory) change; calls stay."""

    def faster(name: str) -> float:
        if name == "calls":
            return 1.0
        return then[1] / now[1] if name in MOVED else then[0] / now[0]

    return sum(seconds / faster(name) for name, seconds in by_class.items())


def _change(step: Forecast, now: tuple[float, float], then: tuple[float, float]) -> float:
    """Return the share of a step that would go, or a negative one that would come, if rates alone decided."""
    return 1 - ideal_seconds(step.by_class, now, then) / step.seconds


def _measured(shape: StepShape, counts: Sequence[int], device: torch.device) -> dict[int, float]:
    """Return the median seconds of a step on each number of threads, which take turns."""
    step = shape.make(device)

    def with_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        step()

    runs = {str(threads): partial(with_threads, threads) for threads in counts}
    taken = interleaved(runs, device, TURNS)
    return {threads: statistics.median(taken[str(threads)]) for threads in counts}
