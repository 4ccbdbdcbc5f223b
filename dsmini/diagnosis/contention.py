"""The share that other programs take of this machine while steps run.

The operating system says how many cores others kept busy, and how long this process's threads were ready without a
core. Probes, a product and a read of memory, say how much slower they run now than when this machine's rates were
measured. Others may hold a core without slowing a step, and a probe may be slow for a moment, so that the loss is

    loss = min(cores of others / cores, max(time without a core / threads, 1 - rate of the probes now / stored rate))

It is an estimate: other programs cannot be stopped to see.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dsmini.diagnosis.arms import Step
from dsmini.machine import cores
from dsmini.measure.cpu_time import CpuTimes
from dsmini.measure.roofs import Roofs, steadiness


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
def on_threads(number: int) -> Iterator[None]:
    """Let products run on a number of cores, and afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
