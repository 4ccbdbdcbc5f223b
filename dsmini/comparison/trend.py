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

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from dsmini.atomic import new_file
from dsmini.comparison.results import Results, made_otherwise
from dsmini.comparison.verdict import LEAST_PAIRS
from dsmini.console.messages import say
from dsmini.measure.turns import TAIL, Estimate, mean_of, students_t
from dsmini.reading import read_toml
from dsmini.report.figures import Table, Toned, plain
from dsmini.report.tables import show_table

Word = Literal["holds", "turns", "grows", "shrinks", "undecided"]
BySize = Mapping[int, Sequence[float]]
"""Paired differences in nats a byte, by the number of active parameters."""
SMALLEST = 1e-9
"""Least squared error of a size, as a share of the largest: one that is 0 would have all the weight."""
TINIEST = 1e-30
"""Least squared error of all: losses of arms that are the same, to the bit."""
TONES = {"holds": "near", "undecided": "off"}


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Comparisons that ask one question at several sizes."""

    question: str
    steps: dict[int, Results]
    """Results by the number of active parameters of their base, the smallest first."""

    @property
    def arms(self) -> list[str]:
        """Names of the arms of any size but the base."""
        return list(dict.fromkeys(arm for results in self.steps.values() for arm in results.names[1:]))

    @property
    def margin(self) -> float:
        """Smallest margin of its comparisons, in nats a byte."""
        return min(results.head["margin"] for results in self.steps.values())

    def differences(self, arm: str) -> dict[int, list[float]]:
        """Return the paired differences of an arm at each size that has two or more."""
        found = {size: results.differences(arm) for size, results in self.steps.items()}
        return {size: values for size, values in found.items() if len(values) > 1}


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Change of an arm's difference with the size."""

    word: Word
    slope: Estimate | None
    """Change for each doubling of active parameters, in nats a byte, and its 95 % interval; None with one size."""
    differences: dict[int, Estimate]


def ladders_of(all_results: Sequence[Results]) -> list[Ladder]:
    """Return the ladders of two sizes or more. Two comparisons of one size: the first counts."""
    by_question: dict[tuple[str, str], dict[int, Results]] = {}
    for results in all_results:
        base, question = results.names[0], results.head["question"]
        sizes = [n for line in results.lines if line["arm"] == base and (n := line.get("active") or 0) > 0]
        if question and sizes:
            by_question.setdefault((question, base), {}).setdefault(sizes[0], results)
    return [
        Ladder(question=question, steps=dict(sorted(steps.items())))
        for (question, _), steps in by_question.items()
        if len(steps) > 1
    ]


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


def trends_of(ladder: Ladder) -> dict[str, Trend]:
    """Return the trend of each arm."""
    trends = dict[str, Trend]()
    for arm in ladder.arms:
        found = ladder.differences(arm)
        diverged = any(results.diverged(arm) for results in ladder.steps.values())
        trends[arm] = Trend(
            word="undecided" if diverged else word_of(found, ladder.margin, len(ladder.arms)),
            slope=slope_of(found) if len(found) > 1 else None,
            differences={size: mean_of(values) for size, values in found.items()},
        )
    return trends


def table_of(ladder: Ladder) -> Table:
    """Return a row for each arm: its difference at each size, the slope, and the word."""
    sizes = {size: f"at {size:,}" for size in ladder.steps}
    rows = [
        [arm, *(_words(trend.differences.get(size)) for size in sizes), _words(trend.slope),
         Toned(trend.word, TONES.get(trend.word, "far"))]
        for arm, trend in trends_of(ladder).items()
    ]  # fmt: skip
    numeric = [*sizes.values(), "per doubling, 95 %"]
    return Table(columns=["arm", *numeric, "trend"], rows=rows, numeric=numeric)


def _words(d: Estimate | None) -> str:
    return f"{d.value:+.4f} ± {d.high - d.value:.4f}" if d else ""


def sentences(ladder: Ladder, folder: Path) -> list[str]:
    """Return what is missing at a size, and what else differs between sizes.

    Args:
        folder: of claims, some of which may have no results yet.
    """
    told = list[str]()
    for arm, (size, results) in itertools.product(ladder.arms, ladder.steps.items()):
        if size not in ladder.differences(arm):
            told.append(f"{arm} has no two pairs at {size:,} active parameters; its trend leaves that size out.")
        if lost := results.diverged(arm):
            told.append(f"{arm} diverged at {size:,} active parameters, in {lost} of its runs.")
    for path in sorted(folder.glob("*.toml")):
        with suppress(ValueError):  # a file of something else
            asked = read_toml(path).get("question") == ladder.question
            if asked and not any(results.path.stem == path.stem for results in ladder.steps.values()):
                told.append(f"{path.name} asks it too, and is not in the trend: it has no results of another size.")
    lines = [results.lines[0] for results in ladder.steps.values()]
    if others := {what: None for line in lines for what, _, _ in made_otherwise(line, lines[0])}:
        told.append(f"Its sizes are of {', '.join(others)}; what seems a trend may come from these.")
    return told


def show(console: Console, ladder: Ladder, folder: Path) -> None:
    """Print the table and the sentences. Args: as of sentences."""
    show_table(console, table_of(ladder), f"{ladder.question} By active parameters of {_base(ladder)}")
    for line in sentences(ladder, folder):
        say(console, line)


def _base(ladder: Ladder) -> str:
    return next(iter(ladder.steps.values())).names[0]


def record_of(ladder: Ladder) -> dict[str, Any]:
    """Return the trends as JSON has them."""
    trends = {arm: dataclasses.asdict(trend) for arm, trend in trends_of(ladder).items()}
    head = {"question": ladder.question, "base": _base(ladder), "margin": ladder.margin}
    return plain({**head, "files": {n: str(results.path) for n, results in ladder.steps.items()}, "trends": trends})


def draw(path: Path, ladders: Sequence[Ladder]) -> None:
    """Write a PNG with a plot for each ladder: differences by size with their 95 % intervals, a line for each arm."""
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw

    figure = Figure(figsize=(9, 3.4 * len(ladders)), layout="constrained")
    for axes, ladder in zip(np.ravel(figure.subplots(len(ladders), 1, squeeze=False)), ladders, strict=True):
        axes.axhspan(-ladder.margin, ladder.margin, color="#9db4d0", alpha=0.25, linewidth=0)
        axes.axhline(0, color="#444444", linewidth=0.8)
        for i, (arm, trend) in enumerate(trends_of(ladder).items()):
            apart = 2 ** (0.04 * (i - len(ladder.arms) / 2))  # bars of several arms would lie on each other
            sizes, of = [size * apart for size in trend.differences], trend.differences.values()
            axes.errorbar(sizes, [d.value for d in of], [d.high - d.value for d in of], marker="o", capsize=3,
                          label=f"{arm}: {trend.word}".replace("$", r"\$"))  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks([*ladder.steps], [f"{size:,}" for size in ladder.steps])
        axes.minorticks_off()
        axes.set_title(ladder.question.replace("$", r"\$"), loc="left", fontsize=10)
        axes.set_xlabel("active parameters")
        axes.set_ylabel("difference to the base\nin nats a byte")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
