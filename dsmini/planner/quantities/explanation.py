"""Explanations of figures: each formula in names, in numbers, its result and its source, down to the inputs.

A quantity knows what it was computed from, so an explanation cannot differ from the computation. For the cache of a
token (DeepSeek-V3, BF16), text(explain(cache)) is

    kv_cache: Cache of a token, all layers
      = n_layers × (kv_lora_rank + qk_rope_head_dim) × cache_number
      = 61 × (512 + 64) × 2 B/token
      = 70.3 kB/token (70,272 B/token)
      source: V2 report, section 2.1

    inputs
      n_layers = 61: Number of layers (configs/deepseek-v3.toml)
      ...

The figure that was asked for comes first, then each named figure that it needs, once, then the inputs. A "max(...)" or
"min(...)" says which of its arguments it is.
"""  # noqa: RUF002

import difflib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsmini.planner.quantities.display import exactly, shown
from dsmini.planner.quantities.quantity import NONE, Anything, Quantity

__all__ = ["Explanation", "InputLine", "Step", "explain", "find", "named", "shown", "text"]

SIGNS = {"+": " + ", "-": " - ", "*": " × ", "/": " / ", "**": "^"}  # noqa: RUF001
# how tightly an operation binds, and how tightly its arguments must bind to need no parentheses
BINDS = {"+": (1, 1, 1), "-": (1, 1, 2), "*": (2, 2, 2), "/": (2, 2, 3), "**": (3, 4, 4)}
CHOICES = {"max": "largest", "min": "smallest"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One named figure: its formula in names, in numbers, and the result."""

    name: str
    title: str
    formula: str
    """Formula in names, such as "n_layers × (kv_lora_rank + qk_rope_head_dim)"."""  # noqa: RUF001
    numbers: str
    """The same formula in numbers with their units, such as "61 × (512 + 64)"."""  # noqa: RUF001
    choices: tuple[str, ...]
    """What each max or min of the formula chose, such as "largest: memory_time = 3.2 ms"."""
    value: str
    """Result for people, such as "70.3 kB/token"."""
    exact: str
    """Result with all digits, such as "70,272 B/token"."""
    source: str
    needs: tuple[str, ...]
    """Names of the figures and inputs in the formula."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputLine:
    """One input: its value and where it comes from."""

    name: str
    title: str
    value: str
    exact: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Steps of a figure, what was asked for first, and the inputs in the order of their use."""

    steps: Sequence[Step]
    inputs: Sequence[InputLine]


def explain(figure: Anything) -> Explanation:
    """Return the explanation of a named figure or an input."""
    assert figure.name, f"{figure!r} has no name, so no explanation"
    steps: list[Step] = []
    lines: list[InputLine] = []
    for node in _needed(figure):
        labels = {"name": node.name, "title": node.title, "source": node.source}
        labels |= {"value": shown(node), "exact": exactly(node)}
        if node.op == "input":
            lines.append(InputLine(**labels))
            continue
        formula = node.args[0]
        choices = tuple(
            f"{CHOICES[inner.op]}: {' = '.join(dict.fromkeys((_named(chosen), shown(chosen))))}"
            for inner in _inside(formula)
            if inner.op in CHOICES
            for chosen in [next(arg for arg in inner.args if arg.value == inner.value)]
        )
        # parts in six digits give the three of the result
        numbers = _written(formula, lambda node: shown(Quantity(node.value, node.unit, "number")))
        needs = tuple(dict.fromkeys(inner.name for inner in _inside(formula) if inner.name))
        step = Step(formula=_named(formula), numbers=numbers, choices=choices, needs=needs, **labels)
        steps.append(step)
    return Explanation(steps=steps, inputs=lines)


def named(figures: Iterable[Anything]) -> dict[str, Anything]:
    """Return all named figures and inputs that some figures are or need, by name."""
    return {node.name: node for figure in figures for node in _needed(figure)}


def find(figures: Iterable[Anything], name: str) -> Anything:
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


def text(explanation: Explanation, width: int = 100) -> str:
    """Return an explanation as lines of at most this many characters, if no name or number is longer."""
    lines: list[str] = []
    for step in explanation.steps:
        lines += _filled(f"{step.name}: {step.title}", width, "", "  ")
        for formula in dict.fromkeys((step.formula, step.numbers)):
            if not formula == step.value == step.exact:  # else it names another figure
                lines += wrapped(formula, width, "  = ", "    ")
        lines += [line for choice in step.choices for line in wrapped(choice, width, "    ", "      ")]
        lines += _filled(step.value if step.value == step.exact else f"{step.value} ({step.exact})", width, "  = ")
        lines += _filled(f"source: {step.source}", width, "  ", "    ") if step.source else []
        lines.append("")
    if explanation.inputs:
        lines.append("inputs")
    for line in explanation.inputs:
        note = f": {line.title}" if line.title else ""
        note += f" ({line.source})" if line.source else ""
        lines += _filled(f"{line.name} = {line.value}{note}", width, "  ", "      ")
    return "\n".join(lines).rstrip() + "\n"


def wrapped(formula: str, width: int, first: str, other: str) -> list[str]:
    """Return a formula in lines: broken before an operator or after a comma, outside parentheses if possible."""
    lines: list[str] = []
    start = first
    while len(start) + len(formula) > width:
        breaks = list(_breaks(formula))
        fitting = [b for b in breaks if len(start) + b[2] <= width] or breaks[:1]
        if not fitting:
            break
        depth, binds = min(b[:2] for b in fitting)
        end = max(b[2] for b in fitting if b[:2] == (depth, binds))
        lines.append(start + formula[:end])
        formula, start = formula[end + 1 :], other
    return [*lines, start + formula]


def _breaks(formula: str) -> Iterator[tuple[int, int, int]]:
    """Yield each place where a line may end: its depth in parentheses, how tightly it binds, and its position."""
    depth = 0
    for i, letter in enumerate(formula):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and i and formula[i - 1] == ",":
            yield depth, 0, i
        elif letter == " " and formula[i + 2 : i + 3] == " " and formula[i + 1] in "+-×/":  # noqa: RUF001
            yield depth, 1 + (formula[i + 1] in "×/"), i  # noqa: RUF001


def _filled(line: str, width: int, first: str, other: str = "    ") -> list[str]:
    return textwrap.wrap(
        line, width, initial_indent=first, subsequent_indent=other, break_long_words=False, break_on_hyphens=False
    )


def _needed(figure: Anything) -> Iterator[Anything]:
    """Yield a figure and each named figure and input that it needs, once: depth first, what was asked for first."""
    seen: dict[str, Anything] = {}
    todo = [figure]
    while todo:
        node = todo.pop()
        if node.name in seen:
            same = seen[node.name]
            assert (same.value, same.unit) == (node.value, node.unit), f"two figures have a name: {same!r}, {node!r}"
            continue
        if node.name:
            seen[node.name] = node
            yield node
        inner = [node] if not node.name else node.args
        todo += reversed([n for part in inner for n in _inside(part) if n.name])


def _inside(formula: Anything) -> Iterator[Anything]:
    """Yield the nodes of a formula, each once, in the order of reading, and nothing inside a named one."""
    seen: set[int] = set()
    todo = [formula]
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            todo += () if node.name else reversed(node.args)


def _named(formula: Anything) -> str:
    return _written(formula, lambda node: node.name or shown(node))


def _written(formula: Anything, leaf: Callable[[Anything], str]) -> str:
    """Return a formula with the fewest parentheses, its inputs and named figures written by `leaf`."""
    out: list[str] = []
    todo: list[str | tuple[Anything, int]] = [(formula, 0)]
    while todo:
        part = todo.pop()
        if isinstance(part, str):
            out.append(part)
        else:
            todo += reversed(_pieces(*part, leaf))
    return "".join(out)


def _pieces(node: Anything, need: int, leaf: Callable[[Anything], str]) -> list[str | tuple[Anything, int]]:
    """Return a node as text and arguments, in parentheses if it binds less tightly than needed."""
    if node.name or not node.args:
        written = leaf(node)
        return [f"({written})" if written.startswith("-") and need else written]
    if node.op not in BINDS:
        commas: list[str | tuple[Anything, int]] = [p for arg in node.args for p in (", ", (arg, 0))]
        return [f"{node.op}(", *commas[1:], ")"]
    binds, left, right = BINDS[node.op]
    if node.op == "/" and (unit := node.args[1]).op == "number" and unit.value == 1 and unit.unit != NONE:
        pieces: list[str | tuple[Anything, int]] = [(node.args[0], left), f" per {unit.units}"]
    else:
        pieces = [(node.args[0], left)]
        pieces += [p for arg in node.args[1:] for p in (SIGNS[node.op], (arg, right))]
    return ["(", *pieces, ")"] if binds < need else pieces
