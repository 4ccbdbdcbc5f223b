"""CPU time of this process and of all others, as the operating system tells it: who had the cores?"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

STAT = Path("/proc/stat")
TASKS = Path("/proc/self/task")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """CPU seconds up to a moment."""

    at: float
    """The moment, in seconds of a clock that only runs forward."""
    busy: float
    """Used by all programs, and stolen by other guests, since the machine's start."""
    own: float
    """Used by this process, since its start."""
    delayed: float
    """Missed by the threads that this process has now, since their start: they were ready to run, and no core was free.
    0 where the system does not say."""

    @classmethod
    def now(cls) -> "CpuTimes":
        return cls(at=time.perf_counter(), busy=_busy_seconds(), own=sum(os.times()[:2]), delayed=_delayed_seconds())


def watched(run: Callable[[], T]) -> tuple[T, float]:
    """Return what a function returns, and the number of cores that threads waited for meanwhile, its mean."""
    before = CpuTimes.now()
    result = run()
    now = CpuTimes.now()
    return result, max(0.0, now.delayed - before.delayed) / max(1e-3, now.at - before.at)


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
