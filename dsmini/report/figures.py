"""The things that a report shows: figures, and plots of series."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Value = str | int | float | bool
FOUND = {"intensity", "calls"}
"""Keys of a case that are measured too: they do not name a figure."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that answers a question: measured, predicted, or both."""

    question: str
    """Name of the question, such as "decode"."""
    case: Mapping[str, Value]
    """The things that were varied, such as {"context": 2048, "attention": "mla"}. Question, case and metric together
    name the figure; keys of FOUND do not count."""
    metric: str
    """Name of the number, such as tokens_per_s or bytes_per_token."""
    unit: str
    """Unit, such as tokens/s, bytes, s, FLOP/s, x for a factor, or "" for a share."""
    measured: float | None = None
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    """Quartiles, where it was measured several times."""
    better: Literal["higher", "lower"] | None = None
    exact: bool = False
    """Predicted and measured must be equal: a count, not a time."""
    bound: bool = False
    """The prediction is a limit, such as a roof, and not what is expected."""
    note: str = ""
    """Anything that a reader must know, such as what is simulated."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        if self.measured is None or not self.predicted:
            return None
        return self.measured / self.predicted

    @property
    def is_time(self) -> bool:
        """True for a time, a rate, or a ratio of them."""
        return self.unit in ("s", "x") or self.unit.endswith("/s")

    @property
    def equal(self) -> bool | None:
        """True if an exact count is as predicted; None if there is nothing to compare."""
        if not self.exact or self.measured is None or self.predicted is None:
            return None
        return self.measured == self.predicted

    def as_json(self) -> dict[str, Any]:
        """Return the figure as it stands in files and in the last line of a command."""
        return plain(dataclasses.asdict(self) | {"case": dict(self.case), "ratio": self.ratio})


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, cloud of points, or set of bars of a plot."""

    label: str
    x: Sequence[float]
    """Places. In a plot with labels 0 is the first label. Left empty: 0, 1, 2 and so on."""
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["line", "points", "bars"] = "line"
    dashed: bool = False
    """Predictions are dashed, and hollow as bars and points."""
    of: str = ""
    """Label of the series that this one predicts, whose colour it takes."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Series over one axis of numbers or of labels."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    labels: Sequence[str] | None = None
    """Names of places, where they are not numbers."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of words and numbers, for what is not a figure. A cell such as "worse" or "far" gets its colour."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()
    """Columns that are set to the right."""


def pick(figures: Iterable[Figure], metric: str, **case: Value) -> list[Figure]:
    """Return the figures of a metric whose cases hold these values."""
    return [f for f in figures if f.metric == metric and all(f.case.get(k) == v for k, v in case.items())]


def values(figures: Iterable[Figure], metric: str, **case: Value) -> list[float]:
    """Return the measured values of a metric, as pick finds them. What was not measured is left out."""
    return [f.measured for f in pick(figures, metric, **case) if f.measured is not None]


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: infinities and NaN become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
