"""Failures: the share of the time that trains, against runs with random failures."""

import functools
import math
from typing import Any

import numpy as np
import pytest

from dsmini.planner.figure import Sheet
from dsmini.planner.reliability import failure_rate, first_order_share, share_at_any_rate
from tests.helpers.plans import plan_of, values_of

SIMULATED = 0.004
"""Relative standard error of 100,000 failures: 1 / sqrt(100,000) for an exponential time, and less for a ratio of two
sums that go together."""


@functools.cache
def mean_time(gpus: float) -> float:
    s = Sheet(explained=False)
    s.put("gpus", gpus, "")
    s.put("failures_per_node_day", 6.5e-3, "")
    failure_rate(s)
    return s.mean_time_to_failure


def shares(gpus: float, write: float, restart: float = 300, interval: float = 0) -> tuple[float, float, float]:
    """Return the share to first order, the one at any rate, and the interval: if it is 0, the planner's."""
    mean = mean_time(gpus)
    interval = interval or math.sqrt(2 * write * mean)
    return (*(share(mean, interval, restart, write) for share in (first_order_share, share_at_any_rate)), interval)


def trained(gpus: float, write: float, interval: float, seed: int, in_recovery: bool = True) -> float:
    """Return the share of the time that trains in a run with 100,000 random failures.

    Each time between two failures is drawn from an exponential distribution. It begins with the restart, and then
    trains and writes in turns. The work since the last complete checkpoint is lost.

    Args:
        in_recovery: failures also happen during a restart; else the clock of failures stands still.
    """
    restart, failures = 300, 100_000
    time = np.random.default_rng(seed).exponential(mean_time(gpus), failures)
    running = np.maximum(time - restart, 0.0) if in_recovery else time
    work = np.floor(running / (interval + write)) * interval
    return float(work.sum() / (time.sum() + (0.0 if in_recovery else failures * restart)))


@pytest.mark.parametrize(("gpus", "write"), [(512, 1), (2048, 10), (8192, 60), (12_000, 10), (1024, 300)])
def test_first_order_share_agrees_with_a_simulation(gpus: int, write: float) -> None:
    """Restart, interval and write are together below a sixth of the time to failure."""
    share, _, interval = shares(gpus, write)
    assert 300 + interval + write < mean_time(gpus) / 6
    for in_recovery in (True, False):
        assert share == pytest.approx(trained(gpus, write, interval, gpus, in_recovery), rel=0.02)


@pytest.mark.parametrize("gpus", [1024, 16_384, 131_072, 1_000_000])
@pytest.mark.parametrize("write", [10, 300])
def test_share_at_any_rate_agrees_with_a_simulation(gpus: int, write: float) -> None:
    _, share, interval = shares(gpus, write)
    # rare cycles count for more: one in 1 / share failures completes any
    assert share == pytest.approx(trained(gpus, write, interval, gpus), rel=4 * SIMULATED / math.sqrt(share))


@pytest.mark.parametrize("gpus", [1024, 131_072])
@pytest.mark.parametrize("write", [1, 300])
def test_interval_is_near_the_best_of_a_search(gpus: int, write: float) -> None:
    """Young's is the first term of a series whose terms fall by the root of w / 2 M."""
    found = shares(gpus, write)[2]
    tried = np.exp(np.linspace(math.log(found / 30), math.log(found * 30), 20_001))
    best = tried[np.argmax([shares(gpus, write, interval=float(one))[1] for one in tried])]
    assert found == pytest.approx(best, rel=2 * math.sqrt(write / (2 * mean_time(gpus))) + 1e-3)


def test_checkpoint_and_cost_by_hand() -> None:
    found = values_of("deepseek-v3")
    assert found["checkpoint_bytes"] == 682_636_472_320 * 8
    assert found["checkpoint_write_time"] == pytest.approx(682_636_472_320 * 8 / 256 / (10 * 2**30))
    assert found["elapsed_cost"] == pytest.approx(2048 * found["elapsed_time"] * 2 / 3600)
    fp32: Any = plan_of("toy @laptop").sheet
    assert fp32.checkpoint_bytes == fp32.parameters_total * (4 + fp32.state_moments), (
        "FP32 weights are their own masters"
    )
