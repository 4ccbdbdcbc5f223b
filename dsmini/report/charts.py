"""Plots made from figures: lines over a number, bars side by side, points over labels."""

from collections.abc import Callable, Mapping, Sequence

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
        low, high = ([getattr(f, end) or 0.0 for f in line] if line[0].low else None for end in ("low", "high"))
        series.append(Series(label=words, x=at, y=[f.measured or 0.0 for f in line], low=low, high=high))
        if all(f.predicted for f in line):
            expected = [f.predicted or 0.0 for f in line]
            series.append(Series(label=f"{words}, predicted", x=at, y=expected, dashed=True))
    return [Plot(title=title, x=x, y=unit, series=series, log_x=True, log_y=True)] if series else []


def bars(title: str, y: str, values: Mapping[str, float], line: tuple[str, float], label: str) -> Plot:
    """Draw a bar for each label, and a dashed line across all of them: its words and its height."""
    return _barred(title, y, Series(label=label, x=_places(values), y=list(values.values()), kind="bars"), values, line)


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
        predicted: whether to draw predictions too, as points.
    """
    found = list(figures.values())
    low, high = [f.low or 0.0 for f in found], [f.high or 0.0 for f in found]
    y_values, x = [f.measured or 0.0 for f in found], _places(figures)
    plot = _barred(title, y, Series(label=label, x=x, y=y_values, low=low, high=high, kind="bars"), figures, line)
    if not predicted:
        return plot
    expected = Series(label="predicted", x=x, y=[f.predicted or 0.0 for f in found], kind="points")
    return Plot(title=title, x="", y=y, series=[*plot.series, expected], labels=plot.labels)


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
    series = []
    for name, found in groups.items():
        if not found:
            continue
        x, measured = [float(labels.index(label(f))) for f in found], [f.measured or 0.0 for f in found]
        low, high = ([getattr(f, end) or 0.0 for f in found] if quartiles else None for end in ("low", "high"))
        series.append(Series(label=name, x=x, y=measured, low=low, high=high, kind="points"))
    if line:
        series.append(Series(label=line[0], x=[0, max(1, len(labels) - 1)], y=[line[1]] * 2, dashed=True))
    return Plot(title=title, x="", y=y, series=series, labels=labels, log_y=log_y, caption=caption)


def _barred(title: str, y: str, bars: Series, labels: Mapping[str, object], line: tuple[str, float] | None) -> Plot:
    series = [bars]
    if line:
        series.append(Series(label=line[0], x=[-0.5, len(labels) - 0.5], y=[line[1]] * 2, dashed=True))
    return Plot(title=title, x="", y=y, series=series, labels=list(labels))


def _places(labels: Mapping[str, object]) -> list[float]:
    return [float(i) for i in range(len(labels))]
