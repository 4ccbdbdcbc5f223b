"""Plots made from figures: lines over a number, points or bars over labels. Each is a list, empty without values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from dsmini.report.figures import Figure, Plot, Series, Value, pick

Kind = Literal["line", "points", "bars"]


def lines(
    figures: Sequence[Figure],
    metric: str,
    *,
    x: str,
    by: str,
    title: str,
    label: Callable[[Value], str] | None = None,
) -> list[Plot]:
    """Draw a metric over one part of the case, a line for each value of another part, predictions dashed.

    Args:
        label: words for a line's value; None: the name of the part and the value.
    """
    found = [f for f in pick(figures, metric) if f.measured]
    series: list[Series] = []
    for value in sorted({f.case[by] for f in found}, key=str):
        line = sorted((f for f in found if f.case[by] == value), key=lambda f: f.case[x])
        at = [float(f.case[x]) for f in line]
        words = label(value) if label else f"{by} {value}"
        series.append(_series(words, at, line, "line"))
        if all(f.predicted for f in line):
            series.append(_predicted(at, line, "line", words, f"{words}, predicted"))
    return [Plot(title=title, x=x, y=found[0].unit, series=series, log_x=True, log_y=True)] if series else []


def over_labels(
    title: str,
    y: str,
    groups: Mapping[str, Mapping[str, Figure]],
    *,
    kind: Kind = "points",
    line: tuple[str, float] | None = None,
    predicted: bool = False,
    log_y: bool = False,
    caption: str = "",
) -> list[Plot]:
    """Draw groups of figures, each over its label, with quartiles where they have some.

    Args:
        groups: figures by label, by the name of their group. What was not measured is left out.
        line: words and height of a dashed line across all labels.
        predicted: draw the predictions too, as points.
    """
    measured = {n: {k: f for k, f in group.items() if f.measured is not None} for n, group in groups.items()}
    places = {label: float(i) for i, label in enumerate(dict.fromkeys(k for group in measured.values() for k in group))}
    series: list[Series] = []
    for name, group in measured.items():
        at, found = [places[label] for label in group], list(group.values())
        if found:
            series.append(_series(name, at, found, kind))
        if found and predicted:
            words = "predicted" if len(groups) == 1 else f"{name}, predicted"
            series.append(_predicted(at, found, "points", name, words))
    if not series:
        return []
    if line:
        words, height = line
        series.append(Series(label=words, x=[-0.5, len(places) - 0.5], y=[height] * 2, dashed=True))
    return [Plot(title=title, x="", y=y, series=series, labels=list(places), log_y=log_y, caption=caption)]


def _series(label: str, x: Sequence[float], figures: Sequence[Figure], kind: Kind) -> Series:
    """Return the measured values of figures, with their quartiles if all have them."""
    low, high = ([getattr(f, end) for f in figures] for end in ("low", "high"))
    if None in low or None in high:
        low = high = None
    return Series(label=label, x=x, y=[f.measured or 0.0 for f in figures], low=low, high=high, kind=kind)


def _predicted(x: Sequence[float], figures: Sequence[Figure], kind: Kind, of: str, label: str) -> Series:
    return Series(label=label, x=x, y=[f.predicted or 0.0 for f in figures], kind=kind, dashed=True, of=of)
