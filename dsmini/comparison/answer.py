"""The answer of a comparison: a table for the terminal, sentences, rows of a forest plot, and JSON."""

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import new_file
from dsmini.comparison.results import Results
from dsmini.comparison.verdict import LEAST_PAIRS, MOST_SEEDS, Verdict, seeds_to_decide, skewness, verdicts
from dsmini.console.messages import say
from dsmini.measure.turns import Estimate, mean_of
from dsmini.report.figures import Table, Toned
from dsmini.report.tables import show_table
from dsmini.report.units import number, plural

INK, BLUE, ORANGE = "#444444", "#1f4e8c", "#c8501e"
COLOURS = {
    "better": "#2a7f3f",
    "worse": ORANGE,
    "equal": BLUE,
    "holds": BLUE,
    "undecided": "#7a7a7a",
    "diverged": ORANGE,
}
"""Colours of verdicts; other words are black."""
TONES = {"better": "near", "equal": "near", "holds": "near", "undecided": "off"}
LOSS = "difference in nats a byte: left is better, the band is the margin"
HEIGHT = 7.5
"""Inches of a picture, 120 pixels each."""
MOST_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a forest plot."""

    arm: str
    word: str
    at: str = ""
    """Number of active parameters of the base, where they differ."""
    differences: Sequence[float] = ()
    """Paired differences in nats a byte."""
    mean: Estimate | None = None
    """Their mean, or a slope for each doubling of active parameters."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All that is told of a comparison, or of those of one question at several sizes."""

    title: str
    margin: float
    table: Table
    sentences: Sequence[str]
    rows: Sequence[Row]
    record: dict[str, Any]
    """The answer as JSON has it."""


def answer_of(results: Results) -> Answer:
    """Return the answer of a comparison; of a claim it also tells what was expected, and who made it."""
    head, (base, *arms) = results.head, results.names
    differences = {arm: results.differences(arm) for arm in arms}
    found = verdicts(differences, head["margin"], {arm: results.diverged(arm) for arm in arms})
    rows = [
        Row(arm=arm, word=verdict.word, differences=differences[arm], mean=verdict.difference)
        for arm, verdict in found.items()
    ]
    said = [f"{key}: {head[key]}" for key in ("source", "hypothesis") if head[key]]
    return Answer(
        title=f"{head['question'] or results.path.stem} Base: {base}.",
        margin=head["margin"],
        table=_table(results, found),
        sentences=[*said, *_sentences(results, found)],
        rows=rows,
        record=_record(results, found),
    )


def show(console: Console, answer: Answer) -> None:
    """Print the table and the sentences."""
    show_table(console, answer.table, answer.title)
    for line in answer.sentences:
        say(console, line)


def in_words(d: Estimate | None) -> str:
    """Return a mean and half of its 95 % interval, as far as they are known."""
    if d is None or not d.turns:
        return ""
    return f"{d.value:+.4f}" + (f" ± {d.high - d.value:.4f}" if d.is_clear else "")


def toned(word: str) -> Toned:
    """Return a word with its colour in a terminal."""
    return Toned(word, TONES.get(word, "far"))


def _table(results: Results, found: Mapping[str, Verdict]) -> Table:
    """Return a row for each arm: its loss and the difference to the base in nats a byte, the verdict, time and bytes of
    cache as shares of the base's (of the base its seconds), MaxVio, and the share of drafts that are taken."""
    columns = ["arm", "seeds", "loss", "difference, 95 %", "verdict", "time", "cache", "MaxVio", "drafts"]
    rows = list[list[str]]()
    for arm in results.names:
        runs, lost, verdict = len(results.values(arm)), results.diverged(arm), found.get(arm)
        loss, seconds, *shares = (results.mean(arm, each) for each in ("loss", results.clock, "max_vio", "acceptance"))
        time, cache = (_ratios(results, arm, figure) for figure in (results.clock, "cache_bytes"))
        own = "" if seconds is None else f"{number(seconds)} s"
        rows.append(
            [
                arm,
                f"{runs} and {lost} diverged" if lost else str(runs),
                "" if loss is None else f"{loss:.4f}",
                in_words(verdict and verdict.difference),
                toned(verdict.word) if verdict else "base",
                _median(time) if verdict else own,
                _median(cache),
                *("" if share is None else number(share) for share in shares),
            ]
        )
    same = {"cache": "1.00"}
    used = [i for i, name in enumerate(columns) if any(row[i] not in ("", same.get(name)) for row in rows)]
    names = [columns[i] for i in used]
    numeric = [name for name in names if name not in ("arm", "verdict")]
    return Table(columns=names, rows=[[row[i] for i in used] for row in rows], numeric=numeric)


def _ratios(results: Results, arm: str, figure: str) -> list[float]:
    """Return the ratio to the base for each seed that both have."""
    mine, base = results.values(arm, figure), results.values(results.names[0], figure)
    return [mine[seed] / base[seed] for seed in sorted(mine.keys() & base.keys()) if base[seed]]


def _median(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _sentences(results: Results, found: Mapping[str, Verdict]) -> list[str]:
    """Return what was found, in a sentence for each arm."""
    base, margin, told = results.names[0], results.head["margin"], []
    if lost := results.diverged(base):
        told.append(f"{base} diverged in {plural(lost, 'run')}, whose pairs do not count.")
    for arm, verdict in found.items():
        d = verdict.difference
        if verdict.word == "diverged":
            told.append(f"{arm} diverged in {results.diverged(arm)} of its runs.")
        elif verdict.word == "equal" and not any(results.differences(arm)):
            told.append(f"{arm} gives the same losses as {base}, to the bit: the idea changes nothing.")
        elif verdict.word == "equal":
            told.append(f"{arm} is equal to {base} within the margin of {margin:g} nats a byte.")
        elif verdict.word == "undecided":
            needed = _seeds_needed(results, arm, verdict)
            more = f"{LEAST_PAIRS} pairs are the least" if d.turns < LEAST_PAIRS else "some pairs are lost"
            if d.turns >= LEAST_PAIRS and needed is not None:
                seeds = f"{needed:,}" if needed < MOST_SEEDS else f"more than {MOST_SEEDS:,}"
                more = f"four of five new comparisons with {seeds} would decide, if the rest is like this"
            chance = " (of several ideas one is this far from 0 by chance)" if d.low > 0 or d.high < 0 else ""
            told.append(f"{arm} against {base} is undecided with {plural(d.turns, 'seed')}{chance}; {more}.")
        else:
            small = ", less than the margin" if abs(d.value) < margin else ""
            told.append(f"{arm} is {verdict.word} than {base}, by {abs(d.value):.4f} nats a byte{small}.")
        if (skew := skewness(results.differences(arm))) is not None:
            more = "so Student's interval errs more often than in 5 %"
            told.append(f"{arm}: its differences are skewed ({skew:+.1f}), {more}.")
    return told


def _seeds_needed(results: Results, arm: str, verdict: Verdict) -> int | None:
    """Return how many seeds would decide; None for an arm that is decided, has no two pairs, or lost some."""
    if verdict.word != "undecided" or results.diverged(results.names[0]):
        return None
    return seeds_to_decide(results.differences(arm), results.head["margin"], len(results.names) - 1)


def _record(results: Results, found: Mapping[str, Verdict]) -> dict[str, Any]:
    """Return the answer as JSON has it. Seconds are paired as losses are."""
    arms = dict[str, dict[str, Any]]()
    for arm in results.names:
        verdict, times = found.get(arm), results.differences(arm, results.clock)
        arms[arm] = {
            "runs": len(results.values(arm)),
            "diverged": results.diverged(arm),
            "loss": results.mean(arm, "loss"),
            "seconds": results.mean(arm, results.clock),
            **(dataclasses.asdict(verdict) if verdict else {}),
            "seconds_difference": dataclasses.asdict(mean_of(times)) if verdict and len(times) > 1 else None,
            "seeds_needed": verdict and _seeds_needed(results, arm, verdict),
        }
    head = {key: results.head[key] for key in ("dsmini", "question", "margin")}
    return {"file": str(results.path), **head, "arms": arms}


def draw(path: Path, answers: Sequence[Answer]) -> None:
    """Write a forest plot as PNG, at most HEIGHT high: in each row paired differences, their mean and 95 % interval.

    With more than MOST_ROWS, rows of arms that differ stay, and a title says how many are left out.
    """
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import blended_transform_factory

    many = sum(1 + len(answer.rows) for answer in answers) > MOST_ROWS
    lines = list[tuple[str, Row | None, float]]()
    for answer in answers:
        shown = [row for row in answer.rows if not many or row.word not in ("equal", "undecided")]
        left = len(answer.rows) - len(shown)
        more = f" {plural(left, 'arm')} equal or undecided." if left else ""
        lines.append((f"{textwrap.shorten(answer.title, 118 - len(more), placeholder='...')}{more}", None, 0.0))
        for row in shown:
            size = f" ({row.at})" if row.at else ""
            words = f"{textwrap.shorten(row.arm, 40 - len(size), placeholder='...')}{size}:   {row.word}"
            if (d := row.mean) is not None:
                words += (f" {d.value:+.4f}" if math.isfinite(d.value) else "") + f", {plural(d.turns, 'seed')}"
            lines.append((words, row, answer.margin))
    reach, height = _reach([row.mean for _, row, _ in lines if row], answers), min(HEIGHT, 0.8 + 0.3 * len(lines))
    size = min(10.0, 55 * (height - 0.8) / len(lines))
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    across = blended_transform_factory(figure.transFigure, axes.transData)
    for y, (words, row, margin) in enumerate(lines):
        words = words.replace("$", r"\$")  # between two of them would be a formula
        if row is None:
            band = Rectangle((0, y - 0.5), 1, 1, transform=across, color="#ececec", clip_on=False, zorder=3)
            axes.add_patch(band).set_in_layout(False)
            axes.text(0.01, y, words, transform=across, va="center", size=size, zorder=4).set_in_layout(False)
            continue
        colour = COLOURS.get(row.word, "black")
        axes.fill_betweenx([y - 0.5, y + 0.5], -margin, margin, color="#9db4d0", alpha=0.25, linewidth=0)
        if row.mean is not None:
            _plot(axes, y, row.differences, row.mean, reach, colour)
        axes.text(
            -0.01, y, words, transform=axes.get_yaxis_transform(), ha="right", va="center", color=colour, size=size
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    figure.supxlabel(LOSS, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_yticks([])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _plot(axes: Any, y: int, points: Sequence[float], d: Estimate, reach: float, colour: str) -> None:
    """Draw values, their mean and its interval in a row of a forest plot; an arrow is a mean beyond its reach."""
    inside = [point for point in points if abs(point) <= reach]
    axes.plot(inside, [y] * len(inside), "|", color=colour, alpha=0.35, markersize=7)
    if d.is_clear:
        axes.plot([min(max(end, -reach), reach) for end in (d.low, d.high)], [y, y], color=colour, linewidth=2)
    if d.turns:
        at = min(max(d.value, -reach), reach)
        axes.plot([at], [y], "o" if at == d.value else ">" if at > 0 else "<", color=colour, markersize=6)


def _reach(means: Sequence[Estimate | None], answers: Sequence[Answer]) -> float:
    """Return how far a plot reaches: beyond it, eight times as far as most intervals do, an arm would hide the rest."""
    ends = [max(abs(d.low), abs(d.high)) for d in means if d and d.is_clear]
    return max(8 * statistics.median(ends) if ends else math.inf, *(answer.margin for answer in answers))
