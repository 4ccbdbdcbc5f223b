"""The stopwatch on a clock that the test moves, and the statistic next to draws whose truth is known."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dsmini.measure.turns import (
    TAIL,
    Turns,
    in_turns,
    least_turns,
    mean_of,
    median_of,
    order_of,
    reported,
    sign_interval,
    students_t,
)
from tests.conftest import Clock

CPU = torch.device("cpu")

# --- the stopwatch


def test_runs_change_places_after_a_warm_up(clock: Clock) -> None:
    """Check that each run comes at each place, and that one on which others depend stays first."""
    works = {name: clock.work(name, 9.0, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    taken = in_turns(works, count=3)
    assert "".join(clock.log) == "abc" + "abc" + "bca" + "cab"
    assert taken.seconds == {"a": [1] * 3, "b": [2] * 3, "c": [3] * 3} and taken.count == 3
    clock.log.clear()
    in_turns(works, count=3, first="b")
    assert "".join(clock.log) == "abc" + "bac" + "bca" + "bac"


@pytest.mark.parametrize("n", range(2, 9))
def test_each_run_follows_each_other_one_equally_often(n: int) -> None:
    """Check all pairs of neighbours, so that what one run leaves in the caches cancels, and all places."""
    turns = [order_of(n, turn) for turn in range(n * (1 + n % 2))]
    pairs = Counter(pair for order in turns for pair in itertools.pairwise(order))
    assert len(pairs) == n * (n - 1) and len(set(pairs.values())) == 1
    assert all(sorted(order) == list(range(n)) for order in turns)
    assert all(len({order[at] for order in turns}) == n for at in range(n))


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
    turns = Turns({"ours": [1.0, 10.0, 1.0, 3.0, 2.0, 2.0], "theirs": [2.0, 20.0, 2.0, 6.0, 4.0, 4.0]})
    found = turns.ratio("theirs", "ours")
    assert found.low == found.value == found.high == 2 and found.turns == 6
    assert turns.median("ours") == 2
    with pytest.raises(ValueError, match="zip"):
        Turns({"a": [1.0], "b": [1.0, 2.0]}).ratio("a", "b")


def test_few_turns_have_no_interval() -> None:
    found = median_of([1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.low, found.high, found.is_clear) == (2.5, -math.inf, math.inf, False)
    for tail, least in ((TAIL, 6), (0.05, 5), (0.05 / 4, 7), (0.05 / 8, 8)):
        assert least_turns(tail) == least and 2**-least <= tail < 2 ** (1 - least)
        assert [median_of(range(n), tail=tail).is_clear for n in (least - 1, least)] == [False, True]
        assert [sign_interval(range(n), tail).is_clear for n in (least - 1, least)] == [False, True]
    with pytest.raises(ValueError, match="got none"):
        median_of([])


@pytest.mark.parametrize("n", [6, 7, 20])
@pytest.mark.parametrize(
    ("draw", "truth"), [(lambda rng, n: rng.normal(0, 1, n), 0.0), (lambda rng, n: rng.exponential(1, n), math.log(2))]
)
def test_interval_of_a_median_holds_the_truth(n: int, draw: Callable[..., np.ndarray], truth: float) -> None:
    """In 400 samples, at least 91 % hold it: the promised 95 % less three standard errors. An interval of turns that
    were counted twice would not."""
    rng = np.random.default_rng(n)
    found = [median_of(draw(rng, n), seed) for seed in range(400)]
    assert sum(each.low <= truth <= each.high for each in found) >= 0.91 * 400


@pytest.mark.parametrize("n", [9, pytest.param(20, marks=pytest.mark.slow)])
def test_best_of_five_intervals_is_corrected(n: int) -> None:
    """In 400 times five samples, at most 2.5 % and three standard errors have a lower end above the truth."""
    rng = np.random.default_rng(n)
    samples = [rng.normal(0, 1, (5, n)) for _ in range(400)]
    most = 400 * 0.025 + 3 * (400 * 0.025) ** 0.5
    wrong = {k: sum(max(median_of(each, tail=TAIL / k).low for each in five) > 0 for five in samples) for k in (1, 5)}
    assert wrong[5] <= most < wrong[1]


def test_interval_of_a_mean_is_students() -> None:
    found = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    assert [found.high - 3, 3 - found.low] == pytest.approx([2.776 * 2.5**0.5 / 5**0.5] * 2, rel=1e-3)
    assert not mean_of([1.0]).is_clear
    for freedom, want in ((1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (30, 2.042), (1000, 1.962)):
        assert students_t(freedom) == pytest.approx(want, abs=1e-3)
    assert students_t(9, 0.01) == pytest.approx(2.821, abs=1e-3)
