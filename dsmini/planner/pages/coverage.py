"""Section of the published figures next to ours: coverage next to error."""

from collections.abc import Sequence
from typing import get_args

from dsmini.planner.published.published import PublishedFigure, Status, published_figures
from dsmini.planner.quantities.display import in_words, short, shown
from dsmini.planner.quantities.quantity import COUNT, Anything, Quantity
from dsmini.report import Section, Table

LARGE = 1e6
"""Count from which on a terminal shows words, such as 671 billion."""


def coverage(figures: Sequence[PublishedFigure] | None = None, *, full: bool = True) -> Section:
    """Return the published figures next to ours.

    Args:
        full: with facts, sources and notes, which a terminal has no room for.
    """
    figures = published_figures() if figures is None else figures
    of = {status: sum(f.status == status for f in figures) for status in get_args(Status)}
    return Section(
        name="coverage_section",
        title="How far can it be trusted? Coverage next to error",
        finding=(
            f"{len(figures) - of['worked out']} published figures: {of['reproduced']} are reproduced from sizes of "
            f"models and machines, {of['follows']} follow from other printed figures by a sum, a ratio or one formula, "
            f"{of['misses']} are missed, {of['misprint']} contradict their own source, and {of['not attempted']} is "
            f"not attempted. {of['worked out']} more, worked out by hand from published sizes and formulas, agree."
        ),
        tables=[_all_columns(figures) if full else _few_columns(figures)],
        about=(
            "Errors are of unrounded values, next to the error to hold: half a unit of the last printed digit, where "
            "no note says otherwise. Known misses are shown, and no constant is fitted to hide them."
        ),
    )


def _all_columns(figures: Sequence[PublishedFigure]) -> Table:
    rows = [
        (
            str(f.row),
            f.what,
            f"at most {shown(f.printed)}" if f.bound else shown(f.printed),
            "" if f.ours is None else shown(f.ours),
            "" if f.residual is None else f"{100 * f.residual:+.2f} %",
            _within(f) if f.bound or f.ours is None else f"{_within(f)} %",
            f.status,
            f.source,
            f.note,
        )
        for f in figures
    ]
    columns = ("fact", "figure", "printed", "ours", "residual", "within", "status", "source", "note")
    return Table(columns=columns, rows=rows, numeric=("fact", "printed", "ours", "residual", "within"))


def _few_columns(figures: Sequence[PublishedFigure]) -> Table:
    """Return a table for a terminal. Ours has no unit where it is that of the published figure."""
    rows: list[tuple[str, ...]] = []
    for f in figures:
        printed = _four_digits(f.printed)
        ours, _, unit = ("" if f.ours is None else _four_digits(f.ours)).partition(" ")
        ours = f"{float(ours):.4g}" if ours.replace(".", "").isdigit() else ours  # of another unit, such as hours
        rows.append(
            (
                f.what,
                f"at most {printed}" if f.bound else printed,
                ours if unit == printed.partition(" ")[2] else f"{ours} {unit}",
                "" if f.residual is None else f"{100 * f.residual:+.2f}",
                _within(f),
                "untried" if f.status == "not attempted" else f.status,
            )
        )
    columns = ("figure", "published", "ours", "error, %", "within", "verdict")
    return Table(columns=columns, rows=rows, numeric=columns[1:-1])


def _within(figure: PublishedFigure) -> str:
    """Return the error to hold in percent: 0 for a figure that must be exact; "below" for one that prints a bound."""
    if figure.ours is None:
        return ""
    return "below" if figure.bound else f"{100 * figure.within:.2g}"


def _four_digits(figure: Anything) -> str:
    """Return a published figure as given, and ours in four digits."""
    value = figure.value if figure.op == "input" else float(f"{figure.value:.4g}")
    number = Quantity(value, figure.unit, "number")
    return in_words(number) if figure.unit == COUNT.exponents and value >= LARGE else short(number)
