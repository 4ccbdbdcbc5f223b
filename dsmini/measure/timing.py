"""Times that a busy machine does not tilt.

A single time says little: caches are cold, a GPU answers before it is done, a neighbour takes a core for a second.
So a comparison here goes like this:

1. Warm up. The first run pays for memory, compiled kernels and cold caches, and does not count.
2. Synchronize. The clock stops when the device is done, not when it has accepted the work.
3. Take turns. A B A B, not A A B B: whatever slows the machine for a second slows both sides.
4. Report the median and the quartiles. For a ratio, divide round by round first: what slowed a round cancels.
5. Stop in time. No round begins after the time allowed.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from dsmini.machine import once


def times(run: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> list[float]:
    """Return the seconds of runs in a row, after one that warms up.

    Args:
        seconds: time to fill with runs.
        least: number of runs to do even if they take longer.
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
    """Return the seconds of each run over some rounds in which all take turns, after a round that warms up.

    Args:
        seconds: time after which no round begins. One round counts however long it takes.
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
    """Return one side's seconds over another's, round by round."""
    return [a / b for a, b in zip(taken[over], taken[under], strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Compute the median and the quartiles, named as a figure names them."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {"measured": middle, "low": low, "high": high}
