"""Plots from figures: lines over a number, points or bars over labels. A list is empty without values."""

from collections.abc import Mapping, Sequence
from typing import Literal

from dsmini.report.figures import Figure, Plot, Series, pick

Kind = Literal["line", "points", "bars"]


def lines(figures: Sequence[Figure], metric: str, *, x: str, by: str, title: str) -> list[Plot]:
    """Draw a metric over one key of the case, with a line for each value of another key and dashed predictions.

    Args:
        x: key of the horizontal axis. Figures without it are left out.
        by: key that has a line for each value.
    """
    found = [f for f in pick(figures, metric) if f.measured and x in f.case]
    series: list[Series] = []
    for value in dict.fromkeys(f.case[by] for f in found):
        line = sorted((f for f in found if f.case[by] == value), key=lambda f: f.case[x])
        at = [float(f.case[x]) for f in line]
        words = value if isinstance(value, str) else f"{by} {value}"
        series.append(_series(words, at, line, "line"))
        if all(f.predicted for f in line):
            series.append(_predicted(at, line, "line", words))
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
    """Draw groups of figures, each over its label, with 95 % intervals if there are any.

    Args:
        groups: figures by label, by the name of the group. Figures without a measurement are left out.
        line: label and height of a dashed line across all labels.
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
            series.append(_predicted(at, found, "points", name))
    if not series:
        return []
    if line:
        words, height = line
        series.append(Series(label=words, x=[-0.5, len(places) - 0.5], y=[height] * 2, dashed=True))
    return [Plot(title=title, x="", y=y, series=series, labels=list(places), log_y=log_y, caption=caption)]


def _series(label: str, x: Sequence[float], figures: Sequence[Figure], kind: Kind) -> Series:
    """Return the measured values of figures, with their intervals if all figures have them."""
    low, high = ([getattr(f, end) for f in figures] for end in ("low", "high"))
    if None in low or None in high:
        low = high = None
    return Series(label=label, x=x, y=[f.measured or 0.0 for f in figures], low=low, high=high, kind=kind)


def _predicted(x: Sequence[float], figures: Sequence[Figure], kind: Kind, of: str) -> Series:
    """Return the predictions of figures, for the series of that label."""
    return Series(label=f"{of}, predicted", x=x, y=[f.predicted or 0.0 for f in figures], kind=kind, dashed=True, of=of)
