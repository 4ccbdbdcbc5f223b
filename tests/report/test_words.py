"""Figures in words: units, and tones of predictions."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from dsmini.report import Figure, units
from dsmini.report.tables import ratio


def figure(measured: float | None, **given: Any) -> Figure:
    """Return a figure whose interval is its median."""
    usual: dict[str, Any] = {"question": "q", "case": {"n": 1}, "metric": "time", "unit": "s"}
    return Figure(**{**usual, "low": measured, "high": measured, **given}, measured=measured)


TABLES = tomllib.loads(Path(__file__).with_name("words.toml").read_text())


@pytest.mark.parametrize(("value", "unit", "said"), [*TABLES["shown"], (None, "s", units.NOTHING)])
def test_values_are_shown_in_readable_units(value: float | None, unit: str, said: str) -> None:
    assert units.human(value, unit) == said
    assert units.human(671_026_404_352, "", exact=True) == "671,026,404,352"


@pytest.mark.parametrize("case", TABLES["tones"])
def test_tone_says_how_far_a_prediction_was_off(case: dict[str, Any]) -> None:
    tone = case["tone"]
    found = ratio(figure(**{name: value for name, value in case.items() if name != "tone"}, unit="bytes"))
    assert found.tone == tone
    assert tone != "bound" or found == f"{case['measured'] / 100:.2f}"


@pytest.mark.parametrize(
    ("measured", "bar"),
    [(100.0, (50, 0)), (200.0, (50, 25)), (50.0, (25, 25)), (900.0, (50, 50)), (9.0, (0, 50))],
)
def test_bar_begins_in_the_middle_and_ends_at_the_ratio(measured: float, bar: tuple[float, float]) -> None:
    assert ratio(figure(measured, unit="bytes", predicted=100.0)).bar == bar
