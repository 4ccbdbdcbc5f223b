"""An intervention: a change to a subject that makes one thing free, and the reason where it does not apply."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dsmini.diagnosis.subject import Subject
from dsmini.planner.binding import Axis

Step = Callable[[float], float]
"""Takes one step; is told the seconds of this round's plain step, and returns the seconds with the thing made free."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change that makes one thing free."""

    name: str
    axis: Axis
    words: str
    """The change in words, for people, as in "replay one batch"."""
    action: str
    """Advice where it gains, in one sentence."""
    why_not: Callable[[Subject], str | None]
    """Returns why it does not apply to a subject; None if it does."""
    apply: Callable[[Subject], AbstractContextManager[Step]]
    """Changes the subject until the context ends."""
