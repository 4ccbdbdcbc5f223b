"""Contents of a report: figures, plots of series, tables, and details."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsmini.report.units import Value


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
    """A cell with a colour, by name, and a bar behind a ratio: its start and length in percent."""

    tone: str
    bar: tuple[float, float] | None

    def __new__(cls, text: str, tone: str = "", bar: tuple[float, float] | None = None) -> "Toned":
        made = super().__new__(cls, text)
        made.tone, made.bar = tone, bar
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
