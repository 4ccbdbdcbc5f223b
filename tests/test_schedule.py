"""Schedules over a run, against values worked out by hand."""

import pytest

from dsmini import TrainConfig
from dsmini.schedule import learning_rate_share


def test_the_learning_rate_rises_to_the_peak_and_falls_to_its_final_share() -> None:
    train = TrainConfig(steps=101, warmup=0.1, lr=2.0, lr_final=0.1)
    by_hand = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 55: 1.1, 100: 0.2}
    for step, want in by_hand.items():
        assert 2.0 * learning_rate_share(step, train) == pytest.approx(want), step
    rates = [learning_rate_share(step, train) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(steps: int) -> None:
    rates = [learning_rate_share(step, TrainConfig(steps=steps)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
