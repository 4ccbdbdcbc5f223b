"""Figures as rows of words, the same for terminal and page."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dsmini.report import units
from dsmini.report.figures import Figure, Value

NEAR, FAR = 1.1, 1.5
"""Factors between measurement and prediction: near below the first, far above the second."""
WIDEST = 4.0
"""Ratio at one end of its bar; the other end is the inverse."""
COLUMNS = ("predicted", "measured", "interval", "ratio")


@dataclass(frozen=True)
class Row:
    """One figure in words."""

    figure: Figure

    @property
    def cells(self) -> dict[str, str]:
        """Values of the case in words, by key."""
        return {key: units.shown(value) for key, value in self.figure.case.items()}

    @property
    def predicted(self) -> str:
        """Predicted value with its unit."""
        return units.human(self.figure.predicted, self.figure.unit, self.figure.exact)

    @property
    def measured(self) -> str:
        """Measured value with its unit."""
        return units.human(self.figure.measured, self.figure.unit, self.figure.exact)

    @property
    def interval(self) -> str:
        """Ends of the 95 % interval."""
        if self.figure.low is None or self.figure.high is None:
            return ""
        low, high = (units.human(end, self.figure.unit) for end in (self.figure.low, self.figure.high))
        same_unit = low.partition(" ")[2] == high.partition(" ")[2]
        return f"{low.partition(' ')[0] if same_unit else low} to {high}"

    @property
    def ratio(self) -> str:
        """Measured over predicted, such as 0.87; = or ≠ for an exact count."""
        ratio, equal = self.figure.ratio, self.figure.equal
        if equal is not None:
            return "=" if equal else "≠"
        if ratio is None:
            return ""
        return f"{ratio:.2f}" if 0.1 <= ratio < 100 else units.digits(ratio)

    @property
    def tone(self) -> str:
        """Name of the colour: near, off, far, equal, unequal; bound over a limit; none without a ratio."""
        ratio, equal = self.figure.ratio, self.figure.equal
        if equal is not None:
            return "equal" if equal else "unequal"
        if ratio is None or ratio <= 0:
            return "none"
        if self.figure.bound:
            return "bound"  # a limit may be far away
        off = max(ratio, 1 / ratio)
        if off <= NEAR:
            return "near"
        return "off" if off <= FAR else "far"

    @property
    def bar(self) -> tuple[float, float]:
        """Start and length of the ratio's bar in percent of its track, on a logarithmic scale."""
        ratio, share = self.figure.ratio, 0.0
        if ratio is not None and ratio > 0 and not self.figure.exact:
            share = 50 * max(-1.0, min(1.0, math.log(ratio) / math.log(WIDEST)))
        return round(50 + min(0.0, share), 2), round(abs(share), 2)


def case_words(figure: Figure, without: Collection[str] = ()) -> str:
    """Return a case in one line, without these keys."""
    return ", ".join(f"{units.words(k)} {units.shown(v)}" for k, v in figure.case.items() if k not in without)


def shared(figures: Sequence[Figure]) -> dict[str, Value]:
    """Return the keys and values that the cases of all figures have in common."""
    if len(figures) < 2:
        return {}
    return {k: v for k, v in figures[0].case.items() if all(str(f.case.get(k)) == str(v) for f in figures)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Figures whose cases have the same keys: one table of the page."""

    common: Mapping[str, str]
    """Values in words that all cases share, by key."""
    keys: Sequence[str]
    """Keys in which the cases differ, as columns on the left."""
    numeric: Sequence[str]
    """Keys whose values are all numbers."""
    columns: Sequence[str]
    """Columns of COLUMNS that have any text."""
    metrics: Mapping[str, Sequence[Row]]
    """Rows by metric."""


def groups(figures: Sequence[Figure]) -> list[Group]:
    """Return figures grouped by the keys of their cases, in their order."""
    by_keys: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        by_keys.setdefault(tuple(figure.case), []).append(figure)
    return [_group(found) for found in by_keys.values()]


def _group(figures: Sequence[Figure]) -> Group:
    common = shared(figures)
    keys = [key for key in figures[0].case if key not in common]
    metrics: dict[str, list[Row]] = {}
    for figure in figures:
        metrics.setdefault(figure.metric, []).append(Row(figure))
    filled = {c for rows in metrics.values() for r in rows for c in COLUMNS if getattr(r, c) not in ("", units.NOTHING)}
    if any(figure.note for figure in figures):
        filled.add("measured")  # the column has the number of the note
    return Group(
        common={key: units.shown(value) for key, value in common.items()},
        keys=keys,
        numeric=[key for key in keys if all(type(f.case[key]) in (int, float) for f in figures)],
        columns=[column for column in COLUMNS if column in filled],
        metrics=metrics,
    )
