"""Figures in words: 70.3 kB/token, 989.4 TFLOP/s, 14.8 ms, 2.67 million h, $5.58 million.

A prefix is a power of 1000: a GB is 1e9 B. A computed figure has three digits. An input is shown as it was given, in up
to six. Counts and tokens are whole where they are whole: 671,026,404,352 parameters, 3,220 tokens.
"""

from typing import Any

from dsmini.planner.figure import Figure
from dsmini.report.units import DECIMAL, SECONDS, Scale, digits

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
WORDS: Scale = ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1.0, ""))
LONG: Scale = ((2 * 365.25 * DAY, "years"), (2 * DAY, "days"), (HOUR, "h"), (2 * MINUTE, "min"))
"""Seconds from which on a time is shown in years, days, hours or minutes."""
LENGTH = {"years": 365.25 * DAY, "days": DAY, "h": HOUR, "min": MINUTE}
ENERGY: Scale = tuple((HOUR * size, f"{name}Wh") for size, name in DECIMAL)
LARGEST_WHOLE = 2.0**53
"""Size from which on a float can no longer hold every whole number."""


def shown(figure: Figure) -> str:
    """Return a named figure for people: in three digits, or as it was given if it is an input."""
    return in_unit(figure.value, figure.title.unit, given=figure.op == "input")


def rounded(figure: Figure) -> str:
    """Return `shown`, in three digits also where an input has more."""
    return min(shown(figure), in_unit(float(figure.value), figure.title.unit), key=len)


def short(figure: Figure) -> str:
    """Return `shown` for a narrow table: 273B tokens, $0.238/M tokens."""
    return narrow(shown(figure).replace(" per million tokens", "/M tokens"))


def narrow(text: str) -> str:
    """Return a text with T, B and M for trillion, billion and million."""
    for word in (" trillion ", " billion ", " million "):
        text = text.replace(word, f"{word[1].upper()} ")
    return text


def exactly(figure: Figure) -> str:
    """Return a figure in its base units: a whole number with all digits, any other with ten."""
    value, unit = figure.value, _plural(figure.title.unit)
    number = f"{value:,.0f}" if _is_whole(value) else f"{value:,.10g}"
    if unit == "$":
        return f"${number}"
    return f"{number} per {unit[2:]}" if unit.startswith("1/") else f"{number} {unit}".rstrip()


def percent(share: Any) -> str:
    """Return a share in percent, in three digits."""
    return f"{100 * float(share):.3g} %"


def in_unit(value: float, unit: str, *, given: bool = False) -> str:
    """Return a value of a unit in words.

    Args:
        given: with up to six digits, as an input was given.
    """
    over, slash, under = unit.partition("/")
    match unit:
        case "":
            return _number(value, given) if _is_whole(value) else in_words(value, given)
        case "s":
            return _duration(value, given)
        case "$":
            return _dollars(value, given)
        case "$/s":
            return f"{_dollars(HOUR * value, given)}/h"
        case "$/token":
            return f"{_dollars(1e6 * value, given)} per million tokens"
        case "1/s":
            size, name = next((step for step in ((1.0, "s"), (HOUR, "h")) if abs(value) * step[0] >= 1), (DAY, "day"))
            return f"{_number(value * size, given)} per {name}"
        case "J" if abs(value) >= HOUR:
            return _scaled(value, ENERGY, given)
        case "J/s":
            return f"{_scaled(value, DECIMAL, given)}W"
    if over in ("B", "FLOP", "J"):
        return f"{_scaled(value, DECIMAL, given)}{over}{slash}{under}"
    if over == "s":
        return f"{_scaled(value, SECONDS, given)}/{under}"
    tokens = in_words(value, given) if abs(value) >= 1e6 or not _is_whole(value) else _number(value, given)
    return f"{tokens if over == 'token' else _number(value, given)} {_plural(unit)}"


def in_words(value: float, given: bool = False) -> str:
    """Return a count in words: 671 billion."""
    size, name = next((step for step in WORDS if abs(value) >= step[0]), WORDS[-1])
    return _number(value / size, given) + name


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
    if "e" in text:
        return text.replace("e+", "e").replace("e-0", "e-")
    return f"{float(text):,}" if given else text


def _scaled(value: float, scale: Scale, given: bool) -> str:
    if abs(value) >= 1000 * scale[0][0]:
        return f"{_number(value / scale[-1][0], given)} {scale[-1][1]}"
    size, name = next((step for step in scale if abs(value) >= step[0]), scale[-1])
    return f"{_number(value / size, given)} {name}"


def _duration(value: float, given: bool) -> str:
    unit = next((name for least, name in LONG if abs(value) >= least), "")
    if unit:
        return f"{_number(value / LENGTH[unit], given)} {unit}"
    return _scaled(value, SECONDS, given) if value else "0 s"


def _dollars(value: float, given: bool) -> str:
    sign, value = "-" if value < 0 else "", abs(value)
    if value >= 1e6:
        return f"{sign}${in_words(value, given)}"
    if value >= 1000:
        return f"{sign}${value:,.0f}"
    return f"{sign}${value:.2f}" if value >= 1 else f"{sign}${_number(value, given)}"
