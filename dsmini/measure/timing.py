"""Measure times so that a busy machine does not favour one side.

A single time says little: caches are cold, a GPU returns before it is done, another process takes a core for a second.
A comparison therefore follows five rules:

1. Warm up. The first run pays for memory, compiled kernels and cold caches, and does not count.
2. Synchronize. The clock stops when the device is done, not when it has accepted the work.
3. Take turns. A B A B, not A A B B: whatever slows the machine for a second slows both sides.
4. Report the median and the quartiles. For a ratio, divide round by round first, so that a slow round cancels.
5. Stop in time. No round begins after the time allowed.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from dsmini.machine import once


def times(run: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> list[float]:
    """Return the seconds of consecutive runs, after one to warm up.

    Args:
        seconds: time to fill with runs.
        least: number of runs, even if they take longer.
    """
    run()
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < least or time.perf_counter() - start < seconds:
        taken.append(once(run, device))
    return taken


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Return the seconds of each run over some rounds in which all take turns, after a round to warm up.

    Args:
        seconds: time after which no round begins; the first always counts.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for i in range(rounds + 1):
        if i > 1 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            elapsed = once(run, device)
            if i:
                taken[name].append(elapsed)
    return taken


def ratios(taken: Mapping[str, Sequence[float]], over: str, under: str) -> list[float]:
    """Return the seconds of one side over those of another, round by round."""
    return [a / b for a, b in zip(taken[over], taken[under], strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Compute the median and the quartiles under the names of a figure's fields."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"measured": middle, "low": low, "high": high}
