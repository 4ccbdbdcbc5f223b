"""The answer of a comparison: a table for the terminal, a forest plot, and JSON."""

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import new_file
from dsmini.comparison.results import Results
from dsmini.comparison.verdict import LEAST_PAIRS, MOST_SEEDS, Verdict, by_flips, seeds_to_decide, skewness, verdicts
from dsmini.console.messages import say
from dsmini.measure.turns import Estimate, mean_of
from dsmini.report.figures import Table, Toned, plain
from dsmini.report.tables import show_table
from dsmini.report.units import number, plural

COLOURS = {"better": "#2a7f3f", "worse": "#c8501e", "equal": "#1f4e8c", "undecided": "#7a7a7a", "diverged": "#c8501e"}
LOSS, TIME = "difference to the base in nats a byte\nleft is better; the band is the margin", "time\nbase = 1"
RATIOS = (0.25, 4.0)
"""Ratios of time beyond which a mean is an arrow."""
TONES = {"better": "near", "equal": "near", "worse": "far", "diverged": "far", "undecided": "off"}


def verdicts_of(results: Results) -> dict[str, Verdict]:
    """Return the verdict on each arm but the base."""
    arms = results.names[1:]
    found = {arm: results.differences(arm) for arm in arms}
    return verdicts(found, results.head["margin"], {arm: results.diverged(arm) for arm in arms})


def table_of(results: Results) -> Table:
    """Return a row for each arm: its loss and the difference to the base in nats a byte, the verdict, time and bytes of
    cache as shares of the base's (of the base its seconds), MaxVio, and the share of drafts that are taken."""
    found, rows = verdicts_of(results), []
    for arm in results.names:
        losses = list(results.values(arm).values())
        verdict = found.get(arm)
        d = verdict and verdict.difference
        rows.append(
            [
                arm,
                str(len(losses)) + (f" and {n} diverged" if (n := results.diverged(arm)) else ""),
                f"{statistics.fmean(losses):.4f}" if losses else "",
                (f"{d.value:+.4f}" if d and d.turns else "")
                + (f" ± {d.high - d.value:.4f}" if d and d.is_clear else ""),
                Toned(verdict.word, TONES[verdict.word]) if verdict else "base",
                _median_ratio(results, arm, results.clock) if verdict else _mean(results, arm, results.clock, " s"),
                _median_ratio(results, arm, "cache_bytes"),
                *(_mean(results, arm, figure) for figure in ("max_vio", "acceptance")),
            ]
        )
    columns = ["arm", "seeds", "loss", "difference, 95 %", "verdict", "time", "cache", "MaxVio", "drafts"]
    used = [
        i
        for i, name in enumerate(columns)
        if any(row[i] not in ("", "1.00" if name == "cache" else "") for row in rows)
    ]
    names = [columns[i] for i in used]
    return Table(
        columns=names, rows=[[row[i] for i in used] for row in rows], numeric=[n for n in names if n not in NOT_NUMBERS]
    )


NOT_NUMBERS = ("arm", "verdict")


def _mean(results: Results, arm: str, figure: str, unit: str = "") -> str:
    values = list(results.values(arm, figure).values())
    return f"{number(statistics.fmean(values))}{unit}" if values else ""


def _ratios(results: Results, arm: str, figure: str) -> list[float]:
    """Return the ratio to the base for each seed that both have."""
    mine, base = results.values(arm, figure), results.values(results.names[0], figure)
    return [mine[seed] / base[seed] for seed in sorted(mine.keys() & base.keys()) if base[seed]]


def _median_ratio(results: Results, arm: str, figure: str) -> str:
    ratios = _ratios(results, arm, figure)
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def sentences(results: Results) -> list[str]:
    """Return what was found, in a sentence for each arm."""
    base, margin, told = results.names[0], results.head["margin"], []
    if lost := results.diverged(base):
        told.append(f"{base} diverged in {plural(lost, 'run')}, whose pairs do not count.")
    for arm, verdict in verdicts_of(results).items():
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
        values = results.differences(arm)
        if (skew := skewness(values)) is not None:
            low, high = by_flips(values)
            told.append(
                f"{arm}: its differences are skewed ({skew:+.1f}), so Student's interval errs more often than in 5 %; "
                f"by flips of signs it is {low:+.4f} to {high:+.4f}."
            )
    return told


def _seeds_needed(results: Results, arm: str, verdict: Verdict) -> int | None:
    """Return how many seeds would decide; None for an arm that is decided, has no two pairs, or lost some."""
    if verdict.word != "undecided" or results.diverged(results.names[0]):
        return None
    return seeds_to_decide(results.differences(arm), results.head["margin"], len(results.names) - 1)


def show(console: Console, results: Results) -> None:
    """Print the table and the sentences, and of a claim what was expected and who made it."""
    show_table(console, table_of(results), results.head["question"] or results.path.stem)
    for key in ("source", "hypothesis"):
        if results.head[key]:
            say(console, f"{key}: {results.head[key]}")
    for line in sentences(results):
        say(console, line)


def record_of(results: Results) -> dict[str, Any]:
    """Return the answer as JSON has it."""
    found = verdicts_of(results)
    arms = {
        arm: {
            "runs": len(results.values(arm)),
            "diverged": results.diverged(arm),
            **{
                name: statistics.fmean(values) if (values := list(results.values(arm, figure).values())) else None
                for name, figure in (("loss", "loss"), ("seconds", results.clock))
            },
            **(dataclasses.asdict(found[arm]) if arm in found else {}),
            "seconds_difference": _seconds(results, arm) if arm in found else None,
            "seeds_needed": _seeds_needed(results, arm, found[arm]) if arm in found else None,
        }
        for arm in results.names
    }
    head = {key: results.head[key] for key in ("dsmini", "question", "margin")}
    return plain({"file": str(results.path), **head, "arms": arms})


def _seconds(results: Results, arm: str) -> dict[str, Any] | None:
    """Return the seconds of an arm less the base's, paired as losses are; None without two runs that have both."""
    found = results.differences(arm, results.clock)
    return dataclasses.asdict(mean_of(found)) if len(found) > 1 else None


def draw(path: Path, all_results: Sequence[Results]) -> None:
    """Write a forest plot as PNG: for each arm the paired differences, their mean and its 95 % interval; next to them
    the ratios of time."""
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import blended_transform_factory

    def escaped(words: str) -> str:
        return words.replace("$", r"\$")  # between two of them would be a formula

    found = [(results, verdicts_of(results)) for results in all_results]
    reach = _reach([verdict for _, of in found for verdict in of.values()], [each.head["margin"] for each, _ in found])
    rows = [(results, arm, of.get(arm)) for results, of in found for arm in ("", *results.names)]
    figure = Figure(figsize=(9, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes, clock = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    across = blended_transform_factory(figure.transFigure, axes.transData)
    ticks: list[tuple[str, str]] = []
    for y, (results, arm, verdict) in enumerate(rows):
        margin, label = results.head["margin"], textwrap.shorten(arm, 40, placeholder="...")
        if not arm:
            title = textwrap.shorten(results.head["question"] or results.path.stem, 110, placeholder="...")
            band = Rectangle((0, y - 0.5), 1, 1, transform=across, color="#ececec", clip_on=False, zorder=3)
            axes.add_patch(band).set_in_layout(False)
            axes.text(0.01, y, escaped(title), transform=across, va="center", zorder=4).set_in_layout(False)
            ticks.append(("", "black"))
            continue
        axes.fill_betweenx([y - 0.5, y + 0.5], -margin, margin, color="#9db4d0", alpha=0.25, linewidth=0)
        if verdict is None:
            ticks.append((f"{label}:   base", "black"))
            continue
        d, colour = verdict.difference, COLOURS[verdict.word]
        _plot(axes, y, results.differences(arm), d, (-reach, reach), colour)
        if ratios := _ratios(results, arm, results.clock):
            _plot(clock, y, ratios, mean_of(ratios), RATIOS, colour)
        value = f" {d.value:+.4f}" if d.turns and math.isfinite(d.value) else ""
        ticks.append((f"{label}:   {verdict.word}{value}, {plural(d.turns, 'seed')}", colour))
    for part, same, title in ((axes, 0, LOSS), (clock, 1, TIME)):
        part.axvline(same, color="#444444", linewidth=0.8)
        part.set_xlabel(title, fontsize=10)
        part.grid(axis="x", alpha=0.3)
        part.locator_params(axis="x", nbins=6 if part is axes else 3)
    axes.set_yticks(range(len(ticks)), [escaped(words) for words, _ in ticks])
    axes.tick_params(length=0)
    clock.tick_params(length=0)
    clock.patch.set_visible(False)
    clock.set_zorder(-1)  # the bands of the titles lie above it
    for tick, (_, colour) in zip(axes.get_yticklabels(), ticks, strict=True):
        tick.set_color(colour)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _plot(axes: Any, y: int, points: Sequence[float], d: Estimate, limits: tuple[float, float], colour: str) -> None:
    """Draw values, their mean and its interval in a row of a forest plot; an arrow is a mean beyond the limits."""
    low, high = limits
    inside = [point for point in points if low <= point <= high]
    axes.plot(inside, [y] * len(inside), "|", color=colour, alpha=0.35, markersize=7)
    if d.is_clear:
        axes.plot([min(max(end, low), high) for end in (d.low, d.high)], [y, y], color=colour, linewidth=2)
    if d.turns:
        at = min(max(d.value, low), high)
        axes.plot([at], [y], "o" if at == d.value else ">" if at == high else "<", color=colour, markersize=6)


def _reach(verdicts: Sequence[Verdict], margins: Sequence[float]) -> float:
    """Return how far a plot reaches: beyond it, eight times as far as most intervals do, an arm would hide the rest."""
    ends = [max(abs(d.low), abs(d.high)) for d in (verdict.difference for verdict in verdicts) if d.is_clear]
    return max(8 * statistics.median(ends) if ends else math.inf, *margins)
