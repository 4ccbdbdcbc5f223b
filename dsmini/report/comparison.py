"""What changed between two files of results, and what is only noise."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dsmini.report.figures import FOUND, Figure

Verdict = Literal["better", "worse", "changed", "unchanged", "new", "gone"]
FLOOR = 0.05
"""A time, a rate, a ratio or memory that differs by less is unchanged: runs of one commit differ by as much."""
ONCE_FLOOR = 0.5
"""For a time or a rate that was measured once, such as an operation's."""
FINE_FLOOR = 0.001
"""For what does not depend on the clock, such as an error or a loss."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure, then and now."""

    name: Figure
    """Either of the two: for its question, metric, case and unit."""
    old: float | None
    new: float | None
    verdict: Verdict

    @property
    def factor(self) -> float | None:
        """New over old."""
        return self.new / self.old if self.old and self.new is not None else None

    @property
    def size(self) -> float:
        """How far the factor is from 1, the same for twice and half."""
        if self.verdict in ("new", "gone"):
            return -1.0
        if self.old == self.new:
            return 0.0
        return abs(math.log(self.factor)) if self.factor is not None and self.factor > 0 else math.inf


def compare(old: Iterable[Figure], new: Iterable[Figure]) -> list[Change]:
    """Every figure of either, what changed first, by size."""
    then, now = ({_identity(figure): figure for figure in figures} for figures in (old, new))
    changes = [_change(then.get(name), now.get(name)) for name in {**then, **now}]
    return sorted(changes, key=lambda c: (c.verdict == "unchanged", c.verdict in ("new", "gone"), -c.size))


def _identity(figure: Figure) -> tuple[str, str, frozenset[tuple[str, object]]]:
    return figure.question, figure.metric, frozenset((k, v) for k, v in figure.case.items() if k not in FOUND)


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.predicted if figure.measured is None else figure.measured


def _change(old: Figure | None, new: Figure | None) -> Change:
    name = new or old
    assert name is not None
    verdict = "new" if old is None else "gone" if new is None else _verdict(old, new)
    return Change(name=name, old=_value(old), new=_value(new), verdict=verdict)


def _verdict(old: Figure, new: Figure) -> Verdict:
    then, now = _value(old), _value(new)
    if then == now or (not new.exact and _is_noise(old, new)):
        return "unchanged"
    if then is None or now is None or new.better is None:
        return "changed"
    return "better" if (now > then) == (new.better == "higher") else "worse"


def _is_noise(old: Figure, new: Figure) -> bool:
    """Whether the quartile ranges touch, or the difference is below the floor."""
    then, now = _value(old), _value(new)
    if then is None or now is None:
        return False
    (low, high), (new_low, new_high) = _range(old, then), _range(new, now)
    if low <= new_high and new_low <= high and (low < high or new_low < new_high):
        return True
    clock = new.unit == "s" or new.unit.endswith("/s")
    floor = (
        ONCE_FLOOR if clock and new.low is None else FLOOR if clock or new.unit in ("", "x", "bytes") else FINE_FLOOR
    )
    # of the smaller of the two: twice and half are as far
    return abs(now - then) <= floor * min(abs(then), abs(now))


def _range(figure: Figure, value: float) -> tuple[float, float]:
    return value if figure.low is None else figure.low, value if figure.high is None else figure.high
