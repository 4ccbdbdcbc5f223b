"""Compare two runs and tell changes from noise."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dsmini.report import units
from dsmini.report.figures import FOUND, Figure, Table
from dsmini.report.rows import case_words

Verdict = Literal["better", "worse", "changed", "unchanged", "new", "gone"]
FLOOR = 0.05
"""Relative difference of a time, rate, ratio or size below which it is unchanged: the noise between equal runs."""
ONCE_FLOOR = 0.5
"""The same for a time or a rate that was measured once, such as the time of an operation."""
FINE_FLOOR = 0.001
"""The same for a figure that does not depend on the clock, such as an error or a loss."""
RULE = (
    "A figure is unchanged if the 95 % intervals overlap, or if a time, rate or size differs by less than 5 %, or "
    "50 % if it was measured once. Counts are compared exactly."
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Values of one figure in both runs."""

    name: Figure
    """Figure of either run, for its question, metric, case and unit."""
    old: float | None
    new: float | None
    verdict: Verdict

    @property
    def factor(self) -> float | None:
        """New value over old value."""
        return self.new / self.old if self.old and self.new is not None else None

    @property
    def size(self) -> float:
        """Absolute logarithm of the factor, the same for twice and half."""
        if self.verdict in ("new", "gone"):
            return -1.0
        if self.old == self.new:
            return 0.0
        return abs(math.log(self.factor)) if self.factor is not None and self.factor > 0 else math.inf

    def as_json(self) -> dict[str, Any]:
        """Return the change as a part of the last line of a command."""
        name = self.name.as_json()
        figure = {key: name[key] for key in ("question", "case", "metric", "unit")}
        return figure | {"old": self.old, "new": self.new, "verdict": self.verdict}


def compare(old: Iterable[Figure], new: Iterable[Figure]) -> list[Change]:
    """Return every figure of either run, the largest changes first."""
    then, now = ({_identity(figure): figure for figure in figures} for figures in (old, new))
    changes = [_change(then.get(name), now.get(name)) for name in {**then, **now}]
    return sorted(changes, key=lambda c: (c.verdict == "unchanged", c.verdict in ("new", "gone"), -c.size))


def table(changes: Iterable[Change]) -> Table:
    """Return changes as a table of words."""
    columns = ("question", "case", "metric", "before", "now", "factor", "verdict")
    return Table(columns=columns, rows=[_words(change) for change in changes], numeric=columns[3:6])


def _words(change: Change) -> list[str]:
    figure = change.name
    numbers = [units.human(value, figure.unit, figure.exact) for value in (change.old, change.new)]
    factor = "" if change.factor is None else f"{change.factor:.2f} ×"  # noqa: RUF001
    return [figure.question, case_words(figure), units.words(figure.metric), *numbers, factor, change.verdict]


def _identity(figure: Figure) -> tuple[str, str, frozenset[tuple[str, object]]]:
    return figure.question, figure.metric, frozenset((k, v) for k, v in figure.case.items() if k not in FOUND)


def _value(figure: Figure | None) -> float | None:
    if figure is None:
        return None
    return figure.predicted if figure.measured is None else figure.measured


def _change(old: Figure | None, new: Figure | None) -> Change:
    name = new or old
    assert name is not None, "at least one run has the figure"
    verdict: Verdict = "new" if new else "gone"
    if old and new:
        verdict = _verdict(old, new)
    return Change(name=name, old=_value(old), new=_value(new), verdict=verdict)


def _verdict(old: Figure, new: Figure) -> Verdict:
    then, now = _value(old), _value(new)
    if then == now or (not new.exact and _is_noise(old, new)):
        return "unchanged"
    if then is None or now is None or new.better is None:
        return "changed"
    return "better" if (now > then) == (new.better == "higher") else "worse"


def _is_noise(old: Figure, new: Figure) -> bool:
    """Return True if the intervals touch, or the difference is below the floor."""
    then, now = _value(old), _value(new)
    if then is None or now is None:
        return False
    (low, high), (new_low, new_high) = _range(old, then), _range(new, now)
    if low <= new_high and new_low <= high and (low < high or new_low < new_high):
        return True
    # a share of the smaller value, so that twice and half count the same
    return abs(now - then) <= _floor(new) * min(abs(then), abs(now))


def _floor(figure: Figure) -> float:
    clock = figure.unit == "s" or figure.unit.endswith("/s")
    if clock and figure.low is None:
        return ONCE_FLOOR
    return FLOOR if clock or figure.unit in ("", "x", "bytes") else FINE_FLOOR


def _range(figure: Figure, value: float) -> tuple[float, float]:
    return value if figure.low is None else figure.low, value if figure.high is None else figure.high
