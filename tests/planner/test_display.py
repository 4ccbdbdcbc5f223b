"""Quantities in words."""

import pytest

from dsmini.planner.quantities.display import exactly, shown
from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    BYTES_PER_TOKEN,
    COUNT,
    DOLLARS,
    DOLLARS_PER_SECOND,
    FLOPS,
    FLOPS_PER_SECOND,
    FLOPS_PER_TOKEN,
    PER_SECOND,
    SECONDS,
    SECONDS_PER_TOKEN,
    TOKENS,
    TOKENS_PER_SECOND,
    WATTS,
    Anything,
    per,
)

FIGURES: list[tuple[Anything, str, str]] = [
    (BYTES(80e9), "80 GB", "80,000,000,000 B"),
    (BYTES(671_026_404_352), "671 GB", "671,026,404,352 B"),
    (BYTES(999.0), "999 B", "999 B"),
    (BYTES(1e12), "1 TB", "1,000,000,000,000 B"),
    (BYTES(999e9), "999 GB", "999,000,000,000 B"),
    (BYTES_PER_TOKEN(70_272), "70.3 kB/token", "70,272 B/token"),
    (BYTES_PER_TOKEN(0.5), "0.500 B/token", "0.5 B/token"),
    (BYTES_PER_SECOND(3.35e12), "3.35 TB/s", "3,350,000,000,000 B/s"),
    (FLOPS(3.79e25), "3.79e25 FLOP", "3.79e+25 FLOP"),
    (FLOPS_PER_TOKEN(250.4e9), "250 GFLOP/token", "250,400,000,000 FLOP/token"),
    (FLOPS_PER_SECOND(1978.9e12), "1.98 PFLOP/s", "1,978,900,000,000,000 FLOP/s"),
    (FLOPS_PER_SECOND(989.4e12) / BYTES_PER_SECOND(3.35e12), "295 FLOP/B", "295.3432836 FLOP/B"),
    (SECONDS(0), "0 s", "0 s"),
    (SECONDS(120.96e-6), "121 µs", "0.00012096 s"),
    (SECONDS(14.757e-3), "14.8 ms", "0.014757 s"),
    (SECONDS(19.926), "19.9 s", "19.926 s"),
    (SECONDS(119.5), "120 s", "119.5 s"),
    (SECONDS(300), "5 min", "300 s"),
    (SECONDS(1.803 * 3600), "1.80 h", "6,490.8 s"),
    (SECONDS(86400), "24 h", "86,400 s"),
    (SECONDS(54 * 86400), "54 days", "4,665,600 s"),
    (SECONDS(1379 * 86400), "1,379 days", "119,145,600 s"),
    (SECONDS(2_788_123 * 3600), "2.79 million h", "10,037,242,800 s"),
    (SECONDS_PER_TOKEN(0.0148), "14.8 ms/token", "0.0148 s/token"),
    (PER_SECOND(67.8), "67.8 per s", "67.8 per s"),
    (PER_SECOND(1 / 6490), "13.3 per day", "0.0001540832049 per s"),
    (PER_SECOND(3 / 3600), "3 per h", "0.0008333333333 per s"),
    (PER_SECOND(6.5e-3 / 86400), "0.00650 per day", "7.523148148e-08 per s"),
    (TOKENS(4096), "4,096 tokens", "4,096 tokens"),
    (TOKENS(14.8e12), "14.8 trillion tokens", "14,800,000,000,000 tokens"),
    (TOKENS_PER_SECOND(272.8e9 / 86400), "3.16 million tokens/s", "3,157,407.407 tokens/s"),
    (TOKENS_PER_SECOND(67.76), "67.8 tokens/s", "67.76 tokens/s"),
    (DOLLARS(5_576_000), "$5.58 million", "$5,576,000"),
    (DOLLARS(1234.5), "$1,234", "$1,234.5"),
    (DOLLARS(0.25), "$0.250", "$0.25"),
    (DOLLARS(-3), "-$3.00", "$-3"),
    (DOLLARS_PER_SECOND(2 / 3600), "$2.00/h", "0.0005555555556 $/s"),
    (per(DOLLARS(2.7e-7), TOKENS), "$0.270 per million tokens", "2.7e-07 $/token"),
    (WATTS(1275), "1.27 kW", "1,275 J/s"),
    (WATTS(700) * SECONDS(3.6e6), "700 kWh", "2,520,000,000 J"),
    (COUNT(671_026_404_352), "671,026,404,352", "671,026,404,352"),
    (COUNT(2**70), "1.18e21", "1,180,591,620,717,411,303,424"),
    (COUNT(0.3894), "0.389", "0.3894"),
    (COUNT(37.5e9 + 0.5), "37.5 billion", "3.75e+10"),
]


@pytest.mark.parametrize(("figure", "people", "digits"), FIGURES)
def test_figures_are_shown_in_three_digits(figure: Anything, people: str, digits: str) -> None:
    named = figure.named("figure", "Figure")
    assert (shown(named), exactly(named)) == (people, digits)


@pytest.mark.parametrize(
    ("value", "people"),
    [
        (FLOPS_PER_SECOND(989.4e12, "peak"), "989.4 TFLOP/s"),
        (BYTES_PER_SECOND(1.555e12, "bandwidth"), "1.555 TB/s"),
        (COUNT(6.5e-3, "failures"), "0.0065"),
        (COUNT(1234567.5, "mean"), "1.23457 million"),
        (WATTS(1787.5, "power"), "1.7875 kW"),
        (DOLLARS_PER_SECOND(2 / 3600, "price"), "$2.00/h"),
        (SECONDS(3.7e-6, "latency"), "3.7 µs"),
        (SECONDS(86400), "24 h"),
        (COUNT(0.5), "0.5"),
    ],
)
def test_inputs_are_shown_as_they_were_given(value: Anything, people: str) -> None:
    assert shown(value) == people
