"""Figures: numbers with a unit, a title, a source, and the formula that they are computed by; and their explanation.

    class Cache:
        @figure("B/token")
        def kv_cache(self) -> float:
            \"\"\"Cache of a token, all layers. Source: V2, table 1.\"\"\"
            return self.c.n_layers * self.cache_row

A figure is a property that is computed once. Its formula is the expression that the method returns, as it stands in the
source; its docstring is its title and its source. A `counted` figure has no formula to show: accounting counts it, and
an explanation shows it as an input. So each formula is said once, and is plain Python.

In a written formula an attribute that is a figure or an input has its name: `self.c.n_layers` is n_layers. All else,
such as a call of a method, is written as the number that it gives.

Units are base units, without prefixes: B, FLOP, s, token, $, and their quotients. In words a prefix is a power of
1000: a GB is 1e9 B. A computed figure has three digits, an input up to six, as it was given. Whole counts stay whole.

An explanation has the figure that was asked for first, then each figure that it needs, once, then the inputs:

    kv_cache: Cache of a token, all layers
      = n_layers × cache_row
      = 61 × 1.152 kB
      = 70.3 kB/token (70,272 B/token)
      source: V2, table 1
"""  # noqa: RUF002

import ast
import copy
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

from dsmini.report.units import human, is_whole, plural_of

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
NAME = re.compile(r"(?<![\w.])[a-z_][a-z_0-9]*(?![a-z_0-9]*\()")
"""Name in a formula that is not of a function."""
FUNCTIONS = ("max", "min", "ceil", "floor", "sqrt", "exp")
"""Functions that formulas show."""
COUNTED = "counted by dsmini.accounting"


class Figure(float):
    """Number that knows its name, its unit, its formula in names, its title and its source; an input has no formula."""

    name: str
    unit: str
    title: str
    source: str
    formula: str
    main: bool
    """True: a terminal shows it with --all, and a page first."""

    def __new__(
        cls, name: str, value: float, unit: str, title: str, source: str, formula: str = "", main: bool = False
    ) -> "Figure":
        made = super().__new__(cls, value)
        made.name, made.unit, made.title, made.source = name, unit, title, source
        made.formula, made.main = formula, main
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


class Explained(functools.cached_property[T]):
    """Property that is computed once, and knows how."""

    def __init__(self, method: Callable[[Any], T], unit: str, counted: bool, main: bool) -> None:
        super().__init__(method)
        self.unit: str = unit
        self.counted: bool = counted
        self.main: bool = main
        self.title: str
        self.source: str
        self.title, _, self.source = " ".join((method.__doc__ or "").split()).rstrip(".").partition(". Source: ")


def figure(unit: str = "", main: bool = False) -> Callable[[Callable[[Any], T]], Explained[T]]:
    """Make a method a figure: it returns one expression, or one in each branch. Where it is None there is no figure."""
    return lambda method: Explained(method, unit, False, main)


def counted(unit: str = "", main: bool = False) -> Callable[[Callable[[Any], T]], Explained[T]]:
    """Make a method a figure that formulas name and that has none."""
    return lambda method: Explained(method, unit, True, main)


def kept(function: Callable[[Any, *Ts], T]) -> Callable[[Any, *Ts], T]:
    """Make a method, or a function of an object, compute once for the same arguments while the object lives."""

    @functools.wraps(function)
    def of(owner: Any, *args: *Ts) -> T:
        results = owner.__dict__.setdefault("_kept", {})
        if (function, args) not in results:
            results[function, args] = function(owner, *args)
        return results[function, args]

    return of


def figures_of(found: object, inputs: Figures) -> dict[str, Figure]:
    """Return the figures of an object by name, and the inputs that their formulas name.

    The names begin with the object's `stage`, if it has one, such as "decode_". Its `titles`, if it has any, are other
    ones than those of the docstrings.

    Args:
        inputs: numbers that the object has as plain ones, such as sizes of a model, by the names of their attributes.
    """
    figures: dict[str, Figure] = {}
    methods = (each for kind in reversed(type(found).__mro__) for each in vars(kind).values())
    for each in methods:
        if isinstance(each, Explained) and (value := getattr(found, key := str(each.attrname))) is not None:
            name, writer = _whole_name(found, key), _Writer(found, each.func, inputs)
            formula = "" if each.counted else writer.formula()
            source = each.source or (COUNTED if each.counted else "")
            title = getattr(found, "titles", {}).get(key, each.title)
            figures |= {name: Figure(name, value, each.unit, title, source, formula, each.main)}
            figures |= writer.met
    return figures


def _whole_name(owner: object, name: str) -> str:
    return getattr(owner, "stage", "") + name


@functools.cache
def _body(method: Callable[..., Any]) -> list[ast.stmt]:
    try:
        source = inspect.getsource(method)
    except OSError:
        raise ValueError("formulas are read from dsmini's source files, which are not here; install them") from None
    (made,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(made, ast.FunctionDef)
    return made.body


class _Writer(ast.NodeTransformer):
    """Writes the expression that a method returns as a formula."""

    def __init__(self, owner: object, method: Callable[..., Any], inputs: Figures) -> None:
        self.method, self.inputs = method, inputs
        self.scope = {**method.__globals__, "self": owner}
        self.local: dict[str, ast.expr] = {}
        """Expressions of the method's variables."""
        self.met: dict[str, Figure] = {}
        """Inputs that are named."""

    def formula(self) -> str:
        """Return the formula of the branch that was taken."""
        found = self.returned(_body(self.method))
        assert found is not None, f"{self.method.__qualname__} returns no expression"
        return ast.unparse(self.visit(copy.deepcopy(found)))

    def returned(self, body: list[ast.stmt]) -> ast.expr | None:
        for line in body:
            if isinstance(line, ast.Return):
                return line.value
            if isinstance(line, ast.Assign):
                (target,), value = line.targets, line.value
                names, parts = [target], [value]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    names, parts = target.elts, value.elts
                self.local |= dict(zip(map(ast.unparse, names), parts, strict=True))
                exec(compile(ast.Module([line], []), "", "exec"), self.scope)
            if isinstance(line, ast.If) and (
                found := self.returned(line.body if self.value(line.test) else line.orelse)
            ):
                return found
        return None

    def value(self, node: ast.expr) -> Any:
        """Return the value of a part of the source, which is the method's own."""
        return eval(compile(ast.Expression(node), "", "eval"), self.scope)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        owner = self.value(node.value)
        if isinstance(getattr(type(owner), node.attr, None), Explained):
            return ast.Name(_whole_name(owner, node.attr))
        value, known = self.value(node), self.inputs.get(node.attr)
        if known is not None and known == value and not isinstance(value, Figure):
            return self.named(known)
        return self.plain(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in FUNCTIONS:
            return ast.Call(ast.Name(name), [self.visit(arg) for arg in node.args], [])
        if name == "sum":
            parts: list[ast.expr] = [self.named(part) for part in self.value(node.args[0])]
            return functools.reduce(lambda a, b: ast.BinOp(a, ast.Add(), b), parts) if parts else ast.Constant(0)
        return self.plain(node)

    def plain(self, node: ast.expr) -> ast.expr:
        """Return the name of an input, or the number that an expression gives."""
        value = self.value(node)
        if isinstance(value, Figure):
            return self.named(value)
        return ast.Constant(int(value) if is_whole(value) else float(value))

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return self.plain(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:  # a field that may be None, or 0
        return self.visit(node.values[0]) if self.value(node.values[0]) else self.plain(node.values[1])

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.visit(copy.deepcopy(self.local[node.id])) if node.id in self.local else self.plain(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        return self.visit(node.body if self.value(node.test) else node.orelse)

    def named(self, found: Figure) -> ast.Name:
        self.met[found.name] = found
        return ast.Name(found.name)


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
    formula: str
    numbers: str
    """The same formula in numbers with their units, such as "61 × 1.152 kB"."""  # noqa: RUF001
    needs: list[str]
    """Names of the figures and inputs in the formula."""

    @property
    def lines(self) -> list[str]:
        """Formula in names and in numbers, where these say more than the result does."""
        written = dict.fromkeys((self.formula, self.numbers))
        return [line for line in written if line and not line == self.value == self.exact]


def step_of(figures: Figures, name: str) -> Step:
    """Return the formula, the numbers and the result of a figure, or an input's value and source."""
    f = figures[name]

    def number(found: re.Match[str]) -> str:
        written = human(figures[found[0]], figures[found[0]].unit, given=True)
        return f"({written})" if written.startswith("-") else written

    formulas = {"formula": _shown(f.formula), "numbers": _shown(NAME.sub(number, f.formula))}
    results = {"value": str(f), "exact": exactly(f)}
    return Step(name=name, title=f.title, source=f.source, needs=f.names, **formulas, **results)


def _shown(formula: str) -> str:
    """Return a formula as it is read: with signs of mathematics, and large numbers in groups of three digits."""
    grouped = re.sub(r"(?<![\w.])\d{5,}(?![\w.])", lambda found: f"{int(found[0]):,}", formula)
    return grouped.replace("**", "^").replace("*", "×")  # noqa: RUF001


def needed(figures: Figures, name: str, depth: int | None = None) -> list[str]:
    """Return a figure's name and those that it needs, down to the inputs, in the order of reading, each once.

    Args:
        depth: most formulas between a name and this one.
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
