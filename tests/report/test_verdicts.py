"""Comparisons in words: one number for a small spread, a range for a large one."""

import pytest

from dsmini.report import Figure
from dsmini.report.verdicts import compared


def figure(measured: float, spread: float = 0.0) -> Figure:
    low, high = measured * (1 - spread), measured * (1 + spread)
    return Figure(question="q", case={}, metric="m", unit="s", measured=measured, low=low, high=high)


@pytest.mark.parametrize(
    ("over", "under", "said"),
    [
        (figure(1.6, 0.5), figure(1.0, 0.5), "0.53 to 4.80 times as fast (unclear)"),
        (figure(1.6, 0.05), figure(1.0, 0.05), "1.60 times as fast"),
        (figure(1.3, 0.25), 1.0, "0.98 to 1.62 times as fast (unclear)"),
        (figure(1.0, 0.01), figure(1.0, 0.01), "1.00 times as fast"),
        (figure(20.0, 0.5), figure(1.0), "20.00 times as fast"),
        (figure(3.0), figure(2.0), "1.50 times as fast"),
    ],
)
def test_verdict_needs_a_difference_above_the_spread(over: Figure, under: Figure | float, said: str) -> None:
    assert compared(over, under, "as fast") == said


def test_figure_that_was_measured_once_has_no_spread() -> None:
    once = Figure(question="q", case={}, metric="m", unit="s", measured=3.0)
    assert compared(once, once) == "1.00 times"
