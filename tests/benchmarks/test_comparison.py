"""Changes between two runs: noise is no change, counts are compared exactly."""

from typing import Any

import pytest

from benchmarks.comparison import compare
from dsmini.report import Figure


def figure(measured: float | None, **given: Any) -> Figure:
    """Return a figure whose interval is its median."""
    usual: dict[str, Any] = {"question": "q", "case": {"n": 1}, "metric": "time", "unit": "s", "better": "lower"}
    return Figure(**{**usual, "low": measured, "high": measured, **given}, measured=measured)


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
