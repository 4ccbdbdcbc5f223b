"""Verdicts: what is named, how often by chance, and how many seeds would decide."""

import random

import pytest

from dsmini.comparison.verdict import Word, p_value, seeds_to_decide, skewness, verdicts


def word_of(values: list[float], diverged: int = 0) -> Word:
    return verdicts({"arm": values}, 0.01, {"arm": diverged})["arm"].word


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([-0.03, -0.02, -0.025, -0.03, -0.02], "better"),
        ([-0.03, -0.02, -0.025, -0.03], "undecided"),  # four pairs
        ([0.03, 0.02, 0.025, 0.03, 0.02], "worse"),
        ([0.003, 0.004, 0.0035, 0.003, 0.004], "equal"),  # clearly above 0, and within the margin
        ([0.001, -0.001], "undecided"),
        ([0.0, 0.0], "equal"),  # to the bit
        ([0.001, -0.001, 0.0, 0.001, 0.0], "equal"),
        ([0.0145, -0.0125, 0.0095, 0.0045, -0.001], "undecided"),  # 1.5 errors within the margin, 2.13 are needed
        ([0.0095, -0.0035, 0.0055, 0.0005, 0.003], "equal"),  # 3.1 of them; an interval of 95 % asks for 2.78
        ([0.05, -0.04, 0.01], "undecided"),
        ([-0.03], "undecided"),
        ([], "undecided"),
    ],
)
def test_an_arm_is_named_by_its_interval(values: list[float], word: Word) -> None:
    assert word_of(values) == word


def test_an_arm_that_diverged_is_neither_better_nor_equal() -> None:
    assert word_of([-0.03, -0.02, -0.025, -0.03, -0.02], diverged=1) == word_of([], diverged=3) == "diverged"


def test_p_values_are_those_of_students_test() -> None:
    """Compare with scipy.stats.ttest_1samp, whose figures are written here."""
    assert p_value([0.1, 0.2, 0.15, 0.05]) == pytest.approx(0.030466, abs=1e-5)
    assert p_value([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.013236, abs=1e-5)
    assert p_value([0.0, 0.0]) == p_value([3.0]) == 1.0 and p_value([1.0, 1.0]) == 0.0


def test_several_arms_are_named_as_rarely_by_chance_as_one() -> None:
    """Simulate four arms that differ in nothing: 5 % of the comparisons name any, within three deviations."""
    rng, alarms = random.Random(0), 0
    for _ in range(400):
        found = verdicts({str(i): [rng.gauss(0, 1) for _ in range(8)] for i in range(4)}, 1e-9, {})
        alarms += any(each.word in ("better", "worse") for each in found.values())
    assert alarms <= 400 * 0.05 + 3 * (400 * 0.05 * 0.95) ** 0.5


def test_holm_names_an_arm_that_bonferroni_would_not() -> None:
    clear = {f"clear {i}": [1.0, 1.001, 1.0, 0.999, 1.0] for i in range(3)}
    found = verdicts(clear | {"weak": [0.2, 0.9, 0.6, 0.1, 0.9]}, 0.01, {})
    assert p_value([0.2, 0.9, 0.6, 0.1, 0.9]) > 0.05 / 4
    assert [each.word for each in found.values()] == ["worse"] * 4


@pytest.mark.parametrize(("mean", "arms"), [(0.0, 1), (0.0, 4), (0.002, 1), (0.015, 1)])
def test_four_of_five_new_comparisons_decide(mean: float, arms: int) -> None:
    """Simulate comparisons with the seeds that are said to decide; three deviations below 80 % are allowed."""
    rng, deviation, times = random.Random(2), 0.02, 200
    pilot = [mean + side * deviation * (5 / 6) ** 0.5 for side in (-1, 1) * 3]
    needed = seeds_to_decide(pilot, 0.01, arms)
    assert needed is not None
    decided = 0
    for _ in range(times):
        found = {str(arm): [rng.gauss(mean, deviation) for _ in range(needed)] for arm in range(arms)}
        decided += verdicts(found, 0.01, {})["0"].word != "undecided"
    assert decided / times >= 0.8 - 3 * (0.8 * 0.2 / times) ** 0.5


def test_skewed_differences_are_known_by_their_tail() -> None:
    rng = random.Random(3)
    even, skewed = ([draw() for _ in range(60)] for draw in (lambda: rng.gauss(0, 1), lambda: rng.lognormvariate(0, 1)))
    assert skewness(even) is None and skewness([0.0] * 9) is None and skewness([1.0, 2.0, 90.0]) is None
    assert (found := skewness(skewed)) is not None and found > 1
    assert (other := skewness([-x for x in skewed])) == pytest.approx(-found) and other < 0
