"""Contents of a report: figures, plots of series, tables, and heat maps, which are tables whose cells are shaded.

The page shades cells by style sheet, so that a heat map is light and dark, prints, and can be read and copied as text.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsmini.report.units import NOTHING, Value

LIGHTEST, DARKEST = 0.05, 0.47
"""Shade of the smallest and of the largest value, of 1. The text stays readable on it, in light and dark."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that helps to answer a question: measured, predicted, or both."""

    question: str
    """Name of the question, such as "decode"."""
    case: Mapping[str, Value]
    """Conditions, such as {"context": 2048, "attention": "mla"}."""
    metric: str
    """Name of the number, such as tokens_per_s or bytes_per_token."""
    unit: str
    """Unit, such as tokens/s, bytes, s, FLOP/s, x for a factor, or "" for a share."""
    measured: float | None = None
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval of the measured value; None without one."""
    exact: bool = False
    """True for a count, whose measurement must equal the prediction."""
    bound: bool = False
    """True if the prediction is a limit, such as a roof, and not an expected value."""
    note: str = ""
    """Anything that a reader must know, such as the parts that are simulated."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        if self.measured is None or not self.predicted:
            return None
        return self.measured / self.predicted

    @property
    def is_time(self) -> bool:
        """True for a time, a rate, or a ratio of times."""
        return self.unit in ("s", "x") or self.unit.endswith("/s")

    @property
    def equal(self) -> bool | None:
        """True if an exact count equals its prediction; None if there is nothing to compare."""
        if not self.exact or self.measured is None or self.predicted is None:
            return None
        return self.measured == self.predicted

    def as_json(self) -> dict[str, Any]:
        """Return the figure as written to files and to the last line of a command."""
        return plain(dataclasses.asdict(self) | {"case": dict(self.case), "ratio": self.ratio})


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, cloud of points, or set of bars of a plot."""

    label: str
    x: Sequence[float]
    """Positions; 0 is the first of a plot's labels. Empty stands for 0, 1, 2 and so on."""
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["line", "points", "bars"] = "line"
    dashed: bool = False
    """True for predictions: dashed lines, hollow bars and points."""
    of: str = ""
    """Label of the series that this one predicts, and whose colour it has."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Plot of series over one axis of numbers or of labels."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    labels: Sequence[str] | None = None
    """Names of the positions 0, 1, 2 and so on; None for an axis of numbers."""


class Toned(str):
    """A cell with a colour, by name, a bar behind a ratio (its start and length in percent), or a shade from 0 to 1."""

    tone: str
    bar: tuple[float, float] | None
    shade: float | None

    def __new__(
        cls, text: str, tone: str = "", bar: tuple[float, float] | None = None, shade: float | None = None
    ) -> "Toned":
        made = super().__new__(cls, text)
        made.tone, made.bar, made.shade = tone, bar, shade
        return made


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table of words and numbers. Cells that are Toned are coloured."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()
    """Columns that are aligned on the right."""
    common: str = ""
    """Line above: words that all rows share."""
    heat: str = ""
    """Title of a heat map; "" for another table."""


def heat_map(
    title: str, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[tuple[str, float | None]]]
) -> Table:
    """Return values over two axes of labels as a table: on a logarithmic scale where they span more than ten times.

    Args:
        corner: names of the axes.
        rows: cells in words, each with its value, by the label of the row; None where there is none.
    """
    found = [v for row in rows.values() for _, v in row if v is not None and math.isfinite(v)]
    log = bool(found) and min(found) > 0 and max(found) > 10 * min(found)
    low, high = (math.log(end(found)) if log else end(found) for end in (min, max)) if found else (0.0, 0.0)

    def shaded(word: str, value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return word or NOTHING
        part = ((math.log(value) if log else value) - low) / (high - low) if high > low else 0.5
        return Toned(word, shade=round(LIGHTEST + part * (DARKEST - LIGHTEST), 3))

    lines = [[label, *(shaded(*cell) for cell in row)] for label, row in rows.items()]
    return Table(columns=(corner, *columns), rows=lines, numeric=columns, heat=title)


@dataclass(frozen=True, kw_only=True)
class Detail:
    """Number whose computation is read on a click."""

    name: str
    """Target of links, unique in the report."""
    title: str
    value: str
    """Value in words."""
    lines: Sequence[str] = ()
    """Computation in lines, such as a formula in names and in numbers."""
    note: str = ""
    """Sentence below, such as the source."""
    needs: Sequence[str] = ()
    """Names of the numbers that it was computed from. Numbers that the report has become links."""


def pick(figures: Iterable[Figure], metric: str, **case: Value) -> list[Figure]:
    """Return the figures of a metric whose cases have these values."""
    return [f for f in figures if f.metric == metric and all(f.case.get(k) == v for k, v in case.items())]


def plain(value: Any) -> Any:
    """Return a value as JSON can represent it: infinities and NaN become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
