"""Figures in words: units, tones of predictions, verdicts of two figures, and changes between two runs."""

from typing import Any

import pytest

from dsmini.report import Figure, units
from dsmini.report.comparison import compare
from dsmini.report.rows import Row
from dsmini.report.verdicts import compared


def figure(measured: float | None, **given: Any) -> Figure:
    """Return a figure whose quartiles equal its median."""
    usual: dict[str, Any] = {"question": "q", "case": {"n": 1}, "metric": "time", "unit": "s", "better": "lower"}
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
    row = Row(figure(measured, unit="bytes", predicted=predicted, bound=bound))
    assert row.tone == tone
    if tone == "bound":
        assert row.ratio == f"{measured / 100:.2f}"


def spread(measured: float, share: float) -> Figure:
    return figure(measured, low=measured * (1 - share), high=measured * (1 + share))


@pytest.mark.parametrize(
    ("over", "under", "said"),
    [
        (spread(1.6, 0.5), spread(1.0, 0.5), "0.53 to 4.80 times as fast (unclear)"),
        (spread(1.6, 0.05), spread(1.0, 0.05), "1.60 times as fast"),
        (spread(1.3, 0.25), 1.0, "0.98 to 1.62 times as fast (unclear)"),
        (spread(1.0, 0.01), spread(1.0, 0.01), "1.00 times as fast"),
        (spread(20.0, 0.5), spread(1.0, 0.0), "20.00 times as fast"),
        (figure(3.0), figure(2.0), "1.50 times as fast"),
        (figure(3.0, low=None, high=None), figure(3.0, low=None, high=None), "1.00 times as fast"),
    ],
)
def test_verdict_needs_a_difference_above_the_spread(over: Figure, under: Figure | float, said: str) -> None:
    assert compared(over, under, "as fast") == said


ONCE: dict[str, Any] = {"low": None, "high": None}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (figure(1.0), figure(1.04), "unchanged"),
        (figure(1.0), figure(1.06), "worse"),
        (figure(1.06), figure(1.0), "better"),
        (figure(1.0, better="higher", unit="tokens/s"), figure(1.2, better="higher", unit="tokens/s"), "better"),
        (figure(1.0, unit="x"), figure(0.954, unit="x"), "unchanged"),
        (figure(1.0, unit="x"), figure(0.952, unit="x"), "better"),  # 5 % of the smaller value
        (figure(1.0, **ONCE), figure(1.4, **ONCE), "unchanged"),
        (figure(1.0, **ONCE), figure(1.6, **ONCE), "worse"),
        (figure(1000, unit="bytes", **ONCE), figure(1040, unit="bytes", **ONCE), "unchanged"),
        (figure(1.0, case={"n": 1, "calls": 3}), figure(1.0, case={"n": 1, "calls": 4}), "unchanged"),
        (figure(1.0, low=0.9, high=1.3), figure(1.4, low=1.2, high=1.5), "unchanged"),
        (figure(1.0, low=0.9, high=1.1), figure(1.4, low=1.2, high=1.5), "worse"),
        (figure(1.0, low=1.0, high=1.01), figure(1.03, low=1.02, high=1.04), "unchanged"),
        (figure(1000, unit="bytes", exact=True), figure(1001, unit="bytes", exact=True), "worse"),
        (figure(1000, unit="bytes", exact=True), figure(1000, unit="bytes", exact=True), "unchanged"),
        (figure(1.0, unit="nats"), figure(1.02, unit="nats"), "worse"),
        (figure(1.0, unit="nats", better=None), figure(1.02, unit="nats", better=None), "changed"),
        (figure(0.0, unit="nats"), figure(0.5, unit="nats"), "worse"),
    ],
)
def test_noise_is_no_change(old: Figure, new: Figure, verdict: str) -> None:
    (change,) = compare([old], [new])
    assert change.verdict == verdict


def test_changes_come_by_size_and_tell_new_from_gone() -> None:
    names = [{"n": n} for n in range(6)]
    old = [figure(v, case=case) for v, case in zip((1.0, 1.0, 1.0, 1.0, 1.0), names[:5], strict=True)]
    new = [figure(v, case=case) for v, case in zip((1.01, 1.5, 0.4, 1.2, 1.0), [*names[:4], names[5]], strict=True)]
    found = [(change.name.case["n"], change.verdict) for change in compare(old, new)]
    assert found == [(2, "better"), (1, "worse"), (3, "worse"), (4, "gone"), (5, "new"), (0, "unchanged")]
