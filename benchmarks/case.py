"""Parts of a question: the setting, its cases, and the maker of its figures.

The setting alone decides the cases. Each case has an estimate of its time and yields figures with prediction and
measurement. Findings and plots use figures alone, so a report can be drawn again from a file of results.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsmini.measure.rates import Roofs
from dsmini.measure.timing import spread
from dsmini.measure.workloads import dtype_name
from dsmini.report import Figure, Plot, Series, Value, pick, values

__all__ = ["Case", "Figure", "Figures", "Plot", "Series", "Setting", "Value", "cases_over", "pick", "values"]

REACHED = 0.5
"""Share of the peak rate that a model's products are assumed to reach in estimates of time."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that all cases share."""

    quick: bool
    """Small sizes, for all questions in two minutes on two cores."""
    device: torch.device
    dtype: torch.dtype
    roofs: Roofs
    """Measured rates of this machine."""
    text: Path | None = None
    """File that --text names, for the questions that read one."""
    peer_pythons: tuple[Path, ...] = ()
    """Pythons that --peer-python names, which may have other implementations."""
    out: Path = Path("results")
    """Folder of --out, for files that a question writes besides its figures."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Part of a question that is measured in one go and stays done when a run is interrupted."""

    key: str
    """Name within the question, with everything its figures depend on: "context=2048 dtype=bfloat16"."""
    seconds: float
    """Estimated seconds on any machine: rounds of fixed length, and setting up."""
    run: Callable[[], Iterable[Figure]]
    flops: float = 0.0
    """FLOPs of products that are not in seconds, because a slow machine takes longer for them."""
    dtype: torch.dtype | None = None
    """Dtype of these products, if not the setting's."""

    def estimate(self, setting: Setting) -> float:
        """Return the expected seconds on this machine."""
        peak = setting.roofs.peak.get(dtype_name(self.dtype or setting.dtype))
        return self.seconds + (self.flops / (REACHED * peak) if peak else 0.0)


def cases_over(
    key: str, points: Iterable[tuple[Any, ...]], seconds: float, measure: Callable[..., Iterable[Figure]]
) -> list[Case]:
    """Return a case for each point, whose values fill the key ("context={}") and are the last arguments of measure."""
    return [Case(key=key.format(*point), seconds=seconds, run=partial(measure, *point)) for point in points]


class Figures:
    """Maker of a question's figures, from the unit of each metric and from which end is better."""

    def __init__(
        self,
        question: str,
        higher: Mapping[str, str] | None = None,
        lower: Mapping[str, str] | None = None,
        neither: Mapping[str, str] | None = None,
    ) -> None:
        self.question = question
        ends = (("higher", higher), ("lower", lower), (None, neither))
        self.metrics = {name: (unit, better) for better, units in ends for name, unit in (units or {}).items()}

    def __call__(
        self, metric: str, case: Mapping[str, Value], measured: float | Sequence[float] | None = None, **values: Any
    ) -> Figure:
        """Return a figure, with the median and the quartiles of a sequence of measured values."""
        unit, better = self.metrics[metric]
        found = {**spread(measured)} if isinstance(measured, Sequence) else {"measured": measured}
        told: dict[str, Any] = {"unit": unit, "better": better, **found, **values}
        return Figure(question=self.question, case=case, metric=metric, **told)

    def left_out(self, metric: str, case: Mapping[str, Value], reason: str) -> Figure:
        """Return a figure that was not measured, with the reason."""
        return self(metric, case, note=f"left out: {reason}")
