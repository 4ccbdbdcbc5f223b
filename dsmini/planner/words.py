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

from dsmini.report.units import DECIMAL, SECONDS, digits

HOUR, DAY = 3600.0, 86400.0
YEAR = 365.25 * DAY
Steps = list[tuple[float, float, str]]
"""Sizes from which on a value is divided by a number and followed by a word, the largest first."""
LONG: Steps = [(2 * YEAR, YEAR, " years"), (2 * DAY, DAY, " days"), (HOUR, HOUR, " h"), (120.0, 60.0, " min")]
WORDS: Steps = [(1e12, 1e12, " trillion"), (1e9, 1e9, " billion"), (1e6, 1e6, " million"), (0.0, 1.0, "")]
LARGEST_WHOLE = 2.0**53
"""Size from which on a float can no longer hold every whole number."""


def in_unit(value: float, unit: str, *, given: bool = False) -> str:
    """Return a value of a unit in words.

    Args:
        given: with up to six digits, as an input was given.
    """
    over, slash, under = unit.partition("/")
    if over == "$":
        factor, after = {"": (1, ""), "s": (HOUR, "/h"), "token": (1e6, " per million tokens")}[under]
        return _dollars(factor * value, given) + after
    if over in ("", "token"):
        after = f" {_plural(unit)}" if unit else ""
        whole = _is_whole(value) and (not unit or abs(value) < 1e6)
        return (_number(value, given) if whole else in_words(value, given)) + after
    if over == "s":
        seconds = [(size, size, f" {name}{slash}{under}") for size, name in SECONDS]
        return _scaled(value, seconds if slash else LONG + seconds, given) if value else "0 s"
    prefixes = [(size, size, f" {name}{unit}") for size, name in DECIMAL]
    return _scaled(value, [(1e18, 1.0, f" {unit}"), *prefixes], given)


def in_words(value: float, given: bool = False) -> str:
    """Return a count in words: 671 billion."""
    return _scaled(value, WORDS, given)


def shown(figure: Any) -> str:
    """Return a named figure for people: in three digits, or as it was given if it is an input."""
    return in_unit(figure.value, figure.title.unit, given=figure.op == "input")


def exactly(figure: Any) -> str:
    """Return a figure in its base units: a whole number with all digits, any other with ten."""
    value, unit = figure.value, _plural(figure.title.unit)
    number = f"{value:,.0f}" if _is_whole(value) else f"{value:,.10g}"
    return f"${number}" if unit == "$" else f"{number} {unit}".rstrip()


WAYS: Mapping[str, Callable[[Any], str]] = {
    "": shown,
    "%": lambda figure: f"{100 * float(figure):.3g} %",
    "words": lambda figure: in_words(figure.value),
    "amount": lambda figure: shown(figure).partition("/")[0],
}
"""Ways to write a figure in a sentence: as shown, in percent, in words, without its "a token"."""


def _scaled(value: float, steps: Steps, given: bool) -> str:
    _, size, word = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    return _number(value / size, given) + word


def _is_whole(value: float) -> bool:
    return isinstance(value, int) or (float(value).is_integer() and abs(value) < LARGEST_WHOLE)


def _plural(unit: str) -> str:
    over, slash, under = unit.partition("/")
    return f"tokens{slash}{under}" if over == "token" else unit


def _number(value: float, given: bool) -> str:
    """Return three digits of a value, or up to six of an input."""
    if _is_whole(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    text = f"{value:.6g}" if given else digits(float(value))
    return f"{float(text):,}" if given and "e" not in text else text


def _dollars(value: float, given: bool) -> str:
    if value >= 1e6:
        return f"${in_words(value, given)}"
    if value >= 1000:
        return f"${value:,.0f}"
    return f"${value:.2f}" if value >= 1 else f"${_number(value, given)}"


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
    return in_unit(node.value, node.title.unit if node.name else "", given=True)


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
