"""Figures in words: units, and tones of predictions."""

from typing import Any

import pytest

from dsmini.report import Figure, units
from dsmini.report.tables import ratio


def figure(measured: float | None, **given: Any) -> Figure:
    """Return a figure whose interval is its median."""
    usual: dict[str, Any] = {"question": "q", "case": {"n": 1}, "metric": "time", "unit": "s"}
    return Figure(**{**usual, "low": measured, "high": measured, **given}, measured=measured)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (1310720, "bytes", "1.25 MiB"),
        (640, "bytes/token", "640 bytes/token"),
        (38.2e9, "bytes/s", "38.2 GB/s"),
        (1.03e14, "FLOP/s", "103 TFLOP/s"),
        (0.00471, "s", "4.71 ms"),
        (3e-7, "s", "300 ns"),
        (6363.4, "tokens/s", "6,363 tokens/s"),
        (0.4567, "", "0.457"),
        (2.4e-6, "", "2.40e-06"),
        (0.0, "s", "0 s"),
        (54.5 * 86400, "s", "54.5 days"),
        (3.37 * 365.25 * 86400, "s", "3.37 years"),
        (1019.05, "s", "17.0 min"),
        (3e-10, "s", "0.300 ns"),
        (5.576e6, "$", "$5.58 million"),
        (2 / 3600, "$/s", "$2.00/h"),
        (0.5, "s/token", "500 ms/token"),
        (70272, "B/token", "70.3 kB/token"),
        (2176.0, "token", "2,176 tokens"),
        (2.38e-7, "$/token", "$0.238 per million tokens"),
        (None, "s", units.NOTHING),
    ],
)
def test_values_are_shown_in_readable_units(value: float | None, unit: str, said: str) -> None:
    assert units.human(value, unit) == said
    assert units.human(671_026_404_352, "", exact=True) == "671,026,404,352"


@pytest.mark.parametrize(
    ("measured", "predicted", "bound", "tone"),
    [
        (105.0, 100.0, False, "near"),
        (80.0, 100.0, False, "off"),
        (300.0, 100.0, False, "far"),
        (0.0, 100.0, False, "none"),
        (30.0, 100.0, True, "bound"),
        (300.0, 100.0, True, "bound"),
        (30.0, None, True, "none"),
    ],
)
def test_tone_says_how_far_a_prediction_was_off(
    measured: float, predicted: float | None, bound: bool, tone: str
) -> None:
    found = ratio(figure(measured, unit="bytes", predicted=predicted, bound=bound))
    assert found.tone == tone
    if tone == "bound":
        assert found == f"{measured / 100:.2f}"


@pytest.mark.parametrize(
    ("measured", "bar"),
    [(100.0, (50, 0)), (200.0, (50, 25)), (50.0, (25, 25)), (900.0, (50, 50)), (9.0, (0, 50))],
)
def test_bar_begins_in_the_middle_and_ends_at_the_ratio(measured: float, bar: tuple[float, float]) -> None:
    assert ratio(figure(measured, unit="bytes", predicted=100.0)).bar == bar
