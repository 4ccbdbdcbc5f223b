"""The share that other programs take of this machine while steps run.

The operating system says how many cores others kept busy, and how long this process's threads were ready without a
core. Probes, a product and a read of memory, say how much slower they run now than when this machine's rates were
measured. Others may hold a core without slowing a step, and a probe may be slow for a moment, so that the loss is

    loss = min(cores of others / cores, max(time without a core / threads, 1 - rate of the probes now / stored rate))

It is an estimate: other programs cannot be stopped to see.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsmini.machine import cores
from dsmini.measure.cpu_time import CpuTimes
from dsmini.measure.roofs import Roofs, steadiness

STOP_OTHERS = "Stop other programs, or leave them a core and set train.threads to the rest."


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Share of the machine that others took for a time."""

    others: float
    """Cores that other programs, or other guests of the host, kept busy."""
    delayed: float = 0.0
    """Share of the time that a thread of this process was ready to run and had no core."""
    steadiness: float | None = None
    """Rate of the probes now over their stored rate; None without stored rates."""

    @classmethod
    def between(cls, before: CpuTimes, now: CpuTimes, steadiness: float | None = None) -> "Contention":
        """Return what others took between two moments."""
        passed = max(1e-3, now.at - before.at)
        others = now.busy - before.busy - (now.own - before.own)
        delayed = (now.delayed - before.delayed) / torch.get_num_threads()
        return cls(others=max(0.0, others / passed), delayed=max(0.0, delayed / passed), steadiness=steadiness)

    @property
    def loss(self) -> float:
        """Share of a step's time that others cost, estimated."""
        slower = 0.0 if self.steadiness is None else 1 - self.steadiness
        return max(0.0, min(self.others / cores(), max(self.delayed, slower)))

    @property
    def words(self) -> str:
        return f"other programs keep {self.others:.1f} of {cores()} cores busy"


def watch(roofs: Roofs | None, device: torch.device) -> Callable[[], Contention]:
    """Begin to watch the machine; return what ends it, runs the probes, and tells what others took meanwhile."""
    before = CpuTimes.now()

    def end() -> Contention:
        now = CpuTimes.now()
        if device.type != "cpu":
            return Contention(others=Contention.between(before, now).others)
        return Contention.between(before, now, None if roofs is None else min(1.0, steadiness(roofs, device)))

    return end


class OtherPrograms:
    """A look at the first steps of a run on the CPU: do other programs slow them?

    Args:
        read: reads the CPU times.
    """

    SECONDS = 10.0
    """Seconds of steps that it looks at, after the first one, which also prepares."""
    SHARE = 0.15
    """Share of the time without a core from which on it speaks."""

    def __init__(self, read: Callable[[], CpuTimes] = CpuTimes.now) -> None:
        self.read: Callable[[], CpuTimes] = read
        self.left: float = self.SECONDS
        self.before: CpuTimes | None = None

    def see(self, seconds: float) -> str:
        """Take a step of this many seconds; return a sentence about other programs, "" for nothing to say."""
        if self.before is None:
            self.before = self.read()
            return ""
        looking = self.left > 0
        self.left = self.left - seconds
        if not looking or self.left > 0:
            return ""
        seen, threads = Contention.between(self.before, self.read()), torch.get_num_threads()
        if seen.loss < self.SHARE:
            return ""
        fix = "stop those programs"
        if threads > 1:  # those that spin while one of them has no core cost more than that core
            fix += f", leave them a core with --train.threads {threads - 1}, or begin with OMP_WAIT_POLICY=passive"
        return f"{seen.words}: the steps wait for a core {seen.loss:.0%} of their time; {fix}"
