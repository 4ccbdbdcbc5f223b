"""Numbers in readable units."""

import pytest

from dsmini.report import units


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


def test_exact_counts_are_shown_whole() -> None:
    assert units.human(671_026_404_352, "", exact=True) == "671,026,404,352"
