"""Print sections of a report in a terminal."""

from collections.abc import Iterator, Sequence

import rich.table
from rich.console import Console
from rich.text import Text

from dsmini.console.messages import say
from dsmini.report.figures import Detail, Figure, Table, Toned
from dsmini.report.rows import tables

STYLES = {"near": "green", "equal": "green", "off": "yellow", "far": "red", "unequal": "bold red", "better": "green"}
STYLES |= {"worse": "red", "new": "cyan", "gone": "cyan", "changed": "yellow", "reproduced": "green"}
STYLES |= {"missed": "red", "fitted": "yellow", "misprint": "yellow", "worked out": "green", "follows": "green"}
LONGEST = 30
"""Number of figures of a question that a terminal shows; the page has all."""


def show_figures(console: Console, figures: Sequence[Figure]) -> None:
    """Print the first figures as tables, and why others were left out."""
    for table in tables(figures[:LONGEST]):
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
    """Print a table of words, in parts if it is too wide; colour cells that are names of colours, such as "worse"."""
    heading = Text(title, style="bold") if title else Text(table.common, style="dim")
    for columns in _parts(table, console.width):
        console.print()
        rows = [[_cell(cells[i]) for i in columns] for cells in table.rows]
        _print(console, heading, [table.columns[i] for i in columns], table.numeric, rows)


def _cell(cell: str) -> Text:
    return Text(cell, STYLES.get(cell.tone if isinstance(cell, Toned) else cell, ""))


def _parts(table: Table, width: int) -> Iterator[list[int]]:
    """Yield the columns of each part: all where one can wrap, else the first with as many as there is room for."""
    others, wraps = list(range(1, len(table.columns))), {*table.columns[1:]} - {*table.numeric}
    widths = [max(len(cells[i]) for cells in [table.columns, *table.rows]) + 2 for i in [0, *others]]
    label = max(map(len, [*table.columns[0].split(), *(cells[0] for cells in table.rows)])) + 2
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
    """Print a table; numeric columns and `whole` ones are not wrapped."""
    table = rich.table.Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        right = name in numeric
        kept = right or name in whole
        table.add_column(name, header_style="dim", justify="right" if right else "left", no_wrap=kept, overflow="fold")
    for cells in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    console.print(table)
