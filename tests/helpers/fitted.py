"""Efficiencies of serving, fitted to the half of measured.toml that is named there: python -m tests.helpers.fitted.

The rule. Each efficiency stays in the range that kernels reach alone, by the sources next to it in presets.toml.
Assumed are the lower end of attention_bandwidth, and the ranges of expert_imbalance and step_latency. Start in the
middle of all ranges. Set one after the other to the best of STEPS equal steps of its range, all others held, until a
round changes none. Best is the least sum of squares of log(estimate / measured) over the fitted rows of serving. The
value nearest to the middle wins a tie, so what no row depends on stays there. No kept row is read.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsmini.planner.figure import Figure
from dsmini.planner.request import presets
from tests.helpers.measured import HIGH, LOW, Row, estimate, rows

RANGES: Mapping[str, list[float]] = tomllib.loads(Path(__file__).with_name("ranges.toml").read_text())
STEPS = 8


def ratios(found: Sequence[Row], values: Mapping[str, float]) -> dict[str, float]:
    """Return estimate over measured of some rows with other efficiencies."""
    for row in found:
        known = row.service.a.known
        known |= {name: Figure(name, value, "", "", "fitted") for name, value in values.items()}
    return {row.name: (estimate(row) or 0) / row.measured for row in found}


def halves() -> dict[str, list[Row]]:
    """Return the rows of serving that have an estimate, by their half."""
    served = [row for row in rows() if row.half and row.phase != "training"]
    return {half: [row for row in served if row.half == half] for half in ("fitted", "kept")}


def fit(found: Sequence[Row]) -> dict[str, float]:
    """Return the efficiencies of the rule, in two digits."""
    steps = {name: [low + (high - low) * i / STEPS for i in range(STEPS + 1)] for name, (low, high) in RANGES.items()}
    values = {name: each[STEPS // 2] for name, each in steps.items()}

    def error(values: Mapping[str, float]) -> float:
        return sum(math.log(ratio) ** 2 for ratio in ratios(found, values).values())

    before: dict[str, float] = {}
    while before != values:
        before = dict(values)
        for name, each in steps.items():
            middle = each[STEPS // 2]
            tried = [(round(error(values | {name: value}), 9), abs(value - middle), value) for value in each]
            values[name] = min(tried)[2]
    return {name: float(f"{value:.2g}") for name, value in values.items()}


def main() -> None:
    """Print the fitted efficiencies next to those of the code, and both halves with each."""
    each = halves()
    ours = {name: presets()["assumed"][name][0] for name in RANGES}
    found = fit(each["fitted"])
    for name, value in found.items():
        low, high = RANGES[name]
        print(f"{name:24} {value:10.3g}   in the code {ours[name]:.3g}, kernels alone {low:.3g} to {high:.3g}")
    for half, of in each.items():
        by = ratios(of, found)
        good, middle = sum(LOW <= ratio <= HIGH for ratio in by.values()), sorted(by.values())[len(by) // 2]
        spread = math.exp(math.sqrt(sum(math.log(ratio) ** 2 for ratio in by.values()) / len(by)))
        print(f"{half}: {good} of {len(by)} from {LOW} to {HIGH}, median {middle:.2f}, typical factor {spread:.2f}")
        print("  " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in by.items()))


if __name__ == "__main__":
    main()
