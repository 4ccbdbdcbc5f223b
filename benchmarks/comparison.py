"""Compare two runs and tell changes from noise."""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

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


class Change(NamedTuple):
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
        """Absolute logarithm of the factor, the same for twice and half; the least for a figure of one run alone."""
        if self.verdict in ("new", "gone"):
            return -math.inf
        return abs(math.log(self.factor)) if self.factor is not None and self.factor > 0 else math.inf

    def as_json(self) -> dict[str, Any]:
        """Return the change as a part of the last line of a command."""
        name = self.name.as_json()
        figure = {key: name[key] for key in ("question", "case", "metric", "unit")}
        return figure | {"old": self.old, "new": self.new, "verdict": self.verdict}


def compare(old: Iterable[Figure], new: Iterable[Figure]) -> list[Change]:
    """Return every figure of either run, the largest changes first."""
    then, now = ({_identity(figure): figure for figure in figures} for figures in (old, new))
    changes = []
    for place in {**then, **now}:
        before, after = then.get(place), now.get(place)
        if before is None or after is None:
            verdict: Verdict = "gone" if after is None else "new"
        else:
            verdict = _verdict(before, after)
        changes.append(Change(now.get(place) or then[place], _value(before), _value(after), verdict))
    return sorted(changes, key=lambda c: (c.verdict == "unchanged", -c.size))


def table(changes: Iterable[Change]) -> Table:
    """Return changes as a table of words."""
    columns = ("question", "case", "metric", "before", "now", "factor", "verdict")
    rows = []
    for name, *values, verdict in changes:
        numbers = [units.human(value, name.unit, name.exact) for value in values]
        old, new = values
        factor = f"{new / old:.2f} ×" if old and new is not None else ""  # noqa: RUF001
        rows.append([name.question, case_words(name), units.words(name.metric), *numbers, factor, verdict])
    return Table(columns=columns, rows=rows, numeric=columns[3:6])


def _identity(figure: Figure) -> tuple[str, str, frozenset[tuple[str, object]]]:
    return figure.question, figure.metric, frozenset((k, v) for k, v in figure.case.items() if k not in FOUND)


def _value(figure: Figure | None) -> float | None:
    if figure is None:
        return None
    return figure.predicted if figure.measured is None else figure.measured


def _verdict(old: Figure, new: Figure) -> Verdict:
    then, now = _value(old), _value(new)
    if then == now:
        return "unchanged"
    if then is None or now is None:
        return "changed"
    if not new.exact and _is_noise(old, new, then, now):
        return "unchanged"
    if new.better is None:
        return "changed"
    return "better" if (now > then) == (new.better == "higher") else "worse"


def _is_noise(old: Figure, new: Figure, then: float, now: float) -> bool:
    """Return True if the intervals touch, or the difference is below the floor."""
    ends = [
        (value if f.low is None else f.low, value if f.high is None else f.high)
        for f, value in ((old, then), (new, now))
    ]
    (low, high), (new_low, new_high) = ends
    if low <= new_high and new_low <= high and (low < high or new_low < new_high):
        return True
    clock = new.unit == "s" or new.unit.endswith("/s")
    floor = FLOOR if clock or new.unit in ("", "x", "bytes") else FINE_FLOOR
    floor = ONCE_FLOOR if clock and new.low is None else floor
    # a share of the smaller value, so that twice and half count the same
    return abs(now - then) <= floor * min(abs(then), abs(now))
