"""Plots as SVG that lives inside a page: its text is text, its colours are the page's, light or dark.

matplotlib knows colours, not variables of CSS. So each role is drawn in a colour of its own that nobody would choose,
and that colour's place in the SVG is then taken by the variable.
"""

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from dsmini.report.figures import Plot, Series
from dsmini.report.units import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROLES = {"ink": "#0f0f01", "muted": "#0f0f02", "rule": "#0f0f03", "card": "#0f0f04"}
SERIES = tuple(f"#0f0f1{n}" for n in range(10))
VARIABLES = {colour: f"var(--{name})" for name, colour in ROLES.items()} | {
    colour: f"var(--s{n})" for n, colour in enumerate(SERIES)
}
WIDTH, HEIGHT = 5.0, 3.2
"""In inches of 72 units: small enough that text of 10 units can be read where the page is as wide as a phone."""
NAMED = 24
"""So many points of a plot at most have their names beside them."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the legend, which the page draws."""

    label: str
    colour: str
    kind: str
    dashed: bool
    again: bool
    """The colour is another's too: these points are squares."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A plot as the page shows it."""

    title: str
    caption: str
    svg: str | None
    """None if there is nothing to draw yet."""
    legend: Sequence[Entry]


def draw(plot: Plot, name: str) -> Drawing:
    """Draw a plot.

    Args:
        name: unique in the page; every id in the SVG begins with it.
    """
    series = [kept for s in plot.series if (kept := _drawable(s, plot)).y]
    colours = _colours(series)
    legend = [
        Entry(label=s.label, colour=VARIABLES[colour], kind=s.kind, dashed=s.dashed, again=again)
        for s, (colour, again) in zip(series, colours, strict=True)
    ]
    if len(legend) == 1 and not legend[0].dashed and legend[0].label in ("", plot.title):
        legend = []
    svg = _svg(plot, series, colours, name) if series else None
    return Drawing(title=plot.title, caption=plot.caption, svg=svg, legend=legend)


def _drawable(series: Series, plot: Plot) -> Series:
    """Without what has no place in the plot: what is not finite, and what is not positive on a logarithmic axis."""
    x = series.x if len(series.x) else range(len(series.y))

    def fits(x: float | None, y: float | None) -> bool:
        return all(
            v is not None and math.isfinite(v) and (v > 0 or not log)
            for v, log in ((x, plot.log_x and not plot.labels), (y, plot.log_y))
        )

    keep = [i for i, (at, value) in enumerate(zip(x, series.y, strict=True)) if fits(at, value)]

    def kept(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[i] for i in keep]

    return Series(
        label=series.label,
        x=[x[i] for i in keep],
        y=[series.y[i] for i in keep],
        low=kept(series.low),
        high=kept(series.high),
        kind=series.kind,
        dashed=series.dashed,
        names=kept(series.names),
    )


def _colours(series: Sequence[Series]) -> list[tuple[str, bool]]:
    """One for each, and whether another had it before; a prediction has that of what it predicts, which its label
    tells apart by such words alone."""
    bases = [" ".join(re.sub(r"predict(ed|ion)s?|measured|[(),:]", " ", s.label.lower()).split()) for s in series]
    distinct = list(dict.fromkeys(bases))
    places = [distinct.index(base) for base in bases]
    return [(SERIES[place % len(SERIES)], place >= len(SERIES)) for place in places]


def _svg(plot: Plot, series: Sequence[Series], colours: Sequence[tuple[str, bool]], name: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure  # half a second to import: only when there is something to draw

    lying = bool(plot.labels) and _is_long(plot.labels or ())
    height = max(HEIGHT, 0.7 + 0.3 * len(plot.labels or ()) * _bars(series)) if lying else HEIGHT
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,  # a dollar in a label is a dollar
        "font.size": 10.5,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        _draw_all(axes, series, colours, lying)
        _scale(axes, plot, series, lying)
        _dress(axes, plot, lying)
        _name_points(axes, series)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    axis = f" by {plot.x}" if plot.x else ""
    label = f"{plot.title}: {plot.y}{axis}. " + "; ".join(s.label for s in series if s.label)
    return _inline(out.getvalue(), name, label)


def _is_long(labels: Sequence[str]) -> bool:
    """Whether labels would collide under upright bars."""
    return len(labels) * (max(map(len, labels)) + 1) > 50


def _bars(series: Sequence[Series]) -> int:
    return max(1, sum(s.kind == "bars" for s in series))


def _draw_all(axes: "Axes", series: Sequence[Series], colours: Sequence[tuple[str, bool]], lying: bool) -> None:
    bars, nth = _bars(series), 0
    for s, (colour, again) in zip(series, colours, strict=True):
        if s.kind == "bars":
            _draw_bars(axes, s, colour, lying, place=nth, of=bars)
            nth += 1
        else:
            _draw_points(axes, s, colour, lying, again)


def _draw_bars(axes: "Axes", s: Series, colour: str, lying: bool, *, place: int, of: int) -> None:
    thick = 0.76 / of
    at = [x + (place - (of - 1) / 2) * thick for x in s.x]
    if s.dashed:  # a prediction is hollow
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": colour, "linestyle": (0, (3, 2)), "linewidth": 1.2}
    else:
        look = {"facecolor": colour, "edgecolor": "none"}
    (axes.barh if lying else axes.bar)(at, s.y, thick * 0.86, zorder=3, **look)
    if errors := _errors(s):
        x, y = (s.y, at) if lying else (at, s.y)
        axes.errorbar(x, y, **{"xerr" if lying else "yerr": errors}, **_whiskers(ROLES["ink"]))


def _draw_points(axes: "Axes", s: Series, colour: str, lying: bool, again: bool) -> None:
    x, y = (s.y, s.x) if lying else (s.x, s.y)
    shape = "s" if again else "o"
    marker, line = shape, "none"
    if s.kind == "line":
        line = (0, (4, 2.5)) if s.dashed else "-"
        marker = "" if s.dashed and len(s.x) > 1 else shape
    face = ROLES["card"] if s.dashed else colour
    axes.plot(x, y, linestyle=line, marker=marker, markersize=4.6, color=colour, markerfacecolor=face, linewidth=1.7,
              markeredgecolor=colour, zorder=4 if s.dashed else 5)  # fmt: skip
    if errors := _errors(s):
        axes.errorbar(x, y, **{"xerr" if lying else "yerr": errors}, **_whiskers(colour))


def _whiskers(colour: str) -> dict[str, Any]:
    return {"fmt": "none", "color": colour, "elinewidth": 1.1, "capsize": 2.5, "capthick": 1.1, "zorder": 6}


def _errors(s: Series) -> list[list[float]] | None:
    if s.low is None or s.high is None:
        return None
    pairs = [
        (y if low is None else low, y, y if high is None else high)
        for low, y, high in zip(s.low, s.y, s.high, strict=True)
    ]
    return [[max(0.0, y - low) for low, y, _ in pairs], [max(0.0, high - y) for _, y, high in pairs]]


def _scale(axes: "Axes", plot: Plot, series: Sequence[Series], lying: bool) -> None:
    """Scales, limits and ticks."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    format = FuncFormatter(lambda value, _: short(value))
    value_axis, place_axis = (axes.xaxis, axes.yaxis) if lying else (axes.yaxis, axes.xaxis)
    values = [v for s in series for part in (s.y, s.low or (), s.high or ()) for v in part if v is not None]
    if plot.log_y:
        (axes.set_xscale if lying else axes.set_yscale)("log")
        value_axis.set_major_locator(_log_ticks(values))
        value_axis.set_minor_locator(NullLocator())
    elif min(values) >= 0:  # from zero, so that lengths and heights compare
        (axes.set_xlim if lying else axes.set_ylim)(0, (max(values) or 1) * 1.08)
    value_axis.set_major_formatter(format)
    if plot.labels:
        (axes.set_yticks if lying else axes.set_xticks)(range(len(plot.labels)), list(plot.labels))
        if lying:
            axes.invert_yaxis()
        return
    xs = sorted({x for s in series for x in s.x})
    if plot.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(_log_ticks(xs))
    if len(xs) <= 7 and _apart(xs, plot.log_x):
        axes.set_xticks(xs)
    if len(xs) == 1 and xs[0] > 0:
        axes.set_xlim(xs[0] / 2, xs[0] * 2)
    place_axis.set_major_formatter(format)


def _log_ticks(values: Sequence[float]) -> Any:
    from matplotlib.ticker import LogLocator

    decades = math.log10(max(values) / min(v for v in values if v > 0))
    return LogLocator(10, subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,), numticks=8)


def _apart(xs: Sequence[float], log: bool) -> bool:
    """Whether ticks at these places have room for their numbers."""
    at = [math.log(x) for x in xs] if log else list(xs)
    return min((b - a for a, b in itertools.pairwise(at)), default=1.0) > 0.09 * (at[-1] - at[0])


def _dress(axes: "Axes", plot: Plot, lying: bool) -> None:
    """Only what is needed: a base line, faint lines to read values by, the name of the values above them."""
    ink, muted, rule = ROLES["ink"], ROLES["muted"], ROLES["rule"]
    for side in ("top", "right", "bottom" if lying else "left"):
        axes.spines[side].set_visible(False)
    axes.spines["left" if lying else "bottom"].set_color(muted)
    axes.grid(axis="x" if lying else "y", color=rule, linewidth=0.8)
    axes.tick_params(colors=muted, labelcolor=ink, length=0, pad=5)
    if not plot.labels:
        axes.tick_params(axis="x", length=3)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    places, values = plot.x, plot.y
    axes.set_xlabel(values if lying else places, color=muted, labelpad=6)
    if lying:
        axes.set_title(places, loc="left", color=muted, fontsize=10, pad=9)
    else:
        axes.set_title(values, loc="left", color=muted, fontsize=10, pad=9)


def _name_points(axes: "Axes", series: Sequence[Series]) -> None:
    """Names beside their points, each on the first side where it covers neither a point nor another name."""
    named = [name for s in series if s.names and s.kind != "bars" for name in zip(s.x, s.y, s.names, strict=True)]
    if not 0 < len(named) <= NAMED:
        return
    axes.figure.canvas.draw()  # places are final once it is drawn
    at = [axes.transData.transform((x, y)) for x, y, _ in named]
    unit = axes.figure.dpi / 72
    taken = [(x / unit - 3, y / unit - 3, x / unit + 3, y / unit + 3) for x, y in at]
    taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in _along_lines(axes, series)]
    left, _, right, top = (v / unit for v in axes.bbox.extents)
    for (x, y), (data_x, data_y, text) in zip(at, named, strict=True):
        px, py, wide = x / unit, y / unit, 5.4 * len(text)
        sides = {
            ("left", "center"): (6, 0, px + 6, py - 6),
            ("right", "center"): (-6, 0, px - 6 - wide, py - 6),
            ("center", "bottom"): (0, 5, px - wide / 2, py + 5),
            ("center", "top"): (0, -5, px - wide / 2, py - 17),
            ("left", "bottom"): (4, 4, px + 4, py + 4),
            ("left", "top"): (4, -4, px + 4, py - 16),
            ("right", "bottom"): (-4, 4, px - 4 - wide, py + 4),
            ("right", "top"): (-4, -4, px - 4 - wide, py - 16),
        }
        boxes = {side: (dx, dy, (x0, y0, x0 + wide, y0 + 12)) for side, (dx, dy, x0, y0) in sides.items()}
        inside = {s: v for s, v in boxes.items() if left <= v[2][0] and v[2][2] <= right and v[2][3] <= top + 6}
        # the first of those that cover least
        side = min(inside or boxes, key=lambda s: sum(_meet(boxes[s][2], box) for box in taken))
        dx, dy, box = boxes[side]
        taken.append(box)
        axes.annotate(text, (data_x, data_y), (dx, dy), textcoords="offset points", ha=side[0], va=side[1],
                      color=ROLES["ink"], fontsize=9)  # fmt: skip


def _along_lines(axes: "Axes", series: Sequence[Series]) -> Iterator[tuple[float, float]]:
    """Places that the lines pass through, close to each other, in units of the page."""
    unit = axes.figure.dpi / 72
    for s in series:
        at = (
            [axes.transData.transform(point) / unit for point in zip(s.x, s.y, strict=True)] if s.kind == "line" else []
        )
        for (x, y), (next_x, next_y) in itertools.pairwise(at):
            steps = max(1, round(math.hypot(next_x - x, next_y - y) / 3))
            yield from ((x + (next_x - x) * i / steps, y + (next_y - y) * i / steps) for i in range(steps + 1))


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inline(svg: str, name: str, label: str) -> str:
    """matplotlib's file as an element of a page: ids of its own, no size, no style that reaches beyond it."""
    body = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    assert view, "matplotlib gives a viewBox"
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    for pattern, by in (
        (r'\bid="', f'id="{name}-'),
        (r'href="#', f'href="#{name}-'),
        (r"url\(#", f"url(#{name}-"),
        (r"font-family:[^;\"]*;?\s*", ""),  # the page's own
        (r"font:[^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1"),  # as older versions of matplotlib write it
    ):
        body = re.sub(pattern, by, body)
    body = re.sub(r"#0f0f[01]\d", lambda colour: VARIABLES[colour.group()], body)
    head = f'<svg class="plot" viewBox="{view.group(1)}" role="img" aria-label="{escape(label)}">'
    return head + body.strip()
