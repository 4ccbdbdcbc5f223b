"""Heat maps: values over two axes of labels, as a table whose cells are shaded by value.

The page shades cells by style sheet, so that a heat map is light and dark, prints, and can be read and copied as text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsmini.report.figures import Table
from dsmini.report.units import NOTHING

LIGHTEST, DARKEST = 0.05, 0.47
"""Shade of the smallest and of the largest value, of 1. The text stays readable on it, in light and dark."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Values over two axes of labels."""

    title: str
    x: str
    """Name of the axis whose labels are columns."""
    y: str
    """Name of the axis whose labels are rows."""
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """Values by row and column; None where there is none."""
    cells: Sequence[Sequence[str]]
    """The same values in words."""
    caption: str = ""

    @property
    def shades(self) -> list[list[float | None]]:
        """Shade of each cell from 0 to 1: on a logarithmic scale where values span more than a factor of ten."""
        found = [v for row in self.values for v in row if v is not None and math.isfinite(v)]
        log = bool(found) and min(found) > 0 and max(found) > 10 * min(found)
        scaled = [math.log(v) if log else v for v in found]
        low, high = (min(scaled), max(scaled)) if scaled else (0.0, 0.0)

        def shade(value: float | None) -> float | None:
            if value is None or not math.isfinite(value):
                return None
            part = ((math.log(value) if log else value) - low) / (high - low) if high > low else 0.5
            return round(LIGHTEST + part * (DARKEST - LIGHTEST), 3)

        return [[shade(value) for value in row] for row in self.values]

    @property
    def lines(self) -> list[tuple[str, list[tuple[str, float | None]]]]:
        """Rows for the page: label, and for each cell its words and its shade."""
        shaded = zip(self.rows, self.cells, self.shades, strict=True)
        return [
            (label, [(word or NOTHING, shade) for word, shade in zip(words, row, strict=True)])
            for label, words, row in shaded
        ]

    def table(self) -> Table:
        """Return the same as a table without shades, for a terminal."""
        rows = [
            [label, *(word or NOTHING for word in words)] for label, words in zip(self.rows, self.cells, strict=True)
        ]
        return Table(columns=(f"{self.y} \\ {self.x}", *self.columns), rows=rows, numeric=self.columns)
