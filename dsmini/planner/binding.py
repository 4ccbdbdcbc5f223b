"""Binding: which resource limits a step on a machine, by how much, and which one is next.

Where the parts of a step overlap (serving), it takes as long as the slowest one, which binds. Making another one
faster gains nothing; making the binding one faster gains at most its ratio to the second, which begins to bind then.
The parts of a training step run one after the other, and some hide others, so the step is computed again without each
part: what binds is the part whose absence gains most.

Worked example: 14 ms on links, 7 ms in memory, 2 ms of compute. Links bind, 2 times the memory's time. Links that are
three times as fast give a step of 7 ms, not 4.7, since memory binds then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Axis(Enum):
    """Word of a verdict: what to change."""

    DATA = "Data"
    ALGORITHM = "Algorithm"
    MACHINE = "Machine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """Resource that binds, and the one that binds next."""

    first: str
    second: str
    """ "" where the first one takes all of the time."""
    ratio: float
    """Largest speedup of a step, if the first took no time."""


def overlapping(times: Mapping[str, Any], ratio: Any) -> Binding:
    """Return what binds of times that overlap, by their words."""
    first, second, *_ = sorted(times, key=lambda words: -float(times[words]))
    return Binding(first=first, second=second if float(times[second]) else "", ratio=float(ratio))


def in_turn(step: Any, without: Mapping[str, Any], ratio: Any) -> Binding:
    """Return what binds of parts one after the other, from the step's time without each of them."""
    first, second, *_ = sorted(without, key=lambda words: float(without[words]))
    return Binding(first=first, second=second if without[second] < step else "", ratio=float(ratio))
