"""What a benchmark is: a question, cases that are measured one after the other, and figures that answer.

A question is a module of questions/ with

    QUESTION = Question(name="decode", title="How fast ...?", cases=..., finding=..., plots=...)

Its cases come from the setting alone, each with an estimate of its seconds; what a case yields are figures, predicted
beside measured. Findings and plots are made from figures, so that a report can be drawn again from a file of results.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from dsmini.measure.rates import Roofs
from dsmini.report.figures import Figure, Plot, Series, Value, pick

__all__ = ["Case", "Figure", "Plot", "Question", "Series", "Setting", "Value", "pick"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    quick: bool
    """Everything in two minutes on two cores."""
    device: torch.device
    dtype: torch.dtype
    roofs: Roofs
    """This machine's measured rates."""


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
    about: str = ""
    """Two or three sentences on how it is measured and what is simulated."""
