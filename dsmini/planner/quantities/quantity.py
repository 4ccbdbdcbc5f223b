"""Quantities: numbers with a unit that know how they were computed.

    cache = layers * (latent + rope) * number       # Quantity[Byte, Token]
    bandwidth / cache                               # Quantity[Token, Second]
    cache + bandwidth                               # pyright refuses it, and so does Python

A unit is a ratio of two of the base units below, so that pyright can check it: Quantity[Byte, Second] is a rate of
bytes, Quantity[Byte, One] bytes, Quantity[One, One] a plain count. A plain int or float in a formula is a number of
that formula, such as the 2 of a multiply-add.

Every quantity keeps the operation and the quantities that it was computed from: formula.py explains a figure by them,
computes it again with other inputs, and differentiates it.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar, cast, overload


class One:
    """Unit of a count or a ratio."""


class Byte:
    """Unit of memory and traffic."""


class Flop:
    """Unit of arithmetic; a multiply-add is two."""


class Second:
    """Unit of time."""


class Token:
    """Unit of text."""


class Dollar:
    """Unit of cost."""


class Joule:
    """Unit of energy; a watt is Quantity[Joule, Second]."""


N = TypeVar("N")
D = TypeVar("D")
M = TypeVar("M")
E = TypeVar("E")

Exponents = tuple[float, ...]
BASES = ("B", "FLOP", "s", "token", "$", "J")
"""Symbols of the base units, in the order of their exponents."""
NONE: Exponents = (0,) * len(BASES)
Number = int | float


class Quantity(Generic[N, D]):
    """Value with the unit N/D, and the operation that gave it. Immutable.

    Raises: TypeError for a sum, difference or comparison of different units.
    """

    __slots__ = ("args", "name", "op", "source", "title", "unit", "value")

    value: float
    """Value in the base units: bytes, FLOP, seconds, tokens, dollars, joules."""
    unit: Exponents
    op: str
    """Operation: a key of RULES, "input", "number", or "name" for a named result."""
    args: "tuple[Any, ...]"
    """Quantities that the operation was applied to."""
    name: str
    """Name of an input or of a named result, such as "kv_lora_rank"; "" without one."""
    title: str
    """Short description of a named quantity."""
    source: str
    """Source of an input's value, or of a named result's formula."""

    def __init__(
        self, value: float, unit: Exponents, op: str, args: "Sequence[Any]" = (), labels: Sequence[str] = ("", "", "")
    ) -> None:
        set_ = object.__setattr__
        set_(self, "value", value)
        set_(self, "unit", unit)
        set_(self, "op", op)
        set_(self, "args", tuple(args))
        name, title, source = labels
        set_(self, "name", name)
        set_(self, "title", title)
        set_(self, "source", source)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Quantity does not change; compute another one instead of setting {name}")

    def named(self, name: str, title: str, source: str = "") -> Self:
        """Return the same quantity as a named figure, which an explanation shows as a step of its own."""
        return type(self)(self.value, self.unit, "name", (self,), (name, title, source))

    @property
    def units(self) -> str:
        """Unit in symbols, such as "B/token"; "" for a count."""
        return symbols(self.unit)

    def __repr__(self) -> str:
        return f"{self.name or 'Quantity'} = {self.value:.6g} {self.units}".rstrip()

    def __float__(self) -> float:
        return float(self.value)

    # 1. sums and comparisons: of equal units
    def __add__(self, other: "Quantity[N, D]") -> "Quantity[N, D]":
        return _apply("+", self, other)

    def __sub__(self, other: "Quantity[N, D]") -> "Quantity[N, D]":
        return _apply("-", self, other)

    def __lt__(self, other: "Quantity[N, D]") -> bool:
        return self.value < _same("<", self, other).value

    def __gt__(self, other: "Quantity[N, D]") -> bool:
        return self.value > _same(">", self, other).value

    def __le__(self, other: "Quantity[N, D]") -> bool:
        return self.value <= _same("<=", self, other).value

    def __ge__(self, other: "Quantity[N, D]") -> bool:
        return self.value >= _same(">=", self, other).value

    # 2. products: N/D times D/E is N/E
    @overload
    def __mul__(self, other: Number) -> "Quantity[N, D]": ...
    @overload
    def __mul__(self, other: "Quantity[One, One]") -> "Quantity[N, D]": ...
    @overload
    def __mul__(self: "Quantity[One, One]", other: "Quantity[M, E]") -> "Quantity[M, E]": ...
    @overload
    def __mul__(self: "Quantity[N, D]", other: "Quantity[D, N]") -> "Quantity[One, One]": ...
    @overload
    def __mul__(self: "Quantity[N, E]", other: "Quantity[E, M]") -> "Quantity[N, M]": ...
    @overload
    def __mul__(self: "Quantity[N, D]", other: "Quantity[E, N]") -> "Quantity[E, D]": ...
    def __mul__(self, other: Any) -> Any:
        return _apply("*", self, other)

    def __rmul__(self, other: Number) -> "Quantity[N, D]":
        return _apply("*", other, self)

    # 3. quotients: N/D by N/E is E/D, N/D by M/D is N/M
    @overload
    def __truediv__(self, other: Number) -> "Quantity[N, D]": ...
    @overload
    def __truediv__(self, other: "Quantity[N, D]") -> "Quantity[One, One]": ...
    @overload
    def __truediv__(self, other: "Quantity[One, One]") -> "Quantity[N, D]": ...
    @overload
    def __truediv__(self: "Quantity[One, One]", other: "Quantity[M, E]") -> "Quantity[E, M]": ...
    @overload
    def __truediv__(self: "Quantity[N, D]", other: "Quantity[N, E]") -> "Quantity[E, D]": ...
    @overload
    def __truediv__(self: "Quantity[N, D]", other: "Quantity[M, D]") -> "Quantity[N, M]": ...
    def __truediv__(self, other: Any) -> Any:
        return _apply("/", self, other)

    def __rtruediv__(self, other: Number) -> "Quantity[D, N]":
        return _apply("/", other, self)


Count = Quantity[One, One]
Bytes = Quantity[Byte, One]
Flops = Quantity[Flop, One]
Seconds = Quantity[Second, One]
Tokens = Quantity[Token, One]
Dollars = Quantity[Dollar, One]
BytesPerSecond = Quantity[Byte, Second]
FlopsPerSecond = Quantity[Flop, Second]
TokensPerSecond = Quantity[Token, Second]
DollarsPerSecond = Quantity[Dollar, Second]
PerSecond = Quantity[One, Second]
Watts = Quantity[Joule, Second]
BytesPerToken = Quantity[Byte, Token]
FlopsPerToken = Quantity[Flop, Token]
SecondsPerToken = Quantity[Second, Token]
Anything = Quantity[Any, Any]
"""Quantity of any unit, for code that shows or walks figures."""


class Unit(Generic[N, D]):
    """Unit that makes inputs: BYTES(80e9, "memory", "Memory of a GPU", source="data sheet")."""

    def __init__(self, over: str = "", under: str = "") -> None:
        self.exponents: Exponents = tuple(float(base == over) - float(base == under) for base in BASES)

    def __call__(self, value: float, name: str = "", title: str = "", source: str = "") -> Quantity[N, D]:
        """Return an input of this unit; without a name, a number of the formula that it stands in."""
        return Quantity(value, self.exponents, "input" if name else "number", (), (name, title, source))


COUNT = Unit[One, One]()
BYTES = Unit[Byte, One]("B")
FLOPS = Unit[Flop, One]("FLOP")
SECONDS = Unit[Second, One]("s")
TOKENS = Unit[Token, One]("token")
DOLLARS = Unit[Dollar, One]("$")
BYTES_PER_SECOND = Unit[Byte, Second]("B", "s")
FLOPS_PER_SECOND = Unit[Flop, Second]("FLOP", "s")
TOKENS_PER_SECOND = Unit[Token, Second]("token", "s")
PER_SECOND = Unit[One, Second]("", "s")
DOLLARS_PER_SECOND = Unit[Dollar, Second]("$", "s")
WATTS = Unit[Joule, Second]("J", "s")
BYTES_PER_TOKEN = Unit[Byte, Token]("B", "token")
FLOPS_PER_TOKEN = Unit[Flop, Token]("FLOP", "token")
SECONDS_PER_TOKEN = Unit[Second, Token]("s", "token")


def total(parts: Iterable[Quantity[N, D]]) -> Quantity[N, D]:
    """Return the sum of one or more quantities of one unit."""
    return _apply("+", *parts)


def largest(*parts: Quantity[N, D]) -> Quantity[N, D]:
    """Return the largest of some quantities of one unit: the slowest of several times."""
    return _apply("max", *parts)


def smallest(*parts: Quantity[N, D]) -> Quantity[N, D]:
    """Return the smallest of some quantities of one unit."""
    return _apply("min", *parts)


def rounded_up(x: Count) -> Count:
    """Return the next whole number."""
    return _apply("ceil", x)


def rounded_down(x: Count) -> Count:
    """Return the last whole number that is not larger."""
    return _apply("floor", x)


def power(base: Count, exponent: Count | Number) -> Count:
    """Return base ** exponent of counts."""
    return _apply("**", base, exponent)


def exponential(x: Count) -> Count:
    """Return e ** x."""
    return _apply("exp", x)


def geometric_mean(a: Quantity[N, D], b: Quantity[N, D]) -> Quantity[N, D]:
    """Return the square root of the product of two quantities of one unit."""
    return _apply("sqrt", _apply("*", a, b))


def per(value: Quantity[N, One], unit: Unit[M, One]) -> Quantity[N, M]:
    """Return the same number as a rate: per(bytes, TOKENS) are bytes that each token takes."""
    return cast("Quantity[N, M]", _apply("/", value, Quantity(1, unit.exponents, "number")))


def number_of(tokens: Tokens) -> Count:
    """Return tokens as a count."""
    return tokens / TOKENS(1)


# Each operation: its value, its partial derivatives, and its unit.
Rule = tuple[
    Callable[..., float],
    Callable[[Sequence[float], float], Sequence[float]],
    Callable[[str, "Sequence[Anything]"], Exponents],
]


def _one_unit(op: str, args: "Sequence[Anything]") -> Exponents:
    for other in args[1:]:
        if args[0].unit != other.unit:
            _same(op, args[0], other)  # raises
    return args[0].unit


def _product(op: str, args: "Sequence[Anything]") -> Exponents:
    return tuple(map(operator.add, args[0].unit, args[1].unit))


def _quotient(op: str, args: "Sequence[Anything]") -> Exponents:
    return tuple(map(operator.sub, args[0].unit, args[1].unit))


def _root(op: str, args: "Sequence[Anything]") -> Exponents:
    return tuple(a / 2 for a in args[0].unit)


def _count(op: str, args: "Sequence[Anything]") -> Exponents:
    for arg in args:
        if arg.unit != NONE:
            raise TypeError(f"{op} of {arg!r}: it takes counts without a unit")
    return NONE


def _chosen(x: Sequence[float], y: float) -> Sequence[float]:
    first = x.index(y)
    return [float(i == first) for i in range(len(x))]


RULES: Mapping[str, Rule] = {
    "+": (lambda *x: sum(x), lambda x, y: [1.0] * len(x), _one_unit),
    "-": (lambda a, b: a - b, lambda x, y: [1.0, -1.0], _one_unit),
    "*": (lambda a, b: a * b, lambda x, y: [x[1], x[0]], _product),
    "/": (lambda a, b: a / b, lambda x, y: [1 / x[1], -x[0] / x[1] ** 2], _quotient),
    "max": (lambda *x: max(x), _chosen, _one_unit),
    "min": (lambda *x: min(x), _chosen, _one_unit),
    "ceil": (math.ceil, lambda x, y: [0.0], _count),
    "floor": (math.floor, lambda x, y: [0.0], _count),
    "**": (pow, lambda x, y: [x[1] * x[0] ** (x[1] - 1), y * math.log(x[0]) if x[0] > 0 else 0.0], _count),
    "exp": (math.exp, lambda x, y: [y], _count),
    "sqrt": (math.sqrt, lambda x, y: [0.5 / y], _root),
    "name": (lambda a: a, lambda x, y: [1.0], _one_unit),
}
"""Operations of quantities."""


def _apply(op: str, *args: "Anything | Number") -> Any:
    quantities: list[Anything] = [a if isinstance(a, Quantity) else Quantity(a, NONE, "number") for a in args]
    value, _, unit = RULES[op]
    try:
        return Quantity(value(*[a.value for a in quantities]), unit(op, quantities), op, quantities)
    except ZeroDivisionError:
        raise ZeroDivisionError(f"{quantities[0]!r} divided by {quantities[1]!r}") from None


def _same(op: str, a: "Anything", b: Any) -> "Anything":
    other: Anything = b if isinstance(b, Quantity) else Quantity(b, NONE, "number")
    if a.unit != other.unit:
        raise TypeError(f"{a!r} {op} {other!r}: units differ, {a.units or 'a count'} and {other.units or 'a count'}")
    return other


def symbols(unit: Exponents) -> str:
    """Return a unit in symbols: "FLOP/s", "1/s", "" for a count."""

    def side(sign: int) -> str:
        parts = [(base, sign * e) for base, e in zip(BASES, unit, strict=True) if sign * e > 0]
        return " ".join(base if e == 1 else f"{base}^{e:g}" for base, e in parts)

    over, under = side(1), side(-1)
    return f"{over or '1'}/{under}" if under else over
