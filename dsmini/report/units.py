"""Numbers for people: 1.25 MiB, 38.2 GB/s, 4.71 ms."""

import math
from collections.abc import Sequence

Value = str | int | float | bool
NOTHING = "–"  # noqa: RUF001
Scale = Sequence[tuple[float, str]]
DECIMAL: Scale = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
BINARY: Scale = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "bytes"))
SECONDS: Scale = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def human(value: float | None, unit: str, exact: bool = False) -> str:
    """Return a value with its unit, in three digits, or in all of them for an exact count."""
    if value is None:
        return NOTHING
    if exact and float(value).is_integer():
        return f"{value:,.0f} {unit}".rstrip()
    if unit == "s":
        return _scaled(value, SECONDS) if value else "0 s"
    if unit in ("bytes/s", "FLOP/s", "FLOP"):
        return _scaled(value, DECIMAL) + {"bytes/s": "B/s"}.get(unit, unit)
    if unit.startswith("bytes"):
        return _scaled(value, BINARY) + unit.removeprefix("bytes")
    return f"{digits(value)} {'×' if unit == 'x' else unit}".rstrip()  # noqa: RUF001


def _scaled(value: float, scale: Scale) -> str:
    size, name = next((step for step in scale if abs(value) >= step[0]), scale[-1])
    return f"{digits(value / size)} {name}"


def digits(value: float) -> str:
    """Return three significant digits, if readable without an exponent."""
    size = abs(value)
    if size == 0 or isinstance(value, int) or 100 <= size < 1e9:
        return f"{value:,.0f}"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.2e}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}"


def short(value: float) -> str:
    """Return a value for the ticks of an axis: 512, 2,048, 32k, 1.5M, 0.02."""
    size = abs(value)
    if size >= 1e4:
        factor, prefix = next(step for step in DECIMAL if size >= step[0])
        return f"{float(f'{value / factor:.3g}'):g}{prefix}"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 or size == 0 else f"{value:.0e}".replace("e-0", "e-")


def duration(seconds: float) -> str:
    """Return a duration in words: 40 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def words(name: str) -> str:
    """Return a metric or the key of a case in words."""
    return name.replace("_per_", " per ").replace("_", " ")


def shown(value: Value) -> str:
    """Return the value of a case in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else digits(value)
    return value if isinstance(value, str) else f"{value:,}"


def plural(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun: 1 case, 2 cases."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
