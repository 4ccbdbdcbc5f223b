"""The watch of a running training (train.diagnose): what binds it now, from figures that its steps have anyway.

A diagnosis makes one thing free and measures the gain. A watch changes nothing, and looks at the last 20 steps:

    Data        waiting         share of a step that waits for its batch
    Machine     slower steps    1 - fastest / now, the compute of a step next to that in the run's fastest 20 steps
                                of equal work: as many tokens, experts as balanced
                CPU time lost   share of the time in which a thread is ready and others have its core, their part of
                                all cores at most
    Algorithm   idle experts    share of experts with less than a tenth of the mean load

Each share has an interval, that of the sign test: of a median of 20 steps it reaches from the 6th to the 15th in order.
A share binds if all of its interval is above 10 % (idle experts: 25 %, slower steps without another program in sight:
20 %). It no longer binds if all of it is below, or its median below half the limit. In between nothing changes. Idle
experts cost no time, so that they are named only where nothing else binds.

A change is said after every look at 20 more steps, and at 3 seconds of them, showed it. A loader that becomes slow at
step 100 has 15 slow steps of 20 at step 114, and is named at step 134.

The steps are the probe of the machine: a product and a read of memory, as a diagnosis runs them, would take seconds on
a busy machine and count in the run's peak memory. The cost of a look is measured, and the next waits until the steps
took a hundred times as long: the overhead is at most 1 %.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dsmini.diagnosis.arms import Axis, percent
from dsmini.diagnosis.findings import MOST_IDLE, load
from dsmini.diagnosis.verdict import LEAST
from dsmini.machine import cores
from dsmini.measure.cpu_time import CpuTimes
from dsmini.measure.turns import TAIL, Estimate, sign_interval
from dsmini.training.run import BindingChange
from dsmini.training.trainer import StepResult

WINDOW = 20
"""Number of steps that a look rests on, and that a change must hold."""
STOP_OTHERS = "Stop other programs, or leave them a core and set train.threads to the rest."
HOLD_SECONDS = 3.0
"""Seconds of steps that a change must hold: very short steps are slowed together by what passes in a moment."""
COST_SHARE = 0.01
"""Largest share of the time that looking may take."""
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

    @property
    def is_over(self) -> bool:
        return self.share.low > self.limit

    @property
    def is_below(self) -> bool:
        return self.share.high <= self.limit or self.share.value <= self.limit / 2


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
        self.is_cpu, self.read = device.type == "cpu", read
        self.steps: deque[StepResult] = deque(maxlen=WINDOW)
        self.times: deque[tuple[int, CpuTimes]] = deque()
        """CPU times after steps of the window."""
        self.vios: deque[float] = deque(maxlen=WINDOW)
        self.fastest: dict[tuple[int, int], float] = {}
        """Seconds of compute of a step in the fastest window of equal work, the upper end of the interval, by the
        number of tokens and the balance of the experts."""
        self.binds: str | None = None
        """The axis that was said to bind, "" for nothing; None before the first was said."""
        self._next = ""
        self._held_steps, self._held_seconds = 0, 0.0
        self._unseen, self._cost = 0.0, 0.0

    def see(self, step: StepResult) -> BindingChange | None:
        """Look at a step, unless the last look was too long a part of the time since."""
        if self.steps and step.tokens != self.steps[-1].tokens:  # another size of batch is other work
            self.steps.clear()
            self.vios.clear()
        self.steps.append(step)
        self.vios.append(step.max_vio or 0.0)
        self._held_steps += 1
        self._held_seconds += step.seconds
        self._unseen += step.seconds
        if self._unseen * COST_SHARE < self._cost:
            return None
        start = time.perf_counter()
        change = self._look(step)
        self._unseen, self._cost = 0.0, time.perf_counter() - start
        return change

    def _look(self, step: StepResult) -> BindingChange | None:
        if self.is_cpu:
            self.times.append((step.step, self.read()))
            while len(self.times) > 2 and self.times[0][0] < self.steps[0].step:
                self.times.popleft()
        if len(self.steps) < WINDOW:
            return None
        signs = list(self._signs())
        found = self._first([sign for sign in signs if sign.is_over])
        axis = "" if found is None else found.axis
        if found is None and any(sign.axis == self.binds and not sign.is_below for sign in signs):
            axis = self.binds or ""  # it may still bind
        if axis != self._next:
            self._next, self._held_steps, self._held_seconds = axis, 0, 0.0
        if axis == self.binds or self._held_steps < WINDOW or self._held_seconds < HOLD_SECONDS:
            return None
        self.binds = axis
        if found is None:
            figures = ", ".join(f"{sign.name} {percent(sign.share.value)}" for sign in signs)
            return BindingChange(binds="", share=None, sentence=f"step {step.step}: nothing binds ({figures})")
        said = f"step {step.step}: {axis} binds: {found.words}. {found.fix}"
        return BindingChange(binds=axis, share=found.share.value, sentence=said)

    def _first(self, over: Sequence[Sign]) -> Sign | None:
        """Return the sign that binds: the largest, or that of the axis of the last look if none is clearly larger."""
        over = [sign for sign in over if sign.takes_time] or list(over)
        over.sort(key=lambda sign: -sign.share.value)
        before = next((sign for sign in over if sign.axis == self._next), None)
        if before is None or over[0].share.low > before.share.high:
            return next(iter(over), None)
        return before

    def _signs(self) -> Iterator[Sign]:
        """Yield the signs of the window: of the CPU time only where the steps run on it."""
        waiting = sign_interval([step.data_wait for step in self.steps], TAIL)
        yield Sign(
            name="waiting",
            axis="Data",
            share=waiting,
            words=f"a step waits {percent(waiting)} of its time for its batch",
            fix="Prepare batches in more threads (data.workers), or make them cheaper to read.",
        )
        others = 0.0
        if len(self.times) > 1:
            rates, threads = self.times[-1][1].rates_since(self.times[0][1]), torch.get_num_threads()
            others, delayed = rates.others, rates.delayed / threads
            yield Sign(
                name="CPU time lost",
                axis="Machine",
                share=exactly(min(others / cores(), delayed)),
                words=f"{_of_others(others)}, and each of this run's {threads} threads waits {percent(delayed)} of the "
                "time for a core",
                fix=STOP_OTHERS,
            )
        yield self._slower(others)
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

    def _slower(self, others: float) -> Sign:
        """Return the sign of steps that take longer than those of equal work took."""
        now = sign_interval([max(1e-9, step.seconds * (1 - step.data_wait)) for step in self.steps], TAIL)
        work = self.steps[-1].tokens, round(statistics.median(self.vios) / EQUAL_VIO)
        fastest = self.fastest[work] = min(self.fastest.get(work, math.inf), now.high)
        low, value, high = (max(0.0, 1 - fastest / seconds) for seconds in (now.low, now.value, now.high))
        alone = others < LEAST * cores()
        return Sign(
            name="slower steps",
            axis="Machine",
            share=replace(now, low=low, value=value, high=high),
            words=f"a step computes for {now.value:.3g} s, and for {fastest:.3g} s when such steps were fastest; "
            f"{'no other program is seen' if alone else _of_others(others)}",
            fix="Look at clock speed, memory, and other guests of the host." if alone else STOP_OTHERS,
            limit=DRIFT if alone else LEAST,
        )


def _of_others(others: float) -> str:
    return f"other programs keep {others:.1f} of {cores()} cores busy"
