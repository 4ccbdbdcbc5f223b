"""What a benchmark is: a question, cases that are measured one after the other, and figures that answer.

A question is a module of questions/ with

    QUESTION = Question(name="decode", title="How fast ...?", cases=..., finding=..., plots=...)

Its cases come from the setting alone, each with an estimate of its seconds; what a case yields are figures, predicted
beside measured. Findings and plots are made from figures, so that a report can be drawn again from a file of results.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dsmini.measure.rates import Roofs

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


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    quick: bool
    """Everything in two minutes on two cores."""
    device: torch.device
    dtype: torch.dtype
    roofs: Roofs
    """This machine's measured rates."""
    text: Path | None = None
    """File that --text names, for the questions that read one."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A part of a question that is measured in one go: what is done stays done when a run is interrupted."""

    key: str
    """Names the case within its question and all that its figures depend on, such as "context=2048 dtype=bfloat16"."""
    seconds: float
    """Estimated."""
    run: Callable[[], Iterable[Figure]]


@dataclass(frozen=True, kw_only=True)
class Question:
    name: str
    """As in python -m benchmarks NAME."""
    title: str
    cases: Callable[[Setting], list[Case]]
    finding: Callable[[list[Figure]], str]
    """One sentence, from figures that may be incomplete."""
    plots: Callable[[list[Figure]], list[Plot]]
    needs: str | None = None
    """Why it cannot run here, such as a package that is not installed; None if it can."""
    on_request: bool = False
    """Left out of a run that names no questions, because it takes long."""
    needs_text: str = ""
    """The text that --text must name for it, in words; empty if it reads none."""
    about: str = ""
    """Two or three sentences on how it is measured and what is simulated."""


def pick(figures: Iterable[Figure], metric: str, **case: Value) -> list[Figure]:
    """The figures of a metric whose cases hold these values."""
    return [f for f in figures if f.metric == metric and all(f.case.get(k) == v for k, v in case.items())]
