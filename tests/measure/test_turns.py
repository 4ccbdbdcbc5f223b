"""The stopwatch on a clock that the test moves, and the statistic next to draws whose truth is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dsmini.measure.turns import Turns, in_turns, mean_of, median_of, reported, students_t
from tests.conftest import Clock

CPU = torch.device("cpu")

# --- the stopwatch


def test_runs_take_turns_after_a_warm_up(clock: Clock) -> None:
    taken = in_turns({"a": clock.work("a", 9.0, 1.0), "b": clock.work("b", 9.0, 2.0)}, count=2)
    assert clock.log == list("ababab")
    assert taken.seconds == {"a": [1, 1], "b": [2, 2]} and taken.count == 2


@pytest.mark.parametrize(
    ("seconds", "least", "turns"), [(0.0, 1, 1), (0.0, 3, 3), (8.9, 1, 1), (9.0, 1, 2), (math.inf, 1, 5)]
)
def test_no_turn_begins_that_would_end_too_late(clock: Clock, seconds: float, least: int, turns: int) -> None:
    """A turn takes 3 s, the one to warm up included."""
    runs = {"a": clock.work("a", 1.0), "b": clock.work("b", 2.0)}
    taken = in_turns(runs, count=5, seconds=seconds, least=least)
    assert taken.seconds == {"a": [1] * turns, "b": [2] * turns}


def test_mean_of_the_repeats_counts_a_rare_stall(clock: Clock) -> None:
    run = clock.work("a", 1.0, 7.0, 1.0, 1.0, 1.0, 5.0, 7.0, 1.0, 1.0, 1.0, 1.0)
    taken = in_turns({"a": run}, count=2, repeats=4, uncounted=1)
    assert taken.seconds["a"] == [2.0, 1.0], "7 s are the first of each turn, on a cold cache"


def test_short_runs_are_repeated_until_they_can_be_timed(clock: Clock) -> None:
    runs = {"short": clock.work("s", 5.0, 0.25), "long": clock.work("l", 2.0)}
    taken = in_turns(runs, count=1, least_seconds=1.0)
    assert "".join(clock.log) == "ssllssssl", "compilation does not make a short run long"
    assert taken.seconds == {"short": [0.25], "long": [2.0]}


def test_runs_may_report_their_own_seconds(clock: Clock) -> None:
    left = iter([9.0, 1.0, 3.0])
    assert in_turns({"a": lambda: next(left)}, count=1, repeats=2, clock=reported).seconds == {"a": [2.0]}


def test_turns_that_were_interrupted_are_whole(clock: Clock) -> None:
    seen: list[tuple[float, Turns]] = []

    def stop(share: float, turns: Turns) -> None:
        seen.append((share, turns))
        if turns.count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_turns({"a": clock.work("a", 1.0), "b": clock.work("b", 1.0)}, count=4, on_turn=stop)
    assert [share for share, _ in seen] == [0, 0.25, 0.5]
    assert seen[-1][1].seconds == {"a": [1, 1], "b": [1, 1]}


# --- the statistic


def test_slow_turns_cancel_in_pairs() -> None:
    turns = Turns({"ours": [1.0, 10.0, 1.0, 3.0, 2.0], "theirs": [2.0, 20.0, 2.0, 6.0, 4.0]})
    found = turns.ratio("theirs", "ours")
    assert found.low == found.value == found.high == 2 and found.turns == 5
    assert turns.median("ours") == 2
    with pytest.raises(ValueError, match="zip"):
        Turns({"a": [1.0], "b": [1.0, 2.0]}).ratio("a", "b")


def test_few_turns_have_no_interval() -> None:
    found = median_of([1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.low, found.high, found.is_clear) == (2.5, -math.inf, math.inf, False)
    assert median_of([5.0, 1.0, 2.0, 4.0, 3.0]).is_clear
    with pytest.raises(ValueError, match="got none"):
        median_of([])


@pytest.mark.parametrize("n", [5, 7, 20])
@pytest.mark.parametrize(
    ("draw", "truth"), [(lambda rng, n: rng.normal(0, 1, n), 0.0), (lambda rng, n: rng.exponential(1, n), math.log(2))]
)
def test_interval_of_a_median_holds_the_truth(n: int, draw: Callable[..., np.ndarray], truth: float) -> None:
    """In 400 samples, at least 91 % hold it: the promised 95 % less three standard errors. An interval of turns that
    were counted twice would not."""
    rng = np.random.default_rng(n)
    found = [median_of(draw(rng, n), seed) for seed in range(400)]
    assert sum(each.low <= truth <= each.high for each in found) >= 0.91 * 400


@pytest.mark.parametrize("n", [9, 20])
def test_best_of_five_intervals_is_corrected(n: int) -> None:
    """In 400 times five samples, at most 2.5 % and three standard errors have a lower end above the truth."""
    rng = np.random.default_rng(n)
    samples = [rng.normal(0, 1, (5, n)) for _ in range(400)]
    most = 400 * 0.025 + 3 * (400 * 0.025) ** 0.5
    wrong = {k: sum(max(median_of(each, together=k).low for each in five) > 0 for five in samples) for k in (1, 5)}
    assert wrong[5] <= most < wrong[1]


def test_interval_of_a_mean_is_students() -> None:
    found = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    assert found.high - 3 == 3 - found.low == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert not mean_of([1.0]).is_clear
    for freedom, want in ((1, 12.706), (9, 2.262), (10, 2.228), (20, 2.086), (30, 2.042), (1000, 1.962)):
        assert students_t(freedom) == pytest.approx(want, abs=3e-3)
