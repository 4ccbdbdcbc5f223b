"""Figures as rows of words."""

import pytest

from dsmini.report.figures import Figure
from dsmini.report.rows import row


def figure(measured: float | None, predicted: float | None, *, bound: bool) -> Figure:
    return Figure(
        question="q", case={}, metric="bytes", unit="bytes", measured=measured, predicted=predicted, bound=bound
    )


@pytest.mark.parametrize(("measured", "tone"), [(105.0, "near"), (80.0, "off"), (300.0, "far"), (0.0, "none")])
def test_tone_says_how_far_a_prediction_was_off(measured: float, tone: str) -> None:
    assert row(figure(measured, 100.0, bound=False)).tone == tone


@pytest.mark.parametrize("measured", [30.0, 100.0, 300.0])
def test_ratio_over_a_bound_is_not_judged(measured: float) -> None:
    shown = row(figure(measured, 100.0, bound=True))
    assert (shown.tone, shown.ratio) == ("bound", f"{measured / 100:.2f}")
    assert row(figure(measured, None, bound=True)).tone == "none"
