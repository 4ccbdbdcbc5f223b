"""Failures: the share of the time that trains, against runs with random failures."""

import functools
import math

import numpy as np
import pytest

from dsmini.planner.request import Inputs, PlanRequest
from dsmini.planner.run import Failures

SIMULATED = 0.004
"""Relative standard error of 100,000 failures: 1 / sqrt(100,000) for an exponential time, and less for a ratio of two
sums that go together."""


def failures(gpus: float, write: float, restart: float = 300) -> Failures:
    request = PlanRequest(restart_time=restart, checkpoint_halt=write)
    return Failures(Inputs(request=request, sources={}), gpus)


@functools.cache
def mean_time(gpus: float) -> float:
    return failures(gpus, 1e-9, 1e-9).mean_time_to_failure


def trained(gpus: float, write: float, interval: float, seed: int) -> float:
    """Return the share of the time that trains in a run with 100,000 random failures, in restarts and writes too.

    Each time between two failures is drawn from an exponential distribution. It begins with the restart, and then
    trains and writes in turns. The work since the last complete checkpoint is lost.
    """
    time = np.random.default_rng(seed).exponential(mean_time(gpus), 100_000)
    work = np.floor(np.maximum(time - 300, 0.0) / (interval + write)) * interval
    return float(work.sum() / time.sum())


@pytest.mark.parametrize(
    ("gpus", "write"), [(1024, 10), (1024, 300), (16_384, 300), (131_072, 10), (131_072, 300), (1_000_000, 10)]
)
def test_share_of_the_time_agrees_with_a_simulation(gpus: int, write: float) -> None:
    made = failures(gpus, write)
    found, interval = made.effective_share, made.checkpoint_interval
    # rare cycles count for more: one in 1 / found failures completes any
    assert found == pytest.approx(trained(gpus, write, interval, gpus), rel=4 * SIMULATED / math.sqrt(found))


@pytest.mark.parametrize("gpus", [1024, 131_072])
@pytest.mark.parametrize("write", [1, 300])
def test_interval_is_near_the_best_of_a_search(gpus: int, write: float) -> None:
    """Young's is the first term of a series whose terms fall by the root of w / 2 M."""
    found = failures(gpus, write).checkpoint_interval
    tried = np.exp(np.linspace(math.log(found / 30), math.log(found * 30), 2_001))

    def share(interval: float) -> float:
        other = failures(gpus, write)
        vars(other)["checkpoint_interval"] = interval
        return other.effective_share

    best = max(map(float, tried), key=share)
    assert found == pytest.approx(best, rel=2 * math.sqrt(write / (2 * mean_time(gpus))) + 1e-3)
