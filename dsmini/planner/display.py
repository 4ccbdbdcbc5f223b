"""Figures in words: 70.3 kB/token, 989.4 TFLOP/s, 14.8 ms, 2.67 million h, $5.58 million.

A prefix is a power of 1000: a GB is 1e9 B. A computed figure has three digits. An input is shown as it was given, in up
to six. Counts and tokens are whole where they are whole: 671,026,404,352 parameters, 3,220 tokens.

A sentence writes a figure as f"{s.kv_cache}", or in one of WAYS, such as f"{s.kv_cache:amount}".
"""

from collections.abc import Callable, Mapping
from typing import Any

from dsmini.report.units import DECIMAL, SECONDS, digits

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
YEAR = 365.25 * DAY
Steps = list[tuple[float, float, str]]
"""Sizes from which on a value is divided by a number and followed by a word, the largest first."""
LONG: Steps = [(2 * YEAR, YEAR, " years"), (2 * DAY, DAY, " days"), (HOUR, HOUR, " h"), (2 * MINUTE, MINUTE, " min")]
WORDS: Steps = [(1e12, 1e12, " trillion"), (1e9, 1e9, " billion"), (1e6, 1e6, " million"), (1.0, 1.0, "")]
RATES: Steps = [(1.0, 1.0, " per s"), (1 / HOUR, 1 / HOUR, " per h"), (0.0, 1 / DAY, " per day")]
LARGEST_WHOLE = 2.0**53
"""Size from which on a float can no longer hold every whole number."""


def in_unit(value: float, unit: str, *, given: bool = False) -> str:
    """Return a value of a unit in words.

    Args:
        given: with up to six digits, as an input was given.
    """
    over, slash, under = unit.partition("/")
    tokens = f" {_plural(unit)}" if unit else ""
    if over == "$":
        hour, million = (HOUR, "/h"), (1e6, " per million tokens")
        factor, after = {"": (1, ""), "s": hour, "token": million}[under]
        return _dollars(factor * value, given) + after
    if over in ("", "token") and _is_whole(value) and (not unit or abs(value) < 1e6):
        return _number(value, given) + tokens
    if over == "s" and not value:
        return "0 s"
    steps = {
        "": WORDS,
        "token": [(least, size, word + tokens) for least, size, word in WORDS],
        "1": RATES,
        "s": [*([] if slash else LONG), *((size, size, f" {name}{slash}{under}") for size, name in SECONDS)],
        "J": _prefixed("W" if slash else "J"),
    }.get(over, _prefixed(unit))
    if unit == "J" and abs(value) >= HOUR:
        value, steps = value / HOUR, _prefixed("Wh")
    return _scaled(value, steps, given)


def in_words(value: float, given: bool = False) -> str:
    """Return a count in words: 671 billion."""
    return _scaled(value, WORDS, given)


def narrow(text: str) -> str:
    """Return a text with T, B and M for trillion, billion and million."""
    for word in (" trillion ", " billion ", " million "):
        text = text.replace(word, f"{word[1].upper()} ")
    return text


def shown(figure: Any) -> str:
    """Return a named figure for people: in three digits, or as it was given if it is an input."""
    return in_unit(figure.value, figure.title.unit, given=figure.op == "input")


def short(figure: Any) -> str:
    """Return `shown` for a narrow table: 273B tokens, $0.238/M tokens."""
    return narrow(shown(figure).replace(" per million tokens", "/M tokens"))


def exactly(figure: Any) -> str:
    """Return a figure in its base units: a whole number with all digits, any other with ten."""
    value, unit = figure.value, _plural(figure.title.unit)
    number = f"{value:,.0f}" if _is_whole(value) else f"{value:,.10g}"
    if unit == "$":
        return f"${number}"
    return f"{number} per {unit[2:]}" if unit.startswith("1/") else f"{number} {unit}".rstrip()


WAYS: Mapping[str, Callable[[Any], str]] = {
    "": shown,
    "3": lambda figure: min(shown(figure), in_unit(float(figure), figure.title.unit), key=len),
    "%": lambda figure: f"{100 * float(figure):.3g} %",
    "words": lambda figure: in_words(figure.value),
    "amount": lambda figure: shown(figure).partition("/")[0],
}
"""Ways to write a figure in a sentence: as shown, in three digits, in percent, in words, without its "a token"."""


def _prefixed(unit: str) -> Steps:
    """Return the prefixes of a unit, and none from where they end."""
    return [(1e18, 1.0, f" {unit}"), *((size, size, f" {name}{unit}") for size, name in DECIMAL)]


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
    if "e" in text:
        return text.replace("e+", "e").replace("e-0", "e-")
    return f"{float(text):,}" if given else text


def _dollars(value: float, given: bool) -> str:
    sign, value = "-" if value < 0 else "", abs(value)
    if value >= 1e6:
        return f"{sign}${in_words(value, given)}"
    if value >= 1000:
        return f"{sign}${value:,.0f}"
    return f"{sign}${value:.2f}" if value >= 1 else f"{sign}${_number(value, given)}"
