"""Explanations of figures: each formula in names, in numbers, its result and its source, down to the inputs.

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

The figure that was asked for comes first, then each named figure that it needs, once, then the inputs. A "max(...)" or
"min(...)" says which of its arguments it is.
"""  # noqa: RUF002

import difflib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsmini.planner.display import exactly, in_unit, shown
from dsmini.planner.figure import Figure

# how tightly an operation binds, and how tightly its arguments must bind to need no parentheses
BINDS = {"+": (1, 1, 1), "-": (1, 1, 2), "×": (2, 2, 2), "/": (2, 2, 3), "^": (3, 4, 4)}  # noqa: RUF001
CHOICES = {"max": "largest", "min": "smallest"}


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
    choices: tuple[str, ...] = ()
    """Choice of each max or min of the formula, such as "largest: memory_time = 3.2 ms"."""
    needs: tuple[str, ...] = ()
    """Names of the figures and inputs in the formula."""

    @property
    def lines(self) -> list[str]:
        """Formula in names and in numbers, where these say more than the result does."""
        written = dict.fromkeys((self.formula, self.numbers))
        return [line for line in written if line and not line == self.value == self.exact]


def explain(figure: Figure) -> dict[str, list[Step]]:
    """Return the steps of a named figure, what was asked for first, and the inputs in the order of their use."""
    nodes = list(_needed(figure))
    return {
        "steps": [step_of(node) for node in nodes if node.op != "input"],
        "inputs": [step_of(node) for node in nodes if node.op == "input"],
    }


def step_of(figure: Figure) -> Step:
    """Return the formula, the numbers and the result of one named figure, or an input's value and source."""
    formulas = () if figure.op == "input" else figure.args
    inside = [node for formula in formulas for node in _inside(formula)]
    return Step(
        name=figure.name,
        title=figure.title.title,
        value=shown(figure),
        exact=exactly(figure),
        source=figure.source,
        formula="".join(_written(formula, _name) for formula in formulas),
        numbers="".join(_written(formula, _number) for formula in formulas),
        choices=tuple(_choice(node) for node in inside if node.op in CHOICES and not node.name),
        needs=tuple(dict.fromkeys(node.name for node in inside if node.name)),
    )


def _choice(node: Figure) -> str:
    chosen = next(arg for arg in node.args if arg.value == node.value)
    return f"{CHOICES[node.op]}: {' = '.join(dict.fromkeys((_written(chosen, _name), _number(chosen))))}"


def named(figures: Iterable[Figure]) -> dict[str, Figure]:
    """Return all named figures and inputs that some figures are or need, by name."""
    return {node.name: node for figure in figures for node in _needed(figure)}


def find(figures: Iterable[Figure], name: str) -> Figure:
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
        for choice in step.choices:
            say(choice, "    ")
        say(step.value if step.value == step.exact else f"{step.value} ({step.exact})", "  = ")
        if step.source:
            say(f"source: {step.source}", "  ")
        lines.append("")
    if explanation["inputs"]:
        lines.append("inputs")
    for step in explanation["inputs"]:
        say(f"{step.name} = {step.value}: {step.title} ({step.source})", "  ")
    return "\n".join(lines).rstrip()


def _needed(figure: Figure) -> Iterator[Figure]:
    """Yield a figure and each named figure and input that it needs, once: depth first, what was asked for first."""
    seen: dict[str, Figure] = {}
    todo = [figure]
    while todo:
        node = todo.pop()
        if node.name in seen:
            assert seen[node.name].value == node.value, f"two figures have a name: {seen[node.name]!r}, {node!r}"
            continue
        seen[node.name] = node
        yield node
        todo += reversed([inner for part in node.args for inner in _inside(part) if inner.name])


def _inside(formula: Figure) -> Iterator[Figure]:
    """Yield the nodes of a formula, each once, in the order of reading, and nothing inside a named one."""
    seen: set[int] = set()
    todo = [formula]
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            todo += () if node.name else reversed(node.args)


def _name(node: Figure) -> str:
    return node.name or _number(node)


def _number(node: Figure) -> str:
    if node.op == "number":
        return f"{node.value:,.15g}"
    return in_unit(node.value, node.title.unit if node.name else "", given=True)


def _written(node: Figure, leaf: Callable[[Figure], str], need: int = 0) -> str:
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
