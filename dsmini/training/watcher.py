"""The hook of a watcher: a run tells it of every step, and says and records what it answers.

A watcher looks on. It changes no tensor and draws no random number, so that a run with one is bit for bit the run
without. `dsmini.diagnosis.watch` has the one of the command. It is there because a diagnosis reads training, and
training reads no diagnosis: the command knows both, and gives a run its watcher.
"""

from dataclasses import dataclass
from typing import Protocol

from dsmini.training.trainer import StepResult


@dataclass(frozen=True, kw_only=True)
class BindingChange:
    """A change of what binds a run."""

    binds: str
    """Data, Algorithm, Machine, or "" for nothing."""
    share: float | None
    """Share of what binds, such as the share of a step that waits; None for nothing."""
    sentence: str
    """The change for people, with its step and its figures."""


class Watcher(Protocol):
    """Whoever wants to see each step."""

    def see(self, step: StepResult) -> BindingChange | None:
        """Look at a step that was just done; return a change of what binds the run, if this step shows one."""
        ...
