"""Figures in words: values with units, and the explanation of a figure down to its inputs.

A prefix is a power of 1000: a GB is 1e9 B. A computed figure has three digits. An input is shown as it was given, in up
to six. Counts and tokens are whole where they are whole: 671,026,404,352 parameters, 3,220 tokens.

A sentence writes a figure as f"{s.kv_cache}", or in one of WAYS, such as f"{s.kv_cache:amount}".

A figure knows what it was computed from, so an explanation cannot differ from the computation. For the cache of a
token (DeepSeek-V3, BF16), text(explain(cache)) is

    kv_cache: Cache of a token, all layers
      = n_layers × cache_row
      = 61 × 1.152 kB
      = 70.3 kB/token (70,272 B/token)
      source: V2, table 1

    inputs
      n_layers = 61: Number of blocks (configs/deepseek-v3.toml)
      ...

The figure that was asked for comes first, then each named figure that it needs, once, then the inputs.
"""  # noqa: RUF002

import difflib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsmini.report.units import human, in_words, is_whole, plural_of


def shown(figure: Any) -> str:
    """Return a named figure for people: in three digits, or as it was given if it is an input."""
    return human(figure.value, figure.title.unit, given=figure.op == "input")


def exactly(figure: Any) -> str:
    """Return a figure in its base units: a whole number with all digits, any other with ten."""
    value, unit = figure.value, plural_of(figure.title.unit)
    number = f"{value:,.0f}" if is_whole(value) else f"{value:,.10g}"
    return f"${number}" if unit == "$" else f"{number} {unit}".rstrip()


WAYS: Mapping[str, Callable[[Any], str]] = {
    "": shown,
    "%": lambda figure: f"{100 * float(figure):.3g} %",
    "words": lambda figure: in_words(figure.value),
    "amount": lambda figure: shown(figure).partition("/")[0],
}
"""Ways to write a figure in a sentence: as shown, in percent, in words, without its "a token"."""


# --- explanations

# how tightly an operation binds, and how tightly its arguments must bind to need no parentheses
BINDS = {"+": (1, 1, 1), "-": (1, 1, 2), "×": (2, 2, 2), "/": (2, 2, 3), "^": (3, 4, 4)}  # noqa: RUF001


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
    """Formula in names, such as "n_layers × cache_row"."""  # noqa: RUF001
    numbers: str = ""
    """The same formula in numbers with their units, such as "61 × 1.152 kB"."""  # noqa: RUF001
    needs: tuple[str, ...] = ()
    """Names of the figures and inputs in the formula."""

    @property
    def lines(self) -> list[str]:
        """Formula in names and in numbers, where these say more than the result does."""
        written = dict.fromkeys((self.formula, self.numbers))
        return [line for line in written if line and not line == self.value == self.exact]


def explain(figure: Any) -> dict[str, list[Step]]:
    """Return the steps of a named figure, what was asked for first, and the inputs in the order of their use."""
    nodes = named([figure]).values()
    return {
        "steps": [step_of(node) for node in nodes if node.op != "input"],
        "inputs": [step_of(node) for node in nodes if node.op == "input"],
    }


def step_of(figure: Any) -> Step:
    """Return the formula, the numbers and the result of one named figure, or an input's value and source."""
    formulas = () if figure.op == "input" else figure.args
    return Step(
        name=figure.name,
        title=figure.title.title,
        value=shown(figure),
        exact=exactly(figure),
        source=figure.source,
        formula="".join(_written(formula, _name) for formula in formulas),
        numbers="".join(_written(formula, _in_numbers) for formula in formulas),
        needs=tuple(dict.fromkeys(node.name for formula in formulas for node in _inside(formula))),
    )


def named(figures: Iterable[Any]) -> dict[str, Any]:
    """Return all named figures and inputs that some figures are or need, depth first, by name."""
    found: dict[str, Any] = {}
    for figure in figures:
        todo = [figure]
        while todo:
            node = todo.pop()
            if node.name not in found:
                found[node.name] = node
                todo += reversed([inner for part in node.args for inner in _inside(part)])
    return found


def find(figures: Iterable[Any], name: str) -> Any:
    """Return the figure or input of a name among some figures and all that they need.

    Raises: ValueError for an unknown name, with the nearest known ones.
    """
    known = named(figures)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        near += [other for other in known if name and name in other and other not in near][:5]
        fix = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown figure {name!r}; {fix}--explain list shows all {len(known)} names")
    return known[name]


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


def _inside(formula: Any) -> Iterator[Any]:
    """Yield the named figures of a formula in the order of reading."""
    if formula.name:
        yield formula
        return
    for arg in formula.args:
        yield from _inside(arg)


def _name(node: Any) -> str:
    return node.name or _in_numbers(node)


def _in_numbers(node: Any) -> str:
    if node.op == "number":
        return f"{node.value:,.15g}"
    return human(node.value, node.title.unit if node.name else "", given=True)


def _written(node: Any, leaf: Callable[[Any], str], need: int = 0) -> str:
    """Return a formula with the fewest parentheses, its inputs and named figures written by `leaf`."""
    if node.name or not node.args:
        written = leaf(node)
        return f"({written})" if written.startswith("-") and need else written
    if node.op not in BINDS:
        return f"{node.op}({', '.join(_written(arg, leaf) for arg in node.args)})"
    binds, *needs = BINDS[node.op]
    sign = node.op if node.op == "^" else f" {node.op} "
    written = sign.join(_written(arg, leaf, least) for arg, least in zip(node.args, needs, strict=True))
    return f"({written})" if binds < need else written
