"""Figures: numbers with a unit, the formula that they were computed by, and a source; and their explanation in words.

    row = Figure(2 * 576, "B", "2 * (kv_lora_rank + qk_rope_head_dim)")
    cache = Figure(n_layers * row, "B/token", "n_layers * cache_row")

A figure is a float, so formulas are plain Python. The text of a formula stands next to it, and names other figures and
inputs; a test computes every text and compares. An input has no formula, and its source says where it comes from.

Units are base units, without prefixes: B, FLOP, s, token, $, and their quotients. In words a prefix is a power of
1000: a GB is 1e9 B. A computed figure has three digits, an input up to six, as it was given. Whole counts stay whole.

An explanation has the figure that was asked for first, then each figure that it needs, once, then the inputs:

    kv_cache: Cache of a token, all layers
      = n_layers × cache_row
      = 61 × 1.152 kB
      = 70.3 kB/token (70,272 B/token)
      source: V2, table 1
"""  # noqa: RUF002

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsmini.report.units import human, is_whole, plural_of

NAME = re.compile(r"(?<![\w.])[a-z_][a-z_0-9]*(?![a-z_0-9]*\()")
"""Name in a formula that is not of a function."""


class Figure(float):
    """Number that knows its unit, its formula in names, its title and its source; an input has no formula.

    A class whose attributes are figures lists their titles and sources in its docstring.
    """

    __slots__ = ("formula", "source", "title", "unit")
    unit: str
    formula: str
    title: str
    source: str

    def __new__(cls, value: float, unit: str, formula: str, title: str = "", source: str = "") -> "Figure":
        made = super().__new__(cls, value)
        made.unit, made.formula, made.title, made.source = unit, formula, title, source
        return made

    @property
    def names(self) -> list[str]:
        """Names of the figures and inputs in the formula, each once."""
        return list(dict.fromkeys(NAME.findall(self.formula)))

    @property
    def plain(self) -> float:
        """Value as a plain number, whole where it is whole."""
        return int(self) if is_whole(self) else float(self)

    def __str__(self) -> str:
        return human(self, self.unit, given=not self.formula)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    @property
    def record(self) -> dict[str, Any]:
        """Figure as JSON."""
        return {"value": self.plain, "unit": self.unit, "title": self.title, "source": self.source}


Figures = Mapping[str, Figure]


def given(value: float, unit: str, title: str, source: str) -> Figure:
    """Return an input."""
    return Figure(value, unit, "", title, source)


@functools.cache
def attribute_docs(kind: type) -> Mapping[str, tuple[str, str]]:
    """Return title and source of each attribute that the docstring of a class lists.

    >>> attribute_docs(CacheFigures)["kv_cache"]
    ('Cache of a token, all layers', 'V2, table 1; INS, table 1')
    """
    _, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found: dict[str, tuple[str, str]] = {}
    for entry in re.split(r"\n(?=    \w)", f"\n{listed}")[1:]:
        name, _, doc = " ".join(entry.split()).partition(": ")
        title, _, source = doc.rstrip(".").partition(". Source: ")
        found[name] = title, source
    return found


def figures_of(found: object, pattern: str = "{}") -> dict[str, Figure]:
    """Return the attributes of an object that are figures, by name, with their titles and sources.

    Args:
        pattern: of whole names, such as "memory_{}", which formulas then have too.
    """
    here = {name: value for name, value in vars(found).items() if isinstance(value, Figure)}
    names, docs = {name: pattern.format(name) for name in here}, attribute_docs(type(found))
    whole: dict[str, Figure] = {}
    for name, figure in here.items():
        title, source = docs.get(name, (figure.title, figure.source))
        formula = renamed(figure.formula, names)
        whole[names[name]] = Figure(figure, figure.unit, formula, figure.title or title, figure.source or source)
    return whole


def renamed(formula: str, names: Mapping[str, str]) -> str:
    """Return a formula with other names."""
    return NAME.sub(lambda found: names.get(found[0], found[0]), formula)


def exactly(figure: Figure) -> str:
    """Return a figure in its base units: a whole number with all digits, any other with ten."""
    value, unit = float(figure), plural_of(figure.unit)
    number = f"{value:,.0f}" if is_whole(value) else f"{value:,.10g}"
    return f"${number}" if unit == "$" else f"{number} {unit}".rstrip()


# --- explanations


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One named figure: its formula in names, in numbers, and the result. An input has no formula."""

    name: str
    title: str
    value: str
    """Result for people, such as "70.3 kB/token"."""
    exact: str
    """Result with all digits, such as "70,272 B/token"."""
    source: str
    formula: str = ""
    numbers: str = ""
    """The same formula in numbers with their units, such as "61 × 1.152 kB"."""  # noqa: RUF001
    needs: tuple[str, ...] = ()
    """Names of the figures and inputs in the formula."""

    @property
    def lines(self) -> list[str]:
        """Formula in names and in numbers, where these say more than the result does."""
        written = dict.fromkeys((self.formula, self.numbers))
        return [line for line in written if line and not line == self.value == self.exact]


def step_of(figures: Figures, name: str) -> Step:
    """Return the formula, the numbers and the result of a figure, or an input's value and source."""
    figure = figures[name]

    def number(found: re.Match[str]) -> str:
        written = human(figures[found[0]], figures[found[0]].unit, given=True)
        return f"({written})" if written.startswith("-") else written

    return Step(
        name=name,
        title=figure.title,
        value=str(figure),
        exact=exactly(figure),
        source=figure.source,
        formula=_shown(figure.formula),
        numbers=_shown(NAME.sub(number, figure.formula)),
        needs=tuple(figure.names),
    )


def _shown(formula: str) -> str:
    """Return a formula as it is read: with signs of mathematics, and large numbers in groups of three digits."""
    grouped = re.sub(r"(?<![\w.])\d{5,}(?![\w.])", lambda found: f"{int(found[0]):,}", formula)
    return grouped.replace("**", "^").replace("*", "×")  # noqa: RUF001


def needed(figures: Figures, name: str, depth: int | None = None) -> list[str]:
    """Return a figure's name and those that it needs, down to the inputs, in the order of reading, each once.

    Args:
        depth: names at most so many formulas away.
    """
    found, todo = dict[str, None](), [(name, 0)]
    while todo:
        here, away = todo.pop()
        if here not in found and (depth is None or away <= depth):
            found[here] = None
            todo += [(inner, away + 1) for inner in reversed(figures[here].names)]
    return list(found)


def explain(figures: Figures, name: str, depth: int | None = None) -> dict[str, list[Step]]:
    """Return the steps of a figure, what was asked for first, and the inputs in the order of their use.

    Raises: ValueError for an unknown name, with the nearest known ones.
    """
    check_name(figures, name)
    steps = [step_of(figures, each) for each in needed(figures, name, depth)]
    return {"steps": [s for s in steps if s.formula], "inputs": [s for s in steps if not s.formula]}


def check_name(known: Iterable[str], name: str) -> None:
    """Raise ValueError for an unknown name, with the nearest known ones."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        near += [other for other in names if name and name in other and other not in near][:5]
        fix = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown figure {name!r}; {fix}--explain list shows all {len(names)} names")


def text(explanation: Mapping[str, list[Step]], width: int = 100) -> str:
    """Return an explanation as lines of at most this many characters, if no name or number is longer."""
    lines: list[str] = []

    def say(line: str, first: str = "") -> None:
        how: dict[str, Any] = {"initial_indent": first, "subsequent_indent": f"{first and '  '}  "}
        lines.extend(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False, **how))

    for step in explanation["steps"]:
        say(f"{step.name}: {step.title}")
        for line in step.lines:
            say(line, "  = ")
        say(step.value if step.value == step.exact else f"{step.value} ({step.exact})", "  = ")
        if step.source:
            say(f"source: {step.source}", "  ")
        lines.append("")
    if explanation["inputs"]:
        lines.append("inputs")
    for step in explanation["inputs"]:
        say(f"{step.name} = {step.value}: {step.title} ({step.source})", "  ")
    return "\n".join(lines).rstrip()
