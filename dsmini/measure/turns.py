"""Time what is compared in turns, and say how sure a difference is: the one stopwatch, the one statistic.

    turns = in_turns({"ours": ours, "theirs": theirs}, count=15, seconds=20.0)
    turns.estimate("ours")                 # Estimate: median seconds of a run, and its 95 % interval
    turns.ratio("theirs", "ours")          # how many times as fast ours is

A single time says little: caches are cold, a GPU returns before it is done, another process takes a core for a second.
So measurements follow five rules:

1. Warm up. The first turn pays for memory, compiled kernels and cold caches, and does not count.
2. Synchronize. The clock stops when the device is done, not when it has accepted the work.
3. Take turns. A B A B, not A A B B: whatever slows the machine for a second slows both sides.
4. Compare turn by turn first, then take the median of the turns, so that a slow turn cancels.
5. Stop in time. No turn begins that would probably end after the time allowed.

A turn gives each run one number: the mean of its repeats, so that a rare stall counts. Turns are independent, the
repeats within one are not. So the interval is of turns: they are drawn again with replacement, many times, and the
middle 95 % of the medians are kept (bootstrap). With few turns that is too narrow: of 7 turns it leaves the truth out
12 times in 100. So the interval is at least that of the sign test, which needs nothing of the noise: each turn is below
the true median by chance 1/2, so the k-th smallest of n is above it only if fewer than k of them are below,

    P(k-th smallest > median) = sum over i < k of C(n, i) / 2^n

and the largest k is taken for which this is at most 2.5 %; the upper end is the k-th largest. 7 turns have k = 1, 20
have k = 6. Fewer than 5 turns have no such interval, and their ends are infinite.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval); Hettmansperger and
McKean, Robust Nonparametric Statistical Methods, section 1.3 (sign test).
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dsmini.machine import once

CPU = torch.device("cpu")
COVERAGE = 0.95
RESAMPLES = 4000
LEAST_TURNS = 5
"""Number of turns below which no interval of turns holds the truth in about 95 of 100 times."""
MOST_TURNS, MOST_REPEATS = 1000, 1 << 14
Run = Callable[[], object]


class TimeOverError(Exception):
    """Nothing more may be measured."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float
    """Ends of the interval; infinite if there are too few turns for one."""
    turns: int
    """Number of independent values that it rests on."""

    @property
    def is_clear(self) -> bool:
        """True if the interval has an end on each side: there were enough turns."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Turns:
    """Seconds of a run by name and turn; all names have equally many turns."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of whole turns."""
        return min(map(len, self.seconds.values()), default=0)

    def median(self, name: str) -> float:
        """Return the median seconds of a run over the turns."""
        return statistics.median(self.seconds[name])

    def estimate(self, name: str) -> Estimate:
        """Return the median seconds of a run, with its interval."""
        return median_of(self.seconds[name])

    def ratio(self, over: str, under: str) -> Estimate:
        """Return the median over turns of the seconds of one run over those of another, with its interval."""
        return median_of([a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)])


Clock = Callable[[Run, int], float]
"""Function that repeats a run and returns the seconds of all repeats together."""


def stopwatch(device: torch.device) -> Clock:
    """Return a clock that times a run until the device is done."""

    def clock(run: Run, repeats: int) -> float:
        def all_of_them() -> None:
            for _ in range(repeats):
                run()

        return once(all_of_them, device)

    return clock


def reported(run: Callable[[], float], repeats: int) -> float:
    """Return the seconds that the runs themselves return; a clock for runs that know which part counts."""
    return sum(run() for _ in range(repeats))


def in_turns(
    runs: Mapping[str, Run],
    device: torch.device = CPU,
    *,
    count: int = MOST_TURNS,
    seconds: float = math.inf,
    least: int = 1,
    repeats: int = 1,
    uncounted: int = 0,
    least_seconds: float = 0.0,
    clock: Callable[..., float] | None = None,
    on_turn: Callable[[float, Turns], None] = lambda share, turns: None,
) -> Turns:
    """Let runs take turns after a turn to warm up, and return the seconds of one run by name and turn.

    Args:
        count: number of turns at most.
        seconds: time of all turns, the one to warm up included. No turn begins that would end after it, if it takes as
            long as the one before.
        least: number of turns in any case, even if they take longer.
        repeats: times that each run is repeated in its turn; the mean counts.
        uncounted: runs at the start of each turn that do not count, such as the first on a cold cache.
        least_seconds: a shorter run is repeated until it takes so long, by its time in the turn to warm up.
        clock: `reported` for runs that return their own seconds; None: the stopwatch of the device.
        on_turn: told the share that is done and the whole turns so far, before each turn and at the end. It may raise
            to end the measurement: the Turns that it was given have whole turns alone.
    """
    clock = clock or stopwatch(device)
    start = time.perf_counter()
    number, taken = dict.fromkeys(runs, repeats), Turns({name: [] for name in runs})
    for name, run in runs.items():
        warm = clock(run, 1)
        if least_seconds:
            warm = clock(run, 1)  # the first may have paid for compilation
            number[name] = max(repeats, min(MOST_REPEATS, math.ceil(least_seconds / max(warm, 1e-7))))
    before, now = start, time.perf_counter()
    while taken.count < count and (taken.count < least or now + (now - before) - start <= seconds):
        on_turn(max(taken.count / count, min(0.99, (now - start) / max(seconds, 1e-9))), taken)
        turn: dict[str, float] = {}
        for name, run in runs.items():
            for _ in range(uncounted):
                run()
            turn[name] = clock(run, number[name]) / number[name]
        for name, each in turn.items():
            taken.seconds[name].append(each)
        before, now = now, time.perf_counter()
    on_turn(1.0, taken)
    return taken


def median_of(values: Sequence[float] | np.ndarray, seed: int = 0, together: int = 1) -> Estimate:
    """Return the median of independent values, with its 95 % interval: bootstrap, at least that of the sign test.

    Args:
        together: number of intervals that shall all hold at once in 95 % of the cases, as where the best of several is
            taken. Each then holds in 1 - 5 % / together (Bonferroni), as far as the turns allow.

    Raises: ValueError without values.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("a median needs at least one value, got none")
    middle, n = float(np.median(found)), len(found)
    if n < LEAST_TURNS:
        return Estimate(value=middle, low=-math.inf, high=math.inf, turns=n)
    drawn, tail = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n)), (1 - COVERAGE) / 2 / together
    low, high = np.quantile(np.median(found[drawn], axis=1), [tail, 1 - tail])
    k, ordered = sign_test_rank(n, tail), np.sort(found)
    return Estimate(value=middle, low=float(min(low, ordered[k - 1])), high=float(max(high, ordered[-k])), turns=n)


def sign_test_rank(n: int, tail: float = (1 - COVERAGE) / 2) -> int:
    """Return the largest k for which the k-th smallest of n draws is above their median by chance `tail` at most.

    At least 1, whose chance is 2^-n.
    """
    k, below = 1, 1
    while k < n and (below + math.comb(n, k)) / 2**n <= tail:
        below += math.comb(n, k)
        k += 1
    return k


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of a few independent values, such as the differences of seeds, with Student's 95 % interval.

    It takes the values as normal, which medians need not; in exchange two values have an interval.
    """
    n, mean = len(values), statistics.fmean(values)
    half = students_t(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(value=mean, low=mean - half, high=mean + half, turns=n)


STUDENTS_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t, for 1, 2, 3, ... degrees of freedom."""


def students_t(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t for these degrees of freedom, right in three digits.

    Source: Abramowitz and Stegun, 26.7.5, from ten on.
    """
    if freedom <= len(STUDENTS_T):
        return STUDENTS_T[freedom - 1]
    x = 1.959964
    return x + (x**3 + x) / (4 * freedom) + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * freedom**2)
