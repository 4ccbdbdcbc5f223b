"""Contention: what other programs take of this machine while the steps run.

Two things are watched. The operating system says how much CPU time others got. Probes, a product and a read of memory,
say how much slower they run now than when this machine's rates were measured. A program may hold a core without slowing
the step, and a probe may be slow for a moment, so that the step's loss is taken as the smaller of both:

    loss = min(CPU time of others / (seconds * cores), 1 - rate of the probes now / their stored rate)

It is an estimate: other programs cannot be stopped to see.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmini.diagnosis.interventions.machine import cores
from dsmini.measure.calibration import steadiness
from dsmini.measure.rates import Roofs

STAT = Path("/proc/stat")
TASKS = Path("/proc/self/task")


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Share of the machine that others took during a turn."""

    others: float
    """Cores that other programs, or other guests of the host, kept busy."""
    steadiness: float
    """Rate of the probes now over their stored rate; 1 without stored rates."""

    @property
    def loss(self) -> float:
        """Share of a step's time that others cost, estimated."""
        return max(0.0, min(self.others / cores(), 1 - self.steadiness))


@dataclass(frozen=True, kw_only=True)
class CpuRates:
    """CPU seconds in a second: numbers of cores."""

    own: float
    """Used by this process."""
    others: float
    """Used by all other programs, and stolen by other guests."""
    delayed: float
    """Missed by this process: its threads were ready to run, and no core was free. 0 where the system does not say."""


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """CPU seconds up to a moment."""

    at: float
    """The moment, in seconds of a clock that only runs forward."""
    busy: float
    """Used by all programs, since the machine's start."""
    own: float
    """Used by this process, since its start."""
    delayed: float
    """Missed by the threads that this process has now, since their start."""

    @classmethod
    def now(cls) -> "CpuTimes":
        return cls(at=time.perf_counter(), busy=_busy_seconds(), own=sum(os.times()[:2]), delayed=_delayed_seconds())

    def rates_since(self, before: "CpuTimes") -> CpuRates:
        """Return the rates since a moment before."""
        passed = max(1e-3, self.at - before.at)
        own = self.own - before.own
        return CpuRates(
            own=own / passed,
            others=max(0.0, (self.busy - before.busy - own) / passed),
            delayed=max(0.0, (self.delayed - before.delayed) / passed),
        )


class Watch:
    """Watches the machine during turns. Without stored rates, only the CPU time of others."""

    def __init__(self, roofs: Roofs | None, device: torch.device) -> None:
        self.roofs, self.device = roofs, device
        self._before: CpuTimes | None = None

    def begin(self) -> None:
        """Begin a turn."""
        self._before = CpuTimes.now()

    def end(self) -> Contention:
        """End it, and run the probes."""
        assert self._before is not None, "a turn ends that did not begin"
        others = CpuTimes.now().rates_since(self._before).others
        steady = 1.0 if self.roofs is None or self.device.type != "cpu" else steadiness(self.roofs, self.device)
        return Contention(others=others, steadiness=min(1.0, steady))


def _busy_seconds() -> float:
    """Return the CPU seconds of all programs since the machine's start, stolen ones too; 0 where nobody tells."""
    try:
        fields = [float(f) for f in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _delayed_seconds() -> float:
    """Return the seconds that threads of this process were ready to run and did not; 0 where nobody tells."""
    total = 0
    for thread in TASKS.glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # the thread has ended
            total += int(thread.read_text().split()[1])
    return total / 1e9
