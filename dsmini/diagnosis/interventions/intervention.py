"""An intervention: a change to a subject that makes one thing free, and the reason where it does not apply."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from dsmini.planner.binding import Axis

Step = Callable[[float], float]
"""Takes one step; is told the seconds of this round's plain step, and returns the seconds with the thing made free."""


class Timed(Protocol):
    """A step that was taken."""

    @property
    def seconds(self) -> float: ...


TakenStep = TypeVar("TakenStep", bound=Timed, covariant=True)


class StepSubject(Protocol[TakenStep]):
    """Work that is taken step by step, each as long as the others."""

    @property
    def device(self) -> torch.device: ...

    def step(self) -> TakenStep:
        """Take one step."""
        ...


S = TypeVar("S", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class MadeFree:
    """One thing made free, in words."""

    name: str
    axis: Axis
    words: str
    """The change in words, as in "replay one batch"."""
    action: str
    """Advice for work in which it gains, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Intervention(MadeFree, Generic[S]):
    """A change that can be made and taken back."""

    why_not: Callable[[S], str | None]
    """Returns why it does not apply to a subject; None if it does."""
    apply: Callable[[S], AbstractContextManager[Step]]
    """Changes the subject until the context ends."""
