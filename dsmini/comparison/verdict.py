"""The verdict on an arm: better, worse, equal within the margin, or undecided, and how many seeds would decide.

Differences are of runs with the same seed, in nats a byte; below 0 the arm is better. Student's interval of their mean:

    equal      the mean is known to lie within the margin, which was stated before the runs
    better     the interval lies below 0 (worse: above 0)
    undecided  neither, or fewer than LEAST_PAIRS pairs, but for an arm that gives the same losses to the bit

With several arms one would be named by chance. So arms are taken in the order of their p values, and the i-th of m is
named only if its interval at the level 1 - 5 % / (m - i + 1) leaves 0 out, and all before it were named (Holm). For
equality two one-sided tests at 5 % / m must hold: the interval at the level 1 - 10 % / m lies within the margin.

The levels hold for a number of seeds that was chosen before, and for differences that are as often far above their mean
as far below it. Skewed ones are named wrongly more often, which `skewness` tells. Who looks after each seed and stops
at the first verdict is wrong more often.

Source: Holm 1979, A simple sequentially rejective multiple test procedure; Schuirmann 1987 for equality.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsmini.measure.turns import TAIL, Estimate, chance_within, mean_of, students_t

Word = Literal["better", "worse", "equal", "undecided", "diverged"]
MOST_SEEDS = 100_000
LEAST_PAIRS = 5
"""Number of pairs from which an arm is decided: an interval of fewer rests on the shape of the distribution alone."""
MANY = 300
"""Degrees of freedom beyond which Student's t changes by less than half a percent."""
POWER = 0.8
"""Share of new comparisons that are to decide."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Answer for an arm."""

    word: Word
    difference: Estimate
    """Mean paired difference in nats a byte, and its 95 % interval."""


def verdicts(
    differences: Mapping[str, Sequence[float]], margin: float, diverged: Mapping[str, int]
) -> dict[str, Verdict]:
    """Return the verdict on each arm.

    Args:
        differences: of each arm to the base, for each seed.
        margin: largest difference of equal arms, in nats a byte.
        diverged: number of each arm's runs without a loss; such an arm is neither better nor equal.
    """
    m = len(differences)
    found: dict[str, Verdict] = {}
    named = True  # all arms with smaller p values were
    for rank, arm in enumerate(sorted(differences, key=lambda arm: p_value(differences[arm]))):
        values = differences[arm]
        if not values:
            nothing = Estimate(value=math.nan, low=-math.inf, high=math.inf, turns=0)
            found[arm] = Verdict(word="diverged" if diverged.get(arm) else "undecided", difference=nothing)
            continue
        step, strict = mean_of(values, TAIL / (m - rank)), mean_of(values, 2 * TAIL / m)
        named = named and (step.high < 0 or step.low > 0)
        word: Word = "undecided"
        if diverged.get(arm):
            word = "diverged"
        elif len(values) < LEAST_PAIRS and any(values):
            named = False
        elif -margin <= strict.low and strict.high <= margin:
            word = "equal"
        elif named:
            word = "better" if step.high < 0 else "worse"
        found[arm] = Verdict(word=word, difference=mean_of(values))
    return {arm: found[arm] for arm in differences}


def p_value(values: Sequence[float]) -> float:
    """Return the chance of a mean so far from 0 if the true one is 0; 1 for fewer than two values."""
    if len(values) < 2:
        return 1.0
    deviation, mean = statistics.stdev(values), abs(statistics.fmean(values))
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return 1 - chance_within(mean / deviation * math.sqrt(len(values)), len(values) - 1)


def seeds_to_decide(values: Sequence[float], margin: float, arms: int = 1) -> int | None:
    """Return the seeds with which four of five new comparisons decide, if mean and deviation stay; None for one value.

    MOST_SEEDS stands for any larger number.

    Args:
        arms: number of those that are compared with the base.
    """
    if len(values) < 2:
        return None
    mean, deviation = abs(statistics.fmean(values)), statistics.stdev(values)
    if deviation == 0:
        return max(len(values), LEAST_PAIRS)
    below = statistics.NormalDist().cdf

    def decides(n: int) -> bool:
        error = deviation / math.sqrt(n)
        beyond, within = (students_t(min(n - 1, MANY), tail / arms) for tail in (TAIL, 2 * TAIL))
        # both ends of the interval must lie within the margin: of a mean near 0 each may fail
        equal = below((margin - mean) / error - within) + below((margin + mean) / error - within) - 1
        return max(below(mean / error - beyond), equal) >= POWER

    low, high = max(len(values), LEAST_PAIRS), MOST_SEEDS
    while low < high:
        n = (low + high) // 2
        low, high = (low, n) if decides(n) else (n + 1, high)
    return low


def skewness(values: Sequence[float]) -> float | None:
    """Return the skewness of values, where it is more than twice its error under a normal distribution; else None."""
    n, x = len(values), np.asarray(values)
    if n < LEAST_PAIRS or not np.ptp(x):
        return None
    x = x - x.mean()
    found = float((x**3).mean() / (x**2).mean() ** 1.5)
    error = math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    return found if abs(found) > 2 * error else None
