"""Figures as tables of words, the same for terminal and page, and tables in a terminal."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import rich.table
from rich.console import Console
from rich.text import Text

from dsmini.console.messages import say
from dsmini.report import units
from dsmini.report.figures import Detail, Figure, Table, Toned, Value

NEAR, FAR = 1.1, 1.5
"""Factors between measurement and prediction: near below the first, far above the second."""
WIDEST = 4.0
"""Ratio at one end of its bar; the other end is the inverse."""
MEASURED = ("predicted", "measured", "95 % interval", "measured / predicted")
STYLES = {"near": "green", "equal": "green", "off": "yellow", "far": "red", "unequal": "bold red", "missed": "red"}
STYLES |= {"reproduced": "green", "follows": "green", "fitted": "yellow", "misprint": "yellow"}
LABEL = 24
"""Width to which labels of rows may be wrapped, so that more columns have room."""
NARROWEST = 12
"""Least width that is left for a column that is wrapped: less has a letter a line."""
LONGEST = 30
"""Number of figures of a question that a terminal shows; the page has all."""


def interval(figure: Figure) -> str:
    """Return the ends of the 95 % interval; "" without one."""
    if figure.low is None or figure.high is None:
        return ""
    return units.span(figure.low, figure.high, figure.unit)


def ratio(figure: Figure) -> Toned:
    """Return measured over predicted, such as 0.87, or = or ≠ for an exact count; how far off it is, and its bar."""
    found, equal = figure.ratio, figure.equal
    if equal is not None:
        return Toned("=", "equal") if equal else Toned("≠", "unequal")
    if found is None:
        return Toned("", "none")
    words = f"{found:.2f}" if 0.1 <= found < 100 else units.digits(found)
    if found <= 0:
        return Toned(words, "none")
    off = max(found, 1 / found)
    tone = "near" if off <= NEAR else "off" if off <= FAR else "far"
    share = 50 * max(-1.0, min(1.0, math.log(found) / math.log(WIDEST)))
    # a limit may be far away
    return Toned(words, "bound" if figure.bound else tone, (round(50 + min(0.0, share), 2), round(abs(share), 2)))


def case_words(figure: Figure, without: Collection[str] = ()) -> str:
    """Return a case in one line, without these keys."""
    return ", ".join(f"{units.words(k)} {units.shown(v)}" for k, v in figure.case.items() if k not in without)


def shared(figures: Sequence[Figure]) -> dict[str, Value]:
    """Return the keys and values that the cases of all figures have in common."""
    if len(figures) < 2:
        return {}
    return {k: v for k, v in figures[0].case.items() if all(str(f.case.get(k)) == str(v) for f in figures)}


def tables_of(figures: Sequence[Figure], notes: Sequence[str] = ()) -> list[Table]:
    """Return figures as tables, one for all whose cases have the same keys.

    Args:
        notes: sentences of which a measured value has the number.
    """
    by_keys: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        by_keys.setdefault(tuple(figure.case), []).append(figure)
    return [_table(found, notes) for found in by_keys.values()]


def _table(figures: Sequence[Figure], notes: Sequence[str]) -> Table:
    common = shared(figures)
    keys = [key for key in figures[0].case if key not in common]
    rows: list[list[str]] = []
    for f in figures:
        number = f" ({notes.index(f.note) + 1})" if f.note in notes else ""
        said, got = (units.human(value, f.unit, f.exact) for value in (f.predicted, f.measured))
        case = [units.shown(f.case[key]) for key in keys]
        rows.append([*case, units.words(f.metric), said, f"{got}{number}", interval(f), ratio(f)])
    numbers = [units.words(key) for key in keys if all(type(f.case[key]) in (int, float) for f in figures)]
    table = Table(
        columns=[*map(units.words, keys), "metric", *MEASURED],
        rows=rows,
        numeric=(*numbers, *MEASURED[:-1]),
        common=case_words(replace(figures[0], case=common)),
    )
    filled = [i for i, name in enumerate(table.columns) if name not in MEASURED or _any_in(rows, i)]
    return replace(
        table, columns=[table.columns[i] for i in filled], rows=[[row[i] for i in filled] for row in table.rows]
    )


def _any_in(rows: Sequence[Sequence[str]], column: int) -> bool:
    return any(row[column] not in ("", units.NOTHING) for row in rows)


# --- in a terminal


def show_figures(console: Console, figures: Sequence[Figure]) -> None:
    """Print the first figures as tables, and why others were left out."""
    for table in tables_of(figures[:LONGEST]):
        show_table(console, table)
    if len(figures) > LONGEST:
        say(console, f"... and {len(figures) - LONGEST} more, in the report", style="dim")
    for note in dict.fromkeys(f.note for f in figures if f.measured is None and f.note.startswith("left out")):
        say(console, note, style="yellow")


def show_details(console: Console, title: str, details: Sequence[Detail]) -> None:
    """Print numbers with their names, by which their computation can be asked for."""
    console.print()
    rows = [(d.title, d.value, d.name) for d in details]
    _print(console, Text(title, style="bold"), ("figure", "value", "name"), ("value",), rows, whole=("name",))


def show_table(console: Console, table: Table, title: str = "") -> None:
    """Print a table of words, in parts if it is too wide, with the colours of its cells."""
    heading = Text(title, style="bold") if title else Text(table.common, style="dim")
    for columns in _parts(table, console.width):
        console.print()
        rows = [[_cell(cells[i]) for i in columns] for cells in table.rows]
        _print(console, heading, [table.columns[i] for i in columns], table.numeric, rows)


def _cell(cell: str) -> Text:
    return Text(cell, STYLES.get(cell.tone, "") if isinstance(cell, Toned) else "")


def _parts(table: Table, width: int) -> Iterator[list[int]]:
    """Yield the columns of each part: all where one can wrap, else the first with as many as there is room for."""
    others, wraps = list(range(1, len(table.columns))), {*table.columns[1:]} - {*table.numeric}
    widths = [max(len(cells[i]) for cells in [table.columns, *table.rows]) + 2 for i in [0, *others]]
    words = [word for text in [table.columns[0], *(cells[0] for cells in table.rows)] for word in text.split()]
    label = min(widths[0], max(LABEL, *map(len, words)) + 2)
    while others:
        fit = [n for n in range(1, len(others) + 1) if wraps or label + sum(widths[i] for i in others[:n]) <= width]
        yield [0, *others[: max(fit, default=1)]]
        others = others[max(fit, default=1) :]


def _print(
    console: Console,
    title: Text,
    columns: Sequence[str],
    numeric: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    whole: Sequence[str] = (),
) -> None:
    """Print a table; numeric columns and `whole` ones are not wrapped where the others have room."""
    table = rich.table.Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    widths = {name: max(map(len, cells)) + 2 for name, *cells in zip(columns, columns, *rows, strict=True)}
    for kept in ({*numeric, *whole}, {*numeric}, set[str]()):
        if sum(wide if name in kept else min(wide, NARROWEST) for name, wide in widths.items()) <= console.width:
            break
    for name in columns:
        how: dict[str, Any] = {"no_wrap": name in kept, "justify": "right" if name in numeric else "left"}
        table.add_column(name, header_style="dim", overflow="fold", **how)
    for cells in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    console.print(table)
