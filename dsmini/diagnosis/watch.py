"""The watch of a running training (train.diagnose): what binds it now, from figures that its steps have anyway.

A diagnosis removes one cost and measures the gain. A watch changes nothing, and looks at windows of 20 steps:

    Data        waiting         share of a step that waits for its batch
    Machine     slower steps    1 - fastest / now, the compute of a step next to that in the run's fastest 20 steps
                                of equal work: the same number of tokens, experts equally balanced
                CPU time lost   share of the time in which a thread is ready and others have its core, their part of
                                all cores at most
    Algorithm   idle experts    share of experts with less than a tenth of the mean load

Each share has an interval, that of the sign test: for the median of 20 steps from the 6th to the 15th in order.
A share is over its limit if all of its interval is: 10 % (idle experts: 25 %, slower steps without another program in
sight: 20 %). That of the axis which binds stays over it until its median is below half the limit. Idle experts cost no
time, so that they are named only where nothing else binds.

Each window is 20 steps, and 3 seconds, of its own. A change is said once two windows in a row show it. A loader that
becomes slow at step 101 is named at step 140.

The steps are the probe of the machine: a product and a read of memory, as a diagnosis runs them, would take seconds on
a busy machine and count in the run's peak memory. A look at a window takes less than a millisecond.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dsmini.diagnosis.arms import LEAST, Axis, percent
from dsmini.diagnosis.contention import STOP_OTHERS, Contention
from dsmini.diagnosis.findings import MOST_IDLE, load
from dsmini.machine import cores
from dsmini.measure.cpu_time import CpuTimes
from dsmini.measure.turns import TAIL, Estimate, sign_interval
from dsmini.training.run import BindingChange
from dsmini.training.trainer import StepResult

WINDOW = 20
"""Least number of steps of a window."""
HOLD_SECONDS = 3.0
"""Least seconds of a window: very short steps are slowed together by what passes in a moment."""
EQUAL_VIO = 0.5
"""Difference in MaxVio within which routing is equal work. The toy's step takes a fifth longer at 0.3 than at 2.5, as
all experts have work then."""
DRIFT = 0.20
"""Limit of slower steps where no other program is seen: a shared machine drifts by up to 15 % in minutes."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One thing that may bind, as a window shows it."""

    name: str
    axis: Axis
    share: Estimate
    """Share of the time, or of the experts, with its interval."""
    words: str
    """Observation, with its figures."""
    fix: str
    """Advice in one sentence."""
    limit: float = LEAST
    takes_time: bool = True


def exactly(value: float) -> Estimate:
    """Return a share that is known for the whole window."""
    return Estimate(value=value, low=value, high=value, turns=1)


class RunWatch:
    """The watcher of a run on this machine.

    Args:
        device: where the steps run. CPU time tells nothing about another device than the CPU.
        read: reads the CPU times.
    """

    def __init__(self, device: torch.device, read: Callable[[], CpuTimes] = CpuTimes.now) -> None:
        self.is_cpu: bool = device.type == "cpu"
        self.read: Callable[[], CpuTimes] = read
        self.steps: list[StepResult] = []
        """Steps of the window until now."""
        self.before: CpuTimes | None = None
        """CPU times before the window; None where they say nothing."""
        self.fastest: dict[tuple[int, int], float] = {}
        """Seconds of compute of a step in the fastest window of equal work, the upper end of the interval, by the
        number of tokens and the balance of the experts."""
        self.binds: str | None = None
        """The axis that was said to bind, "" for nothing; None before the first was said."""
        self._last: str | None = None  # axis of the window before

    def see(self, step: StepResult) -> BindingChange | None:
        """Take a step; look at the window once it is long enough."""
        if self.steps and step.tokens != self.steps[-1].tokens:  # another size of batch is other work
            self.steps.clear()
        if self.is_cpu and self.before is None:
            self.before = self.read()
        self.steps.append(step)
        if len(self.steps) < WINDOW or sum(each.seconds for each in self.steps) < HOLD_SECONDS:
            return None
        now = self.read() if self.is_cpu else None
        signs = list(self._signs(now))
        self.before = now
        self.steps.clear()
        found = self._first(signs)
        axis = "" if found is None else found.axis
        before, self._last = self._last, axis
        if axis == self.binds or axis != before:
            return None
        self.binds = axis
        if found is None:
            figures = ", ".join(f"{sign.name} {percent(sign.share.value)}" for sign in signs)
            return BindingChange(binds="", share=None, sentence=f"step {step.step}: nothing binds ({figures})")
        said = f"step {step.step}: {axis} binds: {found.words}. {found.fix}"
        return BindingChange(binds=axis, share=found.share.value, sentence=said)

    def _first(self, signs: Sequence[Sign]) -> Sign | None:
        """Return the sign that binds: the largest, or that of the axis that binds if none is clearly larger."""
        over = [
            sign
            for sign in signs
            if sign.share.low > sign.limit or (sign.axis == self.binds and sign.share.value > sign.limit / 2)
        ]
        over = sorted([sign for sign in over if sign.takes_time] or over, key=lambda sign: -sign.share.value)
        before = next((sign for sign in over if sign.axis == self.binds), None)
        if before is None or over[0].share.low > before.share.high:
            return next(iter(over), None)
        return before

    def _signs(self, now: CpuTimes | None) -> Iterator[Sign]:
        """Yield the signs of the window: of the CPU time only where the steps run on it."""
        waiting = sign_interval([step.data_wait for step in self.steps], TAIL)
        yield Sign(
            name="waiting",
            axis="Data",
            share=waiting,
            words=f"a step waits {percent(waiting)} of its time for its batch",
            fix="Prepare batches in more threads (data.workers), or make them cheaper to read.",
        )
        seen = Contention(others=0.0)
        if self.before is not None and now is not None:
            seen = Contention.between(self.before, now)
            yield Sign(
                name="CPU time lost",
                axis="Machine",
                share=exactly(seen.loss),
                words=f"{seen.words}, and each of this run's {torch.get_num_threads()} threads waits "
                f"{percent(seen.delayed)} of the time for a core",
                fix=STOP_OTHERS,
            )
        yield self._slower(seen)
        if idle := load(self.steps):
            yield Sign(
                name="idle experts",
                axis="Algorithm",
                share=exactly(idle.value),
                words=idle.sentence.removesuffix("."),
                fix=idle.fix,
                limit=MOST_IDLE,
                takes_time=False,
            )

    def _slower(self, seen: Contention) -> Sign:
        """Return the sign of steps that take longer than those of equal work took."""
        now = sign_interval([max(1e-9, step.seconds * (1 - step.data_wait)) for step in self.steps], TAIL)
        work = self.steps[-1].tokens, round(statistics.median(step.max_vio or 0.0 for step in self.steps) / EQUAL_VIO)
        fastest = self.fastest[work] = min(self.fastest.get(work, math.inf), now.high)
        low, value, high = (max(0.0, 1 - fastest / seconds) for seconds in (now.low, now.value, now.high))
        alone = seen.others < LEAST * cores()
        return Sign(
            name="slower steps",
            axis="Machine",
            share=replace(now, low=low, value=value, high=high),
            words=f"a step computes for {now.value:.3g} s, and for {fastest:.3g} s when such steps were fastest; "
            f"{'no other program is seen' if alone else seen.words}",
            fix="Look at clock speed, memory, and other guests of the host." if alone else STOP_OTHERS,
            limit=DRIFT if alone else LEAST,
        )
