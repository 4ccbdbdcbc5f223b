"""Time what is compared in turns, and say how sure a difference is: the one stopwatch, the one statistic.

    turns = in_turns({"ours": ours, "theirs": theirs}, count=15, seconds=20.0)
    turns.estimate("ours")                 # Estimate: median seconds of a run, and its 95 % interval
    turns.ratio("theirs", "ours")          # how many times as fast ours is

A single time says little: caches are cold, a GPU returns before it is done, another process takes a core for a second.
So measurements follow six rules:

1. Warm up. The first turn pays for memory, compiled kernels and cold caches, and does not count.
2. Synchronize. The clock stops when the device is done, not when it has accepted the work.
3. Take turns, in changing orders: A B, B A. Whatever slows the machine for a second slows all sides, and what a run
   leaves in the caches meets all others equally often.
4. Compare turn by turn first, then take the median of the turns, so that a slow turn cancels.
5. Stop in time. No turn begins that would probably end after the time allowed.
6. Predict what is measured: prices of operations are medians of turns too.

A turn gives each run one number: the mean of its repeats, so that a rare stall counts. Turns are independent, the
repeats within one are not. So the interval is of turns: they are drawn again with replacement, many times, and the
middle 95 % of the medians are taken (bootstrap). With few turns that is too narrow: of 7 turns it leaves the truth out
12 times in 100. So the interval is at least that of the sign test, which needs nothing of the noise: each turn is below
the true median by chance 1/2, so the k-th smallest of n is above it only if fewer than k of them are below,

    P(k-th smallest > median) = sum over i < k of C(n, i) / 2^n

and the largest k is taken for which this is at most the tail, 2.5 % for a 95 % interval; the upper end is the k-th
largest. 7 turns have k = 1, 20 have k = 6. n turns reach no tail below 2^-n: 5 turns reach 93.75 %, so that a 95 %
interval needs 6. With fewer both ends are infinite: nothing is claimed.

Where the best of m is chosen, each of the m intervals gets the m-th part of the tail (Bonferroni).

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval); Hettmansperger and
McKean, Robust Nonparametric Statistical Methods, section 1.3 (sign test).
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from dsmini.machine import once

CPU = torch.device("cpu")
TAIL = 0.025
"""Chance that the truth is beyond one end of a 95 % interval."""
RESAMPLES = 4000
MOST_TURNS, MOST_REPEATS = 1000, 1 << 14
Run = Callable[[], object]


class TimeOverError(Exception):
    """Nothing more may be measured."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float
    """Ends of the interval; infinite if there are too few turns for its level."""
    turns: int
    """Number of independent values that it rests on."""
    tail: float = TAIL
    """Largest chance that the truth is beyond one end."""

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
    """Return the seconds that the runs themselves return: those by another process's clock, or of a part of a run."""
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
    first: str | None = None,
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
        first: the run that begins every turn, since others depend on it; all others change places.
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
    fixed = [name for name in runs if name == first]
    moving = [name for name in runs if name != first]
    before, now = start, time.perf_counter()
    while taken.count < count and (taken.count < least or now + (now - before) - start <= seconds):
        on_turn(max(taken.count / count, min(0.99, (now - start) / max(seconds, 1e-9))), taken)
        turn = dict[str, float]()
        for name in (*fixed, *(moving[i] for i in order_of(len(moving), taken.count))):
            for _ in range(uncounted):
                runs[name]()
            turn[name] = clock(runs[name], number[name]) / number[name]
        for name, each in turn.items():
            taken.seconds[name].append(each)
        before, now = now, time.perf_counter()
    on_turn(1.0, taken)
    return taken


def order_of(n: int, turn: int) -> list[int]:
    """Return the places of n runs in a turn: in n turns, 2 n of an odd n, each follows each other one equally often.

    Source: Williams, Experimental designs balanced for the estimation of residual effects of treatments, 1949.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]
    order = [(at + turn) % n for at in zigzag]
    return order[::-1] if n % 2 and turn // n % 2 else order


def least_turns(tail: float = TAIL) -> int:
    """Return the number of turns with which an interval can have this tail: 6 for 95 %."""
    return math.ceil(math.log2(1 / tail))


def median_of(values: Sequence[float] | np.ndarray, seed: int = 0, tail: float = TAIL) -> Estimate:
    """Return the median of independent values, with its interval: bootstrap, at least that of the sign test.

    Args:
        tail: largest chance that the truth is beyond one end.

    Raises: ValueError without values.
    """
    found = sign_interval(values, tail)
    if not found.is_clear:
        return found
    drawn = np.random.default_rng(seed).integers(0, found.turns, (RESAMPLES, found.turns))
    low, high = np.quantile(np.median(np.asarray(values, dtype=np.float64)[drawn], axis=1), [tail, 1 - tail])
    return replace(found, low=min(float(low), found.low), high=max(float(high), found.high))


def sign_interval(values: Sequence[float] | np.ndarray, tail: float = TAIL) -> Estimate:
    """Return the median with the interval of the sign test alone, which takes no time. Args: as of median_of."""
    if not len(values):
        raise ValueError("a median needs at least one value, got none")
    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    low, high = -math.inf, math.inf
    if n >= least_turns(tail):
        k = sign_test_rank(n, tail)
        low, high = float(ordered[k - 1]), float(ordered[-k])
    return Estimate(value=float(np.median(ordered)), low=low, high=high, turns=n, tail=tail)


def sign_test_rank(n: int, tail: float = TAIL) -> int:
    """Return the largest k for which the k-th smallest of n draws is above their median by chance `tail` at most.

    At least 1, whose chance is 2^-n.
    """
    k, below = 1, 1
    while k < n and (below + math.comb(n, k)) / 2**n <= tail:
        below += math.comb(n, k)
        k += 1
    return k


def mean_of(values: Sequence[float], tail: float = TAIL) -> Estimate:
    """Return the mean of a few independent values, such as the differences of seeds, with Student's interval.

    It takes the values as normal, which medians need not; in exchange two values have an interval.
    """
    n, mean = len(values), statistics.fmean(values)
    half = students_t(n - 1, tail) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(value=mean, low=mean - half, high=mean + half, turns=n, tail=tail)


def students_t(freedom: int, tail: float = TAIL) -> float:
    """Return the number that Student's t exceeds by chance `tail`: 12.7, 4.30, 3.18 for 1, 2, 3 degrees of freedom."""
    low, high = 0.0, 1 / tail**2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if chance_within(middle, freedom) < 1 - 2 * tail else (low, middle)
    return high


def chance_within(x: float, freedom: int) -> float:
    """Return the chance that Student's t is between -x and x.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(x / math.sqrt(freedom))
    odd, term = freedom % 2, math.cos(angle) if freedom % 2 else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= (i - 1) / i * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
