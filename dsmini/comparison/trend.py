"""Trends: how a difference changes as models grow.

Comparisons with one question and one name of the base are a ladder. A step's size is the number of active parameters of
its base; arms are matched by name. At size i the paired differences of n_i seeds have the mean d_i and its squared
error v_i = s_i^2 / n_i, with s_i their deviation. x_i counts doublings of active parameters. The line through the sizes
(weighted least squares) has the slope

    b = sum of c_i d_i     c_i = w_i (x_i - x) / sum over j of w_j (x_j - x)^2     w_i = 1 / v_i     x = mean by w

in nats a byte for each doubling. Its squared error is v = sum of c_i^2 v_i. Student's t has
v^2 / sum of (c_i^2 v_i)^2 / (n_i - 1) degrees of freedom (Welch and Satterthwaite). Two sizes make it Welch's test.

    holds      no two sizes differ by more than the margin: two one-sided tests of each pair
    turns      the difference leaves 0 out at the smallest and at the largest size, on different sides
    grows      the slope leaves 0 out, and the difference at the largest size, which is farther from 0
    shrinks    the slope leaves 0 out, and the difference at the smallest size, which is farther from 0
    undecided  none of these, fewer than LEAST_PAIRS pairs at a size, or runs of the arm diverged

With m arms every word takes the m-th part of the level (Bonferroni). Intervals that are shown have 95 %.

Source: Welch 1947, The generalization of Student's problem when several different population variances are involved.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np

from dsmini.comparison.answer import Answer, Row, answer_of, in_words, toned
from dsmini.comparison.results import Results, made_otherwise
from dsmini.comparison.verdict import LEAST_PAIRS
from dsmini.measure.turns import TAIL, Estimate, mean_of, students_t
from dsmini.report.figures import Table

Word = Literal["holds", "turns", "grows", "shrinks", "undecided"]
Ladder = dict[int, Results]
"""Comparisons that ask one question, by the number of active parameters of their base, the smallest first."""
BySize = Mapping[int, Sequence[float]]
"""Paired differences in nats a byte, by the number of active parameters."""
SMALLEST = 1e-9
"""Least squared error of a size, as a share of the largest: one that is 0 would have all the weight."""
TINIEST = 1e-30
"""Least squared error of all: losses of arms that are the same, to the bit."""


def ladders_of(all_results: Sequence[Results]) -> list[Ladder]:
    """Return the ladders of two sizes or more. Two comparisons of one size: the first counts."""
    by_question: dict[tuple[str, str], dict[int, Results]] = {}
    for results in all_results:
        base, question = results.names[0], results.head["question"]
        sizes = [n for line in results.lines if line["arm"] == base and (n := line.get("active") or 0) > 0]
        if question and sizes:
            by_question.setdefault((question, base), {}).setdefault(sizes[0], results)
    return [dict(sorted(ladder.items())) for ladder in by_question.values() if len(ladder) > 1]


def answer_of_trends(ladder: Ladder) -> Answer:
    """Return the answer of a ladder: for each arm a row with its verdict at each size, then one with the slope.

    Its sentences say what is missing at a size, and what else differs between sizes.
    """
    steps = [*ladder.values()]
    question, base = steps[0].head["question"], steps[0].names[0]
    margin = min(results.head["margin"] for results in steps)
    arms = list(dict.fromkeys(arm for results in steps for arm in results.names[1:]))
    at_sizes = {size: answer_of(results).rows for size, results in ladder.items()}
    rows, trends, told = list[Row](), dict[str, Any](), list[str]()
    for arm in arms:
        found, diverged = dict[int, list[float]](), False
        for size, results in ladder.items():
            rows += [replace(row, at=f"{size:,}") for row in at_sizes[size] if row.arm == arm]
            if len(differences := results.differences(arm)) > 1:
                found[size] = differences
            else:
                told.append(f"{arm} has no two pairs at {size:,} active parameters; its trend leaves that size out.")
            if lost := results.diverged(arm):
                diverged = True
                told.append(f"{arm} diverged at {size:,} active parameters, in {lost} of its runs.")
        word = "undecided" if diverged else word_of(found, margin, len(arms))
        slope = slope_of(found) if len(found) > 1 else None
        rows.append(Row(arm=arm, at="each doubling", word=word, mean=slope))
        means = {size: asdict(mean_of(values)) for size, values in found.items()}
        trends[arm] = {"word": word, "slope": slope and asdict(slope), "differences": means}
    first = steps[0].lines[0]
    if others := {what: None for results in steps for what, _, _ in made_otherwise(results.lines[0], first)}:
        told.append(f"Its sizes are of {', '.join(others)}; what seems a trend may come from these.")
    columns = ["arm", "active parameters", "difference, 95 %", "verdict"]
    cells = [[row.arm, row.at, in_words(row.mean), toned(row.word)] for row in rows]
    files = {size: str(results.path) for size, results in ladder.items()}
    return Answer(
        title=f"{question} By active parameters of {base}",
        margin=margin,
        table=Table(columns=columns, rows=cells, numeric=columns[1:3]),
        sentences=told,
        rows=rows,
        record={"question": question, "base": base, "margin": margin, "files": files, "trends": trends},
    )


def slope_of(found: BySize, tail: float = TAIL) -> Estimate:
    """Return the slope for each doubling of the size, with its interval. Two sizes at least, each with two values."""
    sizes, values = np.log2([*found]), [*found.values()]
    n, means = (np.array([f(each) for each in values], dtype=np.float64) for f in (len, statistics.fmean))
    v = np.array([statistics.variance(each) for each in values]) / n
    v = np.maximum(v, SMALLEST * v.max() or TINIEST)
    w = 1 / v / (1 / v).sum()
    x = sizes - (w * sizes).sum()
    c = w * x / (w * x**2).sum()
    parts = c**2 * v
    freedom = parts.sum() ** 2 / (parts**2 / (n - 1)).sum()
    value, half = float((c * means).sum()), students_t(max(1, int(freedom)), tail) * math.sqrt(parts.sum())
    return Estimate(value=value, low=value - half, high=value + half, turns=int(n.sum()), tail=tail)


def word_of(found: BySize, margin: float, arms: int = 1) -> Word:
    """Return the word for an arm's differences.

    Args:
        margin: largest change that counts as none, in nats a byte.
        arms: number of those that are looked at.
    """
    if len(found) < 2 or min(map(len, found.values())) < LEAST_PAIRS:
        return "undecided"
    tail, changes = TAIL / arms, list[float]()
    for a, b in itertools.combinations(found, 2):
        pair = slope_of({a: found[a], b: found[b]}, 2 * tail)
        changes += [end * math.log2(b / a) for end in (pair.low, pair.high)]
    if max(map(abs, changes)) <= margin:
        return "holds"
    first, last = (mean_of(found[size], tail) for size in (min(found), max(found)))
    if _leaves_out_0(first) and _leaves_out_0(last) and first.value * last.value < 0:
        return "turns"
    grows = abs(last.value) > abs(first.value)
    if _leaves_out_0(slope_of(found, tail)) and _leaves_out_0(last if grows else first):
        return "grows" if grows else "shrinks"
    return "undecided"


def _leaves_out_0(d: Estimate) -> bool:
    return d.low > 0 or d.high < 0
