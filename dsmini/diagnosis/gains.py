"""Gains: the share of a step's time that would go if something were free, with an interval.

    g = (T - T_X) / T

T is the time of a step, T_X that of a step with X made free and everything else unchanged. Both are taken in turns, so
that a slow minute slows both. The gain is the median over rounds of 1 - T_X / T, each round with its own T. Its
interval is a bootstrap: the rounds are drawn again with replacement, many times, and the middle 95 % of the medians are
kept. A busy machine gives wide intervals, not wrong ones.

With few rounds the bootstrap is too narrow: of 7 rounds it leaves the truth out 12 times in 100, on both sides alike.
So the interval is at least that of the sign test, which needs nothing of the noise: each round is below the true median
by chance 1/2, so the k-th smallest round is above it only if fewer than k of them are below,

    P(k-th smallest > median) = sum over i < k of C(n, i) / 2^n

and the largest k is taken for which this is at most 2.5 %; the upper end is the k-th largest. 7 rounds have k = 1, 20
have k = 6. 5 rounds have only their smallest and largest, which hold the truth in 94 of 100 times.

Worked example: steps of 200, 210 and 400 ms, with the batch at hand 100, 104 and 205 ms. The rounds gain 0.5, 0.505 and
0.488. The median is 0.5, although the third round was twice as slow.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval); Hettmansperger and
McKean, Robust Nonparametric Statistical Methods, section 1.3 (sign test).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
COVERAGE = 0.95
LEAST_ROUNDS = 5
"""Number of rounds below which no interval of rounds holds the truth in about 95 of 100 times."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Share of a step's time, with its interval."""

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return percent(self.value, self.low, self.high)


def percent(value: float, low: float, high: float) -> str:
    """Write a share and its interval in percent."""
    return f"{100 * value:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def gain(base: Sequence[float], free: Sequence[float], seed: int = 0) -> Gain:
    """Return the gain of the seconds `free` over the seconds `base`, round by round.

    Raises: ValueError for rounds that do not pair, or too few of them.
    """
    if len(base) != len(free) or len(base) < LEAST_ROUNDS:
        raise ValueError(f"{len(base)} and {len(free)} rounds; want equally many, and at least {LEAST_ROUNDS}")
    return gain_of_rounds(1 - np.asarray(free) / np.asarray(base), seed)


def gain_of_rounds(gains: Sequence[float] | np.ndarray, seed: int = 0) -> Gain:
    """Return the median of the gains of rounds, with its interval."""
    values = np.asarray(gains, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    medians = np.median(values[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    k, ordered = sign_test_rank(len(values)), np.sort(values)
    low, high = min(low, ordered[k - 1]), max(high, ordered[-k])
    return Gain(value=float(np.median(values)), low=float(low), high=float(high), rounds=len(values))


def sign_test_rank(n: int) -> int:
    """Return the largest k for which the k-th smallest of n draws is above their median by chance 2.5 % at most.

    At least 1, whose chance is 2^-n.
    """
    k, below = 1, 1
    while k < n and (below + math.comb(n, k)) / 2**n <= (1 - COVERAGE) / 2:
        below += math.comb(n, k)
        k += 1
    return k
