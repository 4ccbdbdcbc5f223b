"""Plots made from figures: lines over a number, bars side by side, points over labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from dsmini.report.figures import Figure, Plot, Series, Value, pick


def lines(
    figures: list[Figure],
    metric: str,
    *,
    x: str,
    by: str,
    title: str,
    unit: str,
    label: Callable[[Value], str] | None = None,
) -> list[Plot]:
    """Draw a metric over one part of the case, a line for each value of another part, predictions dashed.

    Args:
        label: words for a line's value; left out: the name of the part and the value.

    Returns: one plot, or none where nothing was measured.
    """
    found = [f for f in pick(figures, metric) if f.measured]
    series: list[Series] = []
    for value in sorted({f.case[by] for f in found}, key=str):
        line = sorted((f for f in found if f.case[by] == value), key=lambda f: f.case[x])
        at = [float(f.case[x]) for f in line]
        words = label(value) if label else f"{by} {value}"
        series.append(_series(words, at, line, "line", quartiles=bool(line[0].low)))
        if all(f.predicted for f in line):
            expected = [f.predicted or 0.0 for f in line]
            series.append(Series(label=f"{words}, predicted", x=at, y=expected, dashed=True))
    return [Plot(title=title, x=x, y=unit, series=series, log_x=True, log_y=True)] if series else []


def bars(title: str, y: str, values: Mapping[str, float], line: tuple[str, float], label: str) -> Plot:
    """Draw a bar for each label, and a dashed line across all of them: its words and its height."""
    heights = Series(label=label, x=range(len(values)), y=list(values.values()), kind="bars")
    return Plot(title=title, x="", y=y, series=[heights, _across(line, -0.5, len(values) - 0.5)], labels=list(values))


def measured_bars(
    title: str,
    y: str,
    figures: Mapping[str, Figure],
    line: tuple[str, float] | None = None,
    label: str = "measured",
    predicted: bool = False,
) -> Plot:
    """Draw each label's figure as a bar with its quartiles.

    Args:
        line: words and height of a dashed line across all bars.
        predicted: draw predictions too, as points.
    """
    series = [_series(label, range(len(figures)), figures.values(), "bars")]
    if line:
        series.append(_across(line, -0.5, len(figures) - 0.5))
    if predicted:
        expected = [f.predicted or 0.0 for f in figures.values()]
        series.append(Series(label="predicted", x=range(len(figures)), y=expected, kind="points"))
    return Plot(title=title, x="", y=y, series=series, labels=list(figures))


def points(
    title: str,
    y: str,
    groups: Mapping[str, Sequence[Figure]],
    label: Callable[[Figure], str],
    *,
    line: tuple[str, float] | None = None,
    quartiles: bool = False,
    log_y: bool = False,
    caption: str = "",
) -> Plot:
    """Draw each group's figures as points over their labels.

    Args:
        line: words and height of a dashed line across all labels.
    """
    labels = list(dict.fromkeys(label(f) for found in groups.values() for f in found))
    series = [
        _series(name, [float(labels.index(label(f))) for f in found], found, "points", quartiles)
        for name, found in groups.items()
        if found
    ]
    if line:
        series.append(_across(line, 0, max(1, len(labels) - 1)))
    return Plot(title=title, x="", y=y, series=series, labels=labels, log_y=log_y, caption=caption)


def _series(
    label: str,
    x: Sequence[float],
    figures: Iterable[Figure],
    kind: Literal["line", "points", "bars"],
    quartiles: bool = True,
) -> Series:
    """Return the measured values of figures, with their quartiles if asked for."""
    found = list(figures)
    low, high = ([getattr(f, end) or 0.0 for f in found] if quartiles else None for end in ("low", "high"))
    return Series(label=label, x=x, y=[f.measured or 0.0 for f in found], low=low, high=high, kind=kind)


def _across(line: tuple[str, float], start: float, end: float) -> Series:
    words, height = line
    return Series(label=words, x=[start, end], y=[height] * 2, dashed=True)
