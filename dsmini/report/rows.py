"""Figures as rows of words. The terminal and the page show the same rows."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dsmini.report import units
from dsmini.report.figures import Figure, Value

NEAR, FAR = 1.1, 1.5
"""A prediction within a tenth is near, and beyond half as much again it is far off."""
WIDEST = 4.0
"""The bar of a ratio ends at 4 and at a quarter."""
COLUMNS = ("predicted", "measured", "spread", "ratio")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure in words."""

    figure: Figure
    cells: Mapping[str, str]
    """Words of the case, by key."""
    predicted: str
    measured: str
    spread: str
    """Half the range of the quartiles, as a share of the measured value."""
    ratio: str
    """Measured over predicted: 0.87, or = and ≠ of an exact count."""
    tone: str
    """near, off, far, equal, unequal; none where there is nothing to compare."""

    @property
    def bar(self) -> tuple[float, float]:
        """Start and length of the ratio's bar in percent of its track. Twice and half are as far from the middle."""
        ratio, share = self.figure.ratio, 0.0
        if ratio is not None and ratio > 0 and not self.figure.exact:
            share = 50 * max(-1.0, min(1.0, math.log(ratio) / math.log(WIDEST)))
        return round(50 + min(0.0, share), 2), round(abs(share), 2)


def row(figure: Figure) -> Row:
    """Return a figure in words."""
    return Row(
        figure=figure,
        cells={key: units.shown(value) for key, value in figure.case.items()},
        predicted=units.human(figure.predicted, figure.unit, figure.exact),
        measured=units.human(figure.measured, figure.unit, figure.exact),
        spread=_spread(figure),
        ratio=_ratio(figure),
        tone=_tone(figure),
    )


def _spread(figure: Figure) -> str:
    if figure.low is None or figure.high is None or not figure.measured:
        return ""
    share = (figure.high - figure.low) / 2 / abs(figure.measured)
    return f"±{share:.{1 if share < 0.1 else 0}%}".replace("%", " %")


def _ratio(figure: Figure) -> str:
    if figure.equal is not None:
        return "=" if figure.equal else "≠"
    if figure.ratio is None:
        return ""
    return f"{figure.ratio:.2f}" if 0.1 <= figure.ratio < 100 else units.digits(figure.ratio)


def _tone(figure: Figure) -> str:
    if figure.equal is not None:
        return "equal" if figure.equal else "unequal"
    if figure.ratio is None or figure.ratio <= 0:
        return "none"
    off = max(figure.ratio, 1 / figure.ratio)
    if off <= NEAR:
        return "near"
    return "off" if off <= FAR else "far"


def case_words(figure: Figure, without: Collection[str] = ()) -> str:
    """Return a case on one line, without these keys."""
    return ", ".join(f"{units.words(k)} {units.shown(v)}" for k, v in figure.case.items() if k not in without)


def shared(figures: Sequence[Figure]) -> dict[str, Value]:
    """Return what the cases of several figures have in common."""
    if len(figures) < 2:
        return {}
    return {k: v for k, v in figures[0].case.items() if all(str(f.case.get(k)) == str(v) for f in figures)}


@dataclass(frozen=True)
class Group:
    """Figures whose cases vary in the same things: a table of the page."""

    figures: Sequence[Figure]

    @cached_property
    def common(self) -> dict[str, str]:
        """Words of what all cases share, by key."""
        return {key: units.shown(value) for key, value in shared(self.figures).items()}

    @property
    def keys(self) -> list[str]:
        """Keys in which the cases differ, the columns on the left."""
        return [key for key in self.figures[0].case if key not in self.common]

    @property
    def numeric(self) -> list[str]:
        """Those of the keys that hold numbers alone."""
        values = {key: [f.case[key] for f in self.figures] for key in self.keys}
        return [
            k
            for k, vs in values.items()
            if all(isinstance(v, int | float) and v is not True and v is not False for v in vs)
        ]

    @property
    def columns(self) -> list[str]:
        """Those of COLUMNS that any figure fills."""
        found = {column for r in self.rows for column in COLUMNS if getattr(r, column) not in ("", units.NOTHING)}
        if any(f.note for f in self.figures):
            found.add("measured")  # the note's number stands there
        return [column for column in COLUMNS if column in found]

    @cached_property
    def rows(self) -> list[Row]:
        """All figures in words."""
        return [row(figure) for figure in self.figures]

    @property
    def metrics(self) -> dict[str, list[Row]]:
        """Rows by metric, in the order in which they came."""
        return {
            m: [r for r in self.rows if r.figure.metric == m] for m in dict.fromkeys(f.metric for f in self.figures)
        }


def groups(figures: Sequence[Figure]) -> list[Group]:
    """Return figures by the keys of their cases, in the order in which they came."""
    keys = dict.fromkeys(tuple(figure.case) for figure in figures)
    return [Group([f for f in figures if tuple(f.case) == key]) for key in keys]
