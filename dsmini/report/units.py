"""Numbers as people read them: 1.25 MiB, 38.2 GB/s, 4.71 ms."""

import math

from dsmini.report.figures import Figure, Value

NOTHING = "–"  # noqa: RUF001
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


def human(value: float | None, unit: str, exact: bool = False) -> str:
    """A value with its unit, three digits of it, or all of them where it is an exact count."""
    if value is None:
        return NOTHING
    if exact and float(value).is_integer():
        return f"{value:,.0f} {unit}".rstrip()
    if unit == "s":
        return _seconds(value)
    if unit in ("bytes/s", "B/s", "FLOP/s", "FLOP"):
        return _decimal(value, {"bytes/s": "B/s"}.get(unit, unit))
    if unit.startswith("bytes"):
        size, name = next(((size, name) for size, name in _BINARY if abs(value) >= size), (1.0, "bytes"))
        return f"{digits(value / size)} {name}{unit.removeprefix('bytes')}"
    return f"{digits(value)} {'×' if unit == 'x' else unit}".rstrip()  # noqa: RUF001


def digits(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    size = abs(value)
    if size == 0 or isinstance(value, int) or 100 <= size < 1e9:
        return f"{value:,.0f}"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.2e}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}"


def short(value: float) -> str:
    """For the ticks of an axis: 512, 2,048, 32k, 1.5M, 0.02."""
    size = abs(value)
    if size >= 1e4:
        factor, prefix = next((factor, prefix) for factor, prefix in _DECIMAL if size >= factor)
        return f"{float(f'{value / factor:.3g}'):g}{prefix}"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 or size == 0 else f"{value:.0e}".replace("e-0", "e-")


def duration(seconds: float) -> str:
    """How long something takes: 40 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def spread(figure: Figure) -> str:
    """Half the range of the quartiles as a share of what was measured."""
    if figure.low is None or figure.high is None or not figure.measured:
        return ""
    share = (figure.high - figure.low) / 2 / abs(figure.measured)
    return f"±{share:.1%}".replace("%", " %") if share < 0.1 else f"±{share:.0%}".replace("%", " %")


def ratio(figure: Figure) -> str:
    """Measured over predicted: 0.87, or = of an exact count that is as predicted."""
    if figure.exact and figure.measured is not None and figure.predicted is not None:
        return "=" if figure.measured == figure.predicted else "≠"
    if figure.ratio is None:
        return ""
    return f"{figure.ratio:.2f}" if 0.1 <= figure.ratio < 100 else digits(figure.ratio)


def words(name: str) -> str:
    """A metric or key as one reads it."""
    return name.replace("_per_", " per ").replace("_", " ")


def shown(value: Value) -> str:
    """A value of a case."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else digits(value)
    return value if isinstance(value, str) else f"{value:,}"


def _seconds(value: float) -> str:
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= size or value == 0:
            return f"{digits(value / size)} {name}"
    return f"{digits(value * 1e9)} ns"


def _decimal(value: float, unit: str) -> str:
    factor, prefix = next(((factor, prefix) for factor, prefix in _DECIMAL if abs(value) >= factor), (1.0, ""))
    return f"{digits(value / factor)} {prefix}{unit}"
