"""Draw the figures of figures.toml: python docs/figures.py [FOLDER]

A box has a name of the code, its shape in the letters of dsmini, and the same with the sizes of a published model.
tests/docs/test_figures.py compares the shapes with those of a small model's tensors of these names.
"""

import math
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from dsmini import ModelConfig

ROOT = Path(__file__).parents[1]
FIGURES = tomllib.loads((ROOT / "docs" / "figures.toml").read_text())
FOLDER = ROOT / "docs" / "figures"
WIDTH, HEIGHT, COLUMN, ROW, LEFT, TOP = 172, 70, 186, 100, 35, 72
"""Sizes of a box, distances from column to column and row to row, and the place of the first box, in pixels."""
COLORS = {
    "plain": ("#eceff1", "#546e7a"),
    "query": ("#e3f2fd", "#1976d2"),
    "cached": ("#e8f5e9", "#2e7d32"),
    "choice": ("#f3e5f5", "#7b1fa2"),
    "expert": ("#fff3e0", "#ef6c00"),
}
EXPERT_COLORS = ("#1976d2", "#ef6c00", "#2e7d32", "#7b1fa2")
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height:g}" width="800" height="{height:g}" \
font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#263238" role="img" aria-label="{title}">
<title>{title}</title>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0 L8 4 L0 8 z" fill="#37474f"/></marker></defs>
<rect x="1" y="1" width="798" height="{frame:g}" rx="10" fill="#ffffff" stroke="#cfd8dc"/>"""


class Box(NamedTuple):
    """A tensor; figures.toml explains its fields."""

    name: str
    note: str
    axes: str
    where: str
    column: float
    row: float
    made_of: str
    kind: str


class Panel(NamedTuple):
    """A frame around boxes."""

    name: str
    column: float
    row: float
    last_column: float
    last_row: float
    made_of: str


def boxes_of(figure: Mapping[str, Any]) -> list[Box]:
    """Return the boxes of a figure of figures.toml."""
    return [Box(*row) for row in figure["boxes"]]


def length(axis: str, sizes: Mapping[str, int]) -> str:
    """Return the length of an axis: of c+r it is 576, and of n*k with an unknown n it is n*8."""
    numbers = re.sub("[a-z]", lambda letter: str(sizes.get(letter[0], letter[0])), axis)
    if re.search("[a-z]", numbers):
        return numbers
    return str(sum(math.prod(map(int, term.split("*"))) for term in numbers.split("+")))


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Return an element with words."""
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def draw_box(box: Box, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield the elements of a box: its name, how it is computed, and its shape twice."""
    x, y, (fill, edge) = LEFT + COLUMN * box.column, TOP + ROW * box.row, COLORS[box.kind]
    letters = ", ".join(axis.replace("+", " + ") for axis in box.axes.split())
    numbers = ", ".join(length(axis, sizes) for axis in box.axes.split())
    yield f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="{edge}"/>'
    yield text(x + 8, y + 17, box.name, 'font-weight="bold"')
    yield text(x + 8, y + 33, box.note, 'font-size="12" fill="#546e7a"')
    yield text(x + 8, y + 48, f"[{letters}]")
    yield text(x + 8, y + 63, f"[{numbers}]")


def draw_panel(panel: Panel) -> Iterator[str]:
    """Yield a frame and its title."""
    x, y = LEFT + COLUMN * panel.column - 5, TOP + ROW * panel.row - 24
    width = COLUMN * (panel.last_column - panel.column) + WIDTH + 10
    height = ROW * (panel.last_row - panel.row) + HEIGHT + 30
    yield f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="#fafafa" stroke="#b0bec5"/>'
    yield text(x + 10, y + 16, panel.name, 'font-weight="bold" fill="#546e7a"')


def draw_arrow(start: Box, end: Box | Panel, boxes: list[Box]) -> str:
    """Return an arrow from below a box to the top of the next, or sideways in a row.

    Its corner is above the end, or where another box is in the way, below the start.
    """
    x, y = LEFT + COLUMN * start.column + WIDTH / 2, TOP + ROW * start.row + HEIGHT
    last = end.last_column if isinstance(end, Panel) else end.column
    to_x, to_y = LEFT + COLUMN * (end.column + last) / 2 + WIDTH / 2, TOP + ROW * end.row
    if start.row == end.row:
        side = WIDTH / 2 if end.column < start.column else -WIDTH / 2
        return f'<path d="M{x - side:g} {y - HEIGHT / 2:g}H{to_x + side:g}"/>'
    to_y -= 24 if isinstance(end, Panel) else 0
    in_the_way = any(abs(box.column - start.column) < 0.9 and start.row < box.row < end.row for box in boxes)
    corner = y + 15 if in_the_way else to_y - 15
    return f'<path d="M{x:g} {y:g}V{corner:g}H{to_x:g}V{to_y:g}"/>'


def draw_pairs(pairs: list[tuple[int, int]], x: float, y: float, title: str) -> Iterator[str]:
    """Yield a row of squares, each with the number of a token in the color of an expert."""
    yield text(x, y - 8, title, 'fill="#546e7a"')
    for i, (token, expert) in enumerate(pairs):
        yield f'<rect x="{x + 30 * i:g}" y="{y:g}" width="28" height="28" rx="3" fill="{EXPERT_COLORS[expert]}"/>'
        yield text(x + 30 * i + 14, y + 19, str(token), 'fill="#ffffff" font-weight="bold" text-anchor="middle"')


def draw(figure: Mapping[str, Any]) -> str:
    """Return a figure of figures.toml as SVG."""
    config = ModelConfig.from_file(ROOT / "configs" / figure["config"])
    sizes = {axis: getattr(config, field) for axis, field in figure["axes"].items()}
    boxes, panels = boxes_of(figure), [Panel(*row) for row in figure["panels"]]
    arrows, made = [], {}
    for box in boxes:  # a name is that of the last box above that has it
        arrows += [draw_arrow(made[name], box, boxes) for name in box.made_of.split()]
        made[box.name] = box
    for panel in panels:
        arrows += [draw_arrow(made[name], panel, boxes) for name in panel.made_of.split()]
    y, squares = TOP + ROW * max(box.row for box in boxes) + HEIGHT + 20, []
    if "chosen" in figure:
        pairs = [(token, expert) for token, experts in enumerate(figure["chosen"]) for expert in experts]
        squares += draw_pairs(pairs, LEFT, y + 34, "five tokens; a color for each of their experts")
        squares += draw_pairs(sorted(pairs, key=lambda pair: pair[1]), LEFT + 400, y + 34, "sorted by expert")
        y += 84
    elements = [
        HEAD.format(title=escape(figure["title"]), height=y, frame=y - 2),
        text(20, 28, figure["title"], 'font-size="16" font-weight="bold"'),
        text(20, 48, figure["note"], 'fill="#546e7a"'),
        *(element for panel in panels for element in draw_panel(panel)),
        f'<g fill="none" stroke="#37474f" stroke-width="1.3" marker-end="url(#tip)">{"".join(arrows)}</g>',
        *(element for box in boxes for element in draw_box(box, sizes)),
        *squares,
        "</svg>\n",
    ]
    return "\n".join(elements)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw(figure))
