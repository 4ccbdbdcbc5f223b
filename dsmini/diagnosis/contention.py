"""Contention: what other programs take of this machine while the steps run.

Two things are watched. The operating system says how much CPU time others got. Probes, a product and a read of memory,
say how much slower they run now than when this machine's rates were measured. A program may hold a core without slowing
the step, and a probe may be slow for a moment, so that the step's loss is taken as the smaller of both:

    loss = min(CPU time of others / (seconds * cores), 1 - rate of the probes now / their stored rate)

It is an estimate: other programs cannot be stopped to see.
"""

from dataclasses import dataclass

import torch

from dsmini.diagnosis.interventions.machine import cores
from dsmini.measure.calibration import steadiness
from dsmini.measure.cpu_time import CpuTimes
from dsmini.measure.rates import Roofs


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
