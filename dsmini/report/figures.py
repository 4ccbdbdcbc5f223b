"""The things that a report shows: figures, and plots of series."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Value = str | int | float | bool
FOUND = {"intensity", "calls"}
"""Keys of a case that are measured too: they do not name a figure."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a question: what was measured, what was predicted, or both."""

    question: str
    case: Mapping[str, Value]
    """What was varied, such as {"context": 2048, "attention": "mla"}; with question and metric it names the figure,
    but for keys of FOUND."""
    metric: str
    """Such as tokens_per_s, bytes_per_token."""
    unit: str
    """Such as tokens/s, bytes, s, FLOP/s, or "" for a share."""
    measured: float | None = None
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    """The quartiles of what was measured several times."""
    better: Literal["higher", "lower"] | None = None
    exact: bool = False
    """Predicted and measured must be equal: a count, not a time."""
    bound: bool = False
    """Predicted is a limit, such as a roof, and not what is expected."""
    note: str = ""
    """What a reader must know, such as what is simulated."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        if self.measured is None or not self.predicted:
            return None
        return self.measured / self.predicted


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or cloud of points, of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["line", "points", "bars"] = "line"
    """With Plot.labels x is the place of a label, 0 the first; left empty: one after the other."""
    dashed: bool = False
    """Predictions are dashed."""
    names: Sequence[str] | None = None
    """Of points, shown beside them where there are few."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    labels: Sequence[str] | None = None
    caption: str = ""


def pick(figures: Iterable[Figure], metric: str, **case: Value) -> list[Figure]:
    """The figures of a metric whose cases hold these values."""
    return [f for f in figures if f.metric == metric and all(f.case.get(k) == v for k, v in case.items())]
