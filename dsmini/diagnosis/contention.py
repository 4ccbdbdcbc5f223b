"""What other programs take of this machine while steps run, and what a step takes on another number of threads.

The operating system says how many cores others kept busy, and how long this process's threads were ready without a
core. Probes, a product and a read of memory, say how much slower they run now than when this machine's rates were
measured. Others may hold a core without slowing a step, and a probe may be slow for a moment, so that the loss is

    loss = min(cores of others / cores, max(time without a core / threads, 1 - rate of the probes now / stored rate))

It is an estimate: other programs cannot be stopped to see.

With more threads the rates of products and of memory change, and both are measured. If they alone decided, a step would
change by its ideal share. It does not get that far: small operations stay on one thread, and threads wait for each
other. So a step of another model, one of those that this machine's rates come from, is timed with each number too:

    share = measured change / ideal change, of that other model
    T(n)  = T(used) * (1 - share * ideal change of the step)

Worked example: 100 ms of products, 60 of memory and 40 of calls on one thread. Two threads double products and read
memory 1.2 times as fast: ideal are 50 + 50 + 40 = 140 ms, a change of 0.3. The other model changes by 0.2 where 0.4 is
ideal: a share of a half. 200 * (1 - 0.5 * 0.3) = 170 ms.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dsmini.diagnosis.arms import Step
from dsmini.machine import DTYPES, matmul_rate
from dsmini.measure.calibration import read_bandwidth, steadiness
from dsmini.measure.cpu_time import CpuTimes
from dsmini.measure.forecast import Forecast, forecast
from dsmini.measure.rates import Roofs
from dsmini.measure.step_rates import SHAPES, Rates
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepShape

CPU = torch.device("cpu")
TURNS = 4
MOVED = ("move", "copy", "pointwise", "reduce", "gather", "scatter", "softmax", "cast", "optimizer", "cached tokens")
"""Classes of operations that memory serves."""
LEAST_CHANGE = 0.02
"""Ideal change of the other model below which its share says nothing."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Share of the machine that others took during a turn."""

    others: float
    """Cores that other programs, or other guests of the host, kept busy."""
    delayed: float = 0.0
    """Share of the time that a thread of this process was ready to run and had no core."""
    steadiness: float | None = None
    """Rate of the probes now over their stored rate; None without stored rates."""

    @property
    def loss(self) -> float:
        """Share of a step's time that others cost, estimated."""
        slower = 0.0 if self.steadiness is None else 1 - self.steadiness
        return max(0.0, min(self.others / cores(), max(self.delayed, slower)))


def watch(roofs: Roofs | None, device: torch.device) -> Callable[[], Contention]:
    """Begin to watch the machine; return what ends it, runs the probes, and tells what others took meanwhile."""
    before = CpuTimes.now()

    def end() -> Contention:
        rates = CpuTimes.now().rates_since(before)
        if device.type != "cpu":
            return Contention(others=rates.others)
        steady = None if roofs is None else min(1.0, steadiness(roofs, device))
        return Contention(others=rates.others, delayed=rates.delayed / torch.get_num_threads(), steadiness=steady)

    return end


def quiet(seen: Contention, asleep: float = 0.0) -> nullcontext[Step]:
    """Return the context of an arm without other programs, which takes no steps of its own.

    Args:
        seen: what others took in the plain steps of this turn.
        asleep: seconds of a step in which nothing of this process wants a core: others cannot make them longer.
    """
    return nullcontext(lambda base: base - max(0.0, base - asleep) * seen.loss)


@contextmanager
def threads_put_back() -> Iterator[None]:
    """Let the number of threads be afterwards what it was before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_with_threads(now: Forecast, number: int, rates: Rates) -> float:
    """Return the predicted seconds of a step on a number of threads. Takes about two seconds.

    Args:
        now: forecast with the threads that are in use.
    """
    used, (config, batch, tokens) = torch.get_num_threads(), SHAPES[now.shape.work][-1]
    if number == used:
        return now.seconds
    other = StepShape(work=now.shape.work, config=config, dtype=now.shape.dtype, batch=batch, tokens=tokens)
    step, product = other.make(CPU), DTYPES["float32" if now.shape.dtype == "float32" else "bfloat16"]

    def with_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        step()

    with threads_put_back():
        rates_of: dict[int, tuple[float, float]] = {}
        for threads in (used, number):
            torch.set_num_threads(threads)
            rates_of[threads] = matmul_rate(CPU, product, 0.3), read_bandwidth(CPU, 1 << 27, 2)
        taken = in_turns({f"{n}": lambda n=n: with_threads(n) for n in rates_of}, CPU, count=TURNS)
    products, memory = (before / then for before, then in zip(rates_of[used], rates_of[number], strict=True))

    def ideal_change(of: Forecast) -> float:
        longer = {name: memory if name in MOVED else products for name in of.by_class} | {"calls": 1.0}
        return 1 - sum(seconds * longer[name] for name, seconds in of.by_class.items()) / of.seconds

    real, ideal = 1 - taken.median(f"{number}") / taken.median(f"{used}"), ideal_change(forecast(other, rates))
    share = real / ideal if abs(ideal) > LEAST_CHANGE else 1.0
    return now.seconds * (1 - share * ideal_change(now))
