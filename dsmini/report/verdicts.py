"""Comparisons in words, with a range instead of a verdict where the spread is too large."""

from dsmini.report.figures import Figure

CLOSE = 0.05
"""Half range below which a ratio is always stated as one number, even next to 1."""


def compared(over: Figure, under: Figure | float = 1.0, words: str = "", decimals: int = 2) -> str:
    """Return how many times one figure is another: "1.62 times as fast".

    If the spread is larger than the difference, return the range instead: "0.53 to 2.41 times as fast (unclear)".

    Args:
        over: a measured figure; a ratio if under is omitted.
        under: a measured figure, or a number without spread.
        words: the rest of the phrase, such as "as fast".
    """
    (low, value, high), (least, middle, most) = _range(over), _range(under)
    low, value, high = low / most, value / middle, high / least
    half = (high - low) / 2
    phrase = f"times {words}".rstrip()
    if half > CLOSE and (half > abs(value - 1) or low <= 1 <= high):
        return f"{low:.{decimals}f} to {high:.{decimals}f} {phrase} (unclear)"
    return f"{value:.{decimals}f} {phrase}"


def _range(figure: Figure | float) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if not isinstance(figure, Figure):
        return figure, figure, figure
    assert figure.measured is not None, "the caller picks measured figures"
    low, high = (figure.measured if end is None else end for end in (figure.low, figure.high))
    return low, figure.measured, high
