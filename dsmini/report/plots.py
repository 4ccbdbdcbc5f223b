"""Plots by matplotlib as SVG for a page: its style sheet has the colours of light and dark.

Over numbers, values are on the vertical axis. Over labels they are on the horizontal axis, so that long labels have
room. A prediction has the colour of the series that it predicts, dashed or hollow.
"""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmini.report.figures import Plot, Series
from dsmini.report.units import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.0, 3.2
"""Size in inches, at which text of 10.5 points is readable on a phone."""
LEGEND_WIDTH, HANDLE = 70, 8
"""Width of a line of the legend, and of the mark of an entry, in characters."""
ERRORS: dict[str, Any] = {"elinewidth": 1.1, "capsize": 2.5, "capthick": 1.1}
"""Style of 95 % intervals."""


LIGHT = {"ink": "#22262b", "muted": "#656c75", "rule": "#e4e2dc", "card": "#ffffff",
    "series-0": "#1f5fae", "series-1": "#cc5a1a", "series-2": "#2a7d57", "series-3": "#8450ad", "series-4": "#a17a00",
    "series-5": "#0e8494", "series-6": "#b93a68", "series-7": "#6b7280", "series-8": "#7d5a34", "series-9": "#4f9dd6",
}  # fmt: skip
DARK = {"ink": "#e4e6e9", "muted": "#99a1ac", "rule": "#2f353d", "card": "#1b1f24",
    "series-0": "#74a9f2", "series-1": "#f0935a", "series-2": "#68c294", "series-3": "#bf93e6", "series-4": "#d9b44a",
    "series-5": "#55c1d1", "series-6": "#ee87ab", "series-7": "#9aa3b0", "series-8": "#c9a074", "series-9": "#3f86c9",
}  # fmt: skip
THEMES = {"light": LIGHT, "dark": DARK}
"""Colours of a page and its plots, by the name of their variable in the page."""
MOST_COLOURS = 10


def svg(plot: Plot, name: str) -> str:
    """Return a plot as an element of a page.

    Args:
        name: prefix of every id in the SVG, unique in the page.
    """
    series = [kept for s in plot.series if (kept := drawable(s, plot)).y]
    if not series:
        return '<div class="empty">Nothing to draw yet.</div>'
    import matplotlib
    from matplotlib.figure import Figure as Drawing  # takes half a second to import

    bars = [s for s in series if s.kind == "bars"]
    entries = legend(series, plot)
    widest = max((len(entry) + HANDLE for entry in entries), default=LEGEND_WIDTH)
    fits = sum(len(entry) + HANDLE for entry in entries) <= LEGEND_WIDTH
    columns = max(1, len(entries) if fits else LEGEND_WIDTH // widest)
    height = max(HEIGHT, 1.0 + 0.3 * len(plot.labels or ()) * max(1, len(bars))) + 0.2 * (len(entries) // columns)
    settings: dict[Any, Any] = {"svg.hashsalt": name}
    with matplotlib.rc_context(settings, fname=Path(__file__).with_suffix(".mplstyle")):
        figure = Drawing(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for s, place in zip(series, colours_of(series), strict=True):
            if s.kind == "bars":
                at = [x + (bars.index(s) - (len(bars) - 1) / 2) * 0.76 / len(bars) for x in s.x]
                _draw_bars(axes, dataclasses.replace(s, x=at), LIGHT[f"series-{place}"], 0.65 / len(bars))
            else:
                _draw(axes, s, LIGHT[f"series-{place}"], swapped=plot.labels is not None)
        _scale(axes, plot, series)
        if entries:
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            rows_first = [entry for column in range(columns) for entry in entries[column::columns]]
            figure.legend([handles[e] for e in rows_first], rows_first, loc="outside upper left", ncols=columns)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    axis = f" by {plot.x}" if plot.x else ""
    label = f"{plot.title}: {plot.y}{axis}. " + "; ".join(s.label for s in series if s.label)
    return _inline(out.getvalue(), f'class="plot" role="img" aria-label="{escape(label)}"', name)


def drawable(series: Series, plot: Plot) -> Series:
    """Return the part of a series that can be drawn: finite values, on a logarithmic axis positive ones."""
    x = series.x if len(series.x) else range(len(series.y))

    def fits(value: float | None, log: bool) -> bool:
        return value is not None and math.isfinite(value) and (value > 0 or not log)

    log_x = plot.log_x and not plot.labels
    keep = [i for i, (a, b) in enumerate(zip(x, series.y, strict=True)) if fits(a, log_x) and fits(b, plot.log_y)]
    parts = {"x": x, "y": series.y, "low": series.low, "high": series.high}
    kept: dict[str, Any] = {key: None if part is None else [part[i] for i in keep] for key, part in parts.items()}
    return dataclasses.replace(series, **kept)


def legend(series: Sequence[Series], plot: Plot) -> list[str]:
    """Return the entries of the legend; none for a single series whose label repeats the title or the axis."""
    entries = [s.label for s in series if s.label]
    return [] if set(entries) <= {"measured", plot.title, plot.y} else entries


def colours_of(series: Sequence[Series]) -> list[int]:
    """Return the index of the colour of each series. A prediction shares the colour of its series."""
    shown = list(dict.fromkeys(s.of or s.label for s in series))
    return [shown.index(s.of or s.label) % MOST_COLOURS for s in series]


def _draw(axes: "Axes", s: Series, colour: str, swapped: bool) -> None:
    """Draw a line or points with intervals.

    Args:
        swapped: places are on the vertical axis.
    """
    line: Any = "none"
    marker = "" if s.kind == "line" and s.dashed and len(s.x) > 1 else "o"
    if s.kind == "line":
        line = (0, (4, 2.5)) if s.dashed else "-"
    face, order = (LIGHT["card"], 4) if s.dashed else (colour, 5)
    look: Any = {"color": colour, "markerfacecolor": face, "markersize": 4.6, "zorder": order, **ERRORS}
    look |= {"linestyle": line, "marker": marker, "label": s.label}
    if swapped:
        axes.errorbar(s.y, s.x, xerr=_ends(s), **look)
    else:
        axes.errorbar(s.x, s.y, yerr=_ends(s), **look)


def _draw_bars(axes: "Axes", s: Series, colour: str, thick: float) -> None:
    look: dict[str, Any] = {"facecolor": colour}
    if s.dashed:
        look = {"facecolor": "none", "edgecolor": colour, "linestyle": (0, (3, 2)), "linewidth": 1.2}
    errors = {"ecolor": LIGHT["ink"], "zorder": 6, **ERRORS}
    axes.barh(s.x, s.y, thick, xerr=_ends(s), error_kw=errors, zorder=3, label=s.label, **look)


def _ends(s: Series) -> Any:
    """Return the distances from the values to the ends of their intervals, below and above."""
    if s.low is None or s.high is None:
        return None
    return [
        [max(0.0, y - low) for y, low in zip(s.y, s.low, strict=True)],
        [max(0.0, high - y) for y, high in zip(s.y, s.high, strict=True)],
    ]


def _scale(axes: "Axes", plot: Plot, series: Sequence[Series]) -> None:
    """Set names, scales, limits and ticks. Over labels, values are on the x axis."""
    values = [v for s in series for part in (s.y, s.low or (), s.high or ()) for v in part if v is not None]
    along, upper, lower = ("x", plot.x, plot.y) if plot.labels else ("y", plot.y, plot.x)
    axes.set_title(upper)
    axes.set_xlabel(lower)
    axes.grid(True, axis="x" if plot.labels else "y")
    axes.spines["bottom" if plot.labels else "left"].set_visible(False)
    _scale_axis(axes, along, values, plot.log_y)
    if not plot.log_y and min(values) >= 0:  # from zero, so that lengths and heights can be compared
        axes.set(**{f"{along}lim": (0, (max(values) or 1) * 1.08)})
    if plot.labels:
        axes.set_yticks(range(len(plot.labels)), list(plot.labels))
        axes.invert_yaxis()
        return
    places = sorted({x for s in series for x in s.x})
    _scale_axis(axes, "x", places, plot.log_x)
    at = [math.log(x) for x in places] if plot.log_x else places
    if len(at) <= 7 and all(b - a > 0.09 * (at[-1] - at[0]) for a, b in itertools.pairwise(at)):
        axes.set_xticks(places)  # a tick at each number, if there is room


def _scale_axis(axes: "Axes", which: str, values: Sequence[float], log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        positive = [v for v in values if v > 0]
        wide = max(positive) > 150 * min(positive)
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(10, subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _inline(svg: str, attributes: str, name: str) -> str:
    """Return matplotlib's file as an element of a page, with unique ids and without a size."""
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view, "matplotlib writes a viewBox"
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href")
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for variable, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{variable})")
    return f"<svg {view.group()} {attributes}>{body.strip()}"
