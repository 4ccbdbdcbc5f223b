"""Numbers for people: 1.25 MiB, 38.2 GB/s, 4.71 ms, 54.5 days, $5.58 million.

A unit may end in what a value is per: "B/token". Memory of this machine ("bytes") has prefixes of 1024. All else has
prefixes of 1000: a GB is 1e9 B. A whole count is written out, another one in words.
"""

import math
from collections.abc import Sequence

Value = str | int | float | bool
NOTHING = "–"  # noqa: RUF001
HOUR, DAY = 3600.0, 86400.0
YEAR = 365.25 * DAY
Steps = Sequence[tuple[float, float, str]]
"""Sizes from which on a value is divided by a number and followed by a word, the largest first."""
DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "bytes"))
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
LONG: Steps = ((2 * YEAR, YEAR, " years"), (2 * DAY, DAY, " days"), (HOUR, HOUR, " h"), (120.0, 60.0, " min"))
WORDS: Steps = ((1e12, 1e12, " trillion"), (1e9, 1e9, " billion"), (1e6, 1e6, " million"), (0.0, 1.0, ""))
DOLLARS = {"": (1.0, ""), "s": (HOUR, "/h"), "token": (1e6, " per million tokens")}
LEAST_DOLLARS = 0.001
"""Amount below which a price has no digits."""
LARGEST_WHOLE = 2.0**53
"""Size from which on a float can no longer hold every whole number."""


def human(value: float | None, unit: str, exact: bool = False, given: bool = False, like: float | None = None) -> str:
    """Return a value with its unit, in three digits.

    Args:
        exact: all digits of a whole number.
        given: up to six digits, as an input was given.
        like: value whose prefix or word is taken, as of the largest one in a row of a table.
    """
    if value is None:
        return NOTHING
    over, slash, under = unit.partition("/")
    per, whole, size = slash + under, is_whole(value), value if like is None else like
    if exact and whole:
        return f"{value:,.0f} {plural_of(unit)}".rstrip()
    if over == "$":
        factor, after = DOLLARS[under]
        return _dollars(factor * value, given, factor * size) + after
    if over == "s" and not value:
        return f"0 {unit}"
    if over == "s":
        short = [(step, step, f" {name}{per}") for step, name in SECONDS]
        return _scaled(value, short if per else [*LONG, *short], given, size)
    if over == "bytes" and under != "s":
        return _scaled(value, [(step, step, f" {name}{per}") for step, name in BINARY], given, size)
    if over in ("B", "bytes", "FLOP"):
        unit = unit.replace("bytes", "B")
        steps = [(1e18, 1.0, f" {unit}"), *((step, step, f" {name}{unit}") for step, name in DECIMAL)]
        return _scaled(value, steps, given, size)
    if over in ("", "token"):
        written = whole and (abs(size) < 1e6 or (not unit and like is None))
        return f"{number(value, given) if written else _scaled(value, WORDS, given, size)} {plural_of(unit)}".rstrip()
    return f"{digits(value)} {'×' if unit == 'x' else unit}"  # noqa: RUF001


def in_words(value: float, given: bool = False) -> str:
    """Return a count in words: 671 billion."""
    return _scaled(value, WORDS, given, value)


def span(low: float, high: float, unit: str) -> str:
    """Return both ends of a range with one unit, or one of two that read the same: $2.50 to $7.00/h."""
    (first, _, under), (last, _, other) = (human(end, unit).partition(" ") for end in (low, high))
    if (first, under) == (last, other):
        return f"{first} {under}".rstrip()
    return f"{first if under == other else f'{first} {under}'} to {last} {other}".rstrip()


def alike(values: Sequence[float | None], unit: str) -> tuple[list[str], str]:
    """Return values without their unit, and the one that all have; each with its own where they are far apart."""
    known = [value for value in values if value is not None]
    most = max(map(abs, known), default=0.0)
    parts = [human(value, unit, like=most).partition(" ") for value in known]
    near = all(1000 * abs(value) >= most for value in known) and len({under for _, _, under in parts}) == 1
    if not near:
        return ["" if value is None else human(value, unit) for value in values], ""
    return ["" if value is None else human(value, unit, like=most).partition(" ")[0] for value in values], parts[0][2]


def number(value: float, given: bool = False) -> str:
    """Return three digits of a value, up to six of an input, and all of a whole number."""
    if is_whole(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    text = f"{value:.6g}" if given else digits(float(value))
    return f"{float(text):,}" if given and "e" not in text else text


def digits(value: float) -> str:
    """Return three significant digits, if readable without an exponent."""
    size = abs(value)
    if size == 0 or isinstance(value, int) or 100 <= size < 1e9:
        return f"{value:,.0f}"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.2e}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}"


def percent(share: float, decimals: int = 0) -> str:
    """Return a share in percent: 12 %."""
    return f"{100 * share:.{decimals}f} %"


def is_whole(value: float) -> bool:
    """Return True for a whole number that its type can tell from the next one."""
    return isinstance(value, int) or (float(value).is_integer() and abs(value) < LARGEST_WHOLE)


def plural_of(unit: str) -> str:
    """Return a unit as it follows a number: tokens/s for token/s."""
    over, slash, under = unit.partition("/")
    return f"tokens{slash}{under}" if over == "token" else unit


def _scaled(value: float, steps: Steps, given: bool, like: float) -> str:
    _, size, word = next((step for step in steps if abs(like) >= step[0]), steps[-1])
    return number(value / size, given) + word


def _dollars(value: float, given: bool, like: float) -> str:
    if like >= 1e6:
        return f"${_scaled(value, WORDS, given, like)}"
    if value >= 1000:
        return f"${value:,.0f}"
    if 0 < value < LEAST_DOLLARS:
        return f"less than ${LEAST_DOLLARS}"
    return f"${value:.2f}" if value >= 1 else f"${number(value, given)}"


def short(value: float) -> str:
    """Return a value for the ticks of an axis: 512, 2,048, 32k, 1.5M, 0.02."""
    size = abs(value)
    if size >= 1e4:
        factor, prefix = next(step for step in DECIMAL if size >= step[0])
        return f"{float(f'{value / factor:.3g}'):g}{prefix}"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 or size == 0 else f"{value:.0e}".replace("e-0", "e-")


def words(name: str) -> str:
    """Return a metric or the key of a case in words."""
    return name.replace("_per_", " per ").replace("_", " ")


def shown(value: Value) -> str:
    """Return the value of a case in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value)


def plural(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun: 1 case, 2 cases."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
