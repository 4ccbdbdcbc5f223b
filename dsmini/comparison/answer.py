"""The answer of a comparison: a table for the terminal, a forest plot, and JSON."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.atomic import new_file
from dsmini.comparison.results import Results
from dsmini.comparison.verdict import Verdict, seeds_to_decide, verdicts
from dsmini.console.messages import say
from dsmini.measure.turns import TAIL
from dsmini.report.figures import Table, Toned, plain
from dsmini.report.tables import show_table
from dsmini.report.units import number, plural

COLOURS = {"better": "#2a7f3f", "worse": "#c8501e", "equal": "#1f4e8c", "undecided": "#7a7a7a", "diverged": "#c8501e"}
TONES = {"better": "near", "equal": "near", "worse": "far", "diverged": "far", "undecided": "off"}


def verdicts_of(results: Results) -> dict[str, Verdict]:
    """Return the verdict on each arm but the base."""
    arms = results.names[1:]
    found = {arm: results.differences(arm) for arm in arms}
    return verdicts(found, results.head["margin"], {arm: results.diverged(arm) for arm in arms})


def table_of(results: Results) -> Table:
    """Return a row for each arm: its loss and the difference to the base in nats a byte, the verdict, time and bytes of
    cache as shares of the base's, MaxVio, and the share of drafts that are taken."""
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
                *(_mean_ratio(results, arm, figure) for figure in ("cpu_seconds", "cache_bytes")),
                *(_mean(results, arm, figure) for figure in ("max_vio", "acceptance")),
            ]
        )
    columns = ["arm", "seeds", "loss", "difference, 95 %", "verdict", "time", "cache", "MaxVio", "drafts"]
    used = [
        i for i, name in enumerate(columns) if any(row[i] not in ("", "1.00" if name in RATIOS else "") for row in rows)
    ]
    names = [columns[i] for i in used]
    return Table(
        columns=names, rows=[[row[i] for i in used] for row in rows], numeric=[n for n in names if n not in NOT_NUMBERS]
    )


NOT_NUMBERS = ("arm", "verdict")
RATIOS = ("time", "cache")


def _mean(results: Results, arm: str, figure: str) -> str:
    values = list(results.values(arm, figure).values())
    return number(statistics.fmean(values)) if values else ""


def _mean_ratio(results: Results, arm: str, figure: str) -> str:
    """Return the median ratio to the base over the seeds that both have."""
    mine, base = results.values(arm, figure), results.values(results.names[0], figure)
    ratios = [mine[seed] / base[seed] for seed in mine.keys() & base.keys() if base[seed]]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def sentences(results: Results) -> list[str]:
    """Return what was found, in a sentence for each arm."""
    base, margin, told = results.names[0], results.head["margin"], []
    if lost := results.diverged(base):
        told.append(f"{base} diverged in {plural(lost, 'run')}, whose pairs do not count.")
    for arm, verdict in verdicts_of(results).items():
        d, needed = verdict.difference, _seeds_needed(results, arm, verdict)
        if verdict.word == "diverged":
            told.append(f"{arm} diverged in {results.diverged(arm)} of its runs.")
        elif verdict.word == "equal":
            told.append(f"{arm} is equal to {base} within the margin of {margin:g} nats a byte.")
        elif verdict.word == "undecided":
            more = (
                "two seeds are the least"
                if needed is None
                else f"about {needed:,} would decide if the rest is like this"
            )
            told.append(f"{arm} against {base} is undecided with {plural(d.turns, 'seed')}; {more}.")
        else:
            small = ", less than the margin" if abs(d.value) < margin else ""
            told.append(f"{arm} is {verdict.word} than {base}, by {abs(d.value):.4f} nats a byte{small}.")
    return told


def _seeds_needed(results: Results, arm: str, verdict: Verdict) -> int | None:
    """Return how many seeds would decide; None for an arm that is decided, or has fewer than two pairs."""
    if verdict.word != "undecided":
        return None
    return seeds_to_decide(results.differences(arm), results.head["margin"], TAIL / (len(results.names) - 1))


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
            "loss": statistics.fmean(values) if (values := list(results.values(arm).values())) else None,
            **({} if arm not in found else dataclasses.asdict(found[arm])),
            "seeds_needed": _seeds_needed(results, arm, found[arm]) if arm in found else None,
        }
        for arm in results.names
    }
    return plain({"question": results.head["question"], "margin": results.head["margin"], "arms": arms})


def draw(path: Path, all_results: Sequence[Results]) -> None:
    """Write a forest plot as PNG: for each arm the paired differences, their mean and its 95 % interval."""
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw

    rows: list[tuple[Results | None, str, Verdict | None]] = []
    for results in all_results:
        asked = results.head["question"] or "What differs?"
        rows += [(results, f"{asked}  Base: {results.names[0]}", None)]
        rows += [(results, arm, verdict) for arm, verdict in verdicts_of(results).items()]
    figure = Figure(figsize=(9, 1.0 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ticks: list[str] = []
    for y, (results, words, verdict) in enumerate(rows):
        if verdict is None or results is None:
            axes.axhspan(y - 0.5, y + 0.5, color="#ececec", zorder=3)
            axes.text(0.01, y, words, transform=axes.get_yaxis_transform(), va="center", zorder=4)
            ticks.append("")
            continue
        margin, d = results.head["margin"], verdict.difference
        axes.fill_betweenx([y - 0.5, y + 0.5], -margin, margin, color="#9db4d0", alpha=0.25, linewidth=0)
        colour, points = COLOURS[verdict.word], results.differences(words)
        axes.plot(points, [y] * len(points), "|", color=colour, alpha=0.35, markersize=7)
        if d.is_clear:
            axes.plot([d.low, d.high], [y, y], color=colour, linewidth=2)
        if d.turns:
            axes.plot([d.value], [y], "o", color=colour, markersize=6)
        value = f" {d.value:+.4f}" if d.turns and math.isfinite(d.value) else ""
        ticks.append(f"{words}:   {verdict.word}{value}, {plural(d.turns, 'seed')}")
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(ticks)), ticks)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=6)
    for tick, (_, _, verdict) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color("black" if verdict is None else COLOURS[verdict.word])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference to the base in nats a byte; left is better; the band is the margin")
    axes.grid(axis="x", alpha=0.3)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
