"""Figures: numbers that remember how they were computed, and the sheet that names them.

    s = Sheet()
    s.put("n_layers", 61, "configs/deepseek-v3.toml")           # an input, with its source
    s.kv_cache = s.n_layers * s.cache_row                       # a figure: its formula is what was computed

A formula works on plain numbers, on arrays and on figures alike, because it uses operators and NumPy's functions. So
one copy of a formula serves a count, a search over thousands of layouts, and an explanation:

    Sheet()                   every number is a Figure; words.py writes its formula
    Sheet(explained=False)    numbers and arrays stay as they are

Names, titles and units are in titles.toml. A name that is not there raises, so a misspelt figure is never lost.
Units are declared, not computed: bytes, FLOP, seconds, tokens, dollars and joules, never with a prefix.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from dsmini.planner.words import WAYS
from dsmini.reading import read_toml
from dsmini.report.units import plural

STAGES = ("decode", "prefill", "verify")
PLACES = ("only", "first", "second", "middle", "last")
"""GPUs of a pipeline by their place in it."""
EACH = {
    "stage": (STAGES, "{0}_{1}", "inference"),
    "gpu": (PLACES, "{1}_{0}", "training"),
}
"""Tables of titles.toml whose figures exist several times: the words, the names with a word, and the section."""


class Title(NamedTuple):
    """Words of a figure in titles.toml."""

    title: str
    unit: str
    source: str
    section: str
    """Section of a plan, or "inputs"."""


@functools.cache
def titles() -> Mapping[str, Title]:
    """Return the titles of all figures by name."""
    tables = read_toml(Path(__file__).parent / "titles.toml")
    found: dict[str, Title] = {}
    for section, table in tables.items():
        words, pattern, of = EACH.get(section, (("",), "{1}", section))
        for name, (title, unit, *source) in table.items():
            for word in words:
                text = title.format(word.capitalize())
                found[pattern.format(word, name)] = Title(text, unit, source[0] if source else "", of)
    return found


OPERATIONS: Mapping[Any, tuple[str, Callable[..., Any]]] = {
    np.add: ("+", operator.add),
    np.subtract: ("-", operator.sub),
    np.multiply: ("×", operator.mul),  # noqa: RUF001
    np.true_divide: ("/", operator.truediv),
    np.power: ("^", operator.pow),
    np.maximum: ("max", max),
    np.minimum: ("min", min),
    np.ceil: ("ceil", math.ceil),
    np.floor: ("floor", math.floor),
    np.exp: ("exp", math.exp),
    np.sqrt: ("sqrt", math.sqrt),
}
"""Operations of figures by NumPy's function: the sign, and the operation on numbers, which keeps whole ones exact."""
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
NOTHING = {np.add: 0, np.multiply: 1}
"""Number that leaves the other one as it is."""


class Figure(NDArrayOperatorsMixin):
    """Number with the operation and the numbers that gave it."""

    __slots__ = ("args", "name", "op", "source", "value")

    def __init__(
        self, value: Any, op: str = "number", args: tuple["Figure", ...] = (), name: str = "", source: str = ""
    ):
        self.value, self.op, self.args, self.name, self.source = value, op, args, name, source

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Any:
        given = [a if isinstance(a, Figure) else Figure(a) for a in inputs]
        if ufunc in COMPARISONS:
            return bool(ufunc(*(a.value for a in given)))
        plain = [not isinstance(a, Figure) for a in inputs]
        for i, other in ((0, 1), (1, 0)):
            if ufunc in NOTHING and plain[i] and given[i].value == NOTHING[ufunc]:
                return inputs[other]
            if ufunc is np.multiply and plain[i] and given[i].value == 0:
                return 0
        sign, operation = OPERATIONS[ufunc]
        if sign in ("max", "min") and given[0].op == sign:  # max(max(a, b), c) reads max(a, b, c)
            given = [*given[0].args, given[1]]
        return Figure(operation(*(a.value for a in given)), sign, tuple(given))

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __index__(self) -> int:
        return int(self.value)

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)

    @property
    def title(self) -> Title:
        """Title of a named figure."""
        return titles()[self.name]

    def __format__(self, way: str) -> str:
        if way in WAYS:
            return WAYS[way](self)
        return plural(int(self.value), way) if way.isalpha() else format(float(self.value), way)

    def __repr__(self) -> str:
        return f"{self.name or 'Figure'} = {self.value:.6g}"


def call(sign: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return a function of numbers, figures or arrays; a formula shows it as sign(...)."""
    if any(isinstance(arg, Figure) for arg in args):
        given = tuple(arg if isinstance(arg, Figure) else Figure(arg) for arg in args)
        return Figure(function(*(arg.value for arg in given)), sign, given)
    return np.vectorize(function, otypes=[float])(*args) if any(np.ndim(arg) for arg in args) else function(*args)


class Sheet:
    """Numbers by name. Setting an attribute names a figure, and reading one returns it."""

    def __init__(self, explained: bool = True, pattern: str = "{}", found: dict[str, Any] | None = None) -> None:
        self.__dict__.update(_explained=explained, _pattern=pattern, _found={} if found is None else found)

    def each(self, pattern: str) -> "Sheet":
        """Return the sheet for figures whose names have a part more, such as "decode_{}"."""
        return Sheet(self._explained, pattern, self._found)

    def copy(self) -> "Sheet":
        """Return a sheet with the same figures, to which others may be added."""
        return Sheet(self._explained, self._pattern, dict(self._found))

    def put(self, name: str, value: Any, source: str) -> Any:
        """Name an input, and return it."""
        name = self._pattern.format(name)
        assert name in titles(), f"{name} is not in titles.toml"
        if name not in self._found:
            self._found[name] = Figure(value, "input", (), name, source) if self._explained else value
        return self._found[name]

    def name(self, name: str, value: Any) -> Any:
        """Name a figure, and return it."""
        setattr(self, name, value)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        name = self._pattern.format(name)
        if name not in titles():
            raise AttributeError(f"{name} is not in titles.toml")
        if self._explained:
            formula = value if isinstance(value, Figure) else Figure(value)
            value = Figure(formula.value, "name", (formula,), name, titles()[name].source)
            assert self._found.get(name, value).value == value.value, f"{name} is named twice, with other values"
        self._found[name] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_found"][self.__dict__["_pattern"].format(name)]
        except KeyError:
            raise AttributeError(f"{self._pattern.format(name)} was not computed") from None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a figure by name, or the default for what a model does not have."""
        return self._found.get(self._pattern.format(name), default)

    def section(self, name: str) -> dict[str, Any]:
        """Return the figures of a section, without inputs."""
        return {key: f for key, f in self._found.items() if titles()[key].section == name and f.op != "input"}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._found.values())
