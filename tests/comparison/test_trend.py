"""Trends: slopes and intervals on made differences, each word, and the report of a folder."""

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmini.comparison.answer import draw
from dsmini.comparison.results import HEAD, Results, read_results
from dsmini.comparison.trend import Word, answer_of_trends, ladders_of, slope_of, word_of
from dsmini.measure.turns import students_t
from tests.helpers.commands import finish

QUESTION = "Does it hold?"
SIZES = (100_000, 200_000, 400_000)


def around(mean: float, spread: float = 0.001, n: int = 9) -> list[float]:
    """Return n values, a multiple of three, with this mean; some are `spread` below or above it."""
    return [mean + spread * (i % 3 - 1) for i in range(n)]


def results_of(
    size: int, arms: Mapping[str, Sequence[float | None]], stem: str = "", question: str = QUESTION, base: str = "base"
) -> Results:
    """Return a comparison whose base of this size has losses of 1 and whose arms differ by these; None diverged."""
    head = dict.fromkeys(HEAD, "") | {"dsmini": "1", "question": question, "margin": 0.01}
    seeds = max(map(len, arms.values()))
    by_arm: dict[str, list[float | None]] = {base: [1.0] * seeds}
    by_arm |= {arm: [None if d is None else 1.0 + d for d in of] for arm, of in arms.items()}
    lines: list[dict[str, Any]] = [
        {"arm": arm, "seed": seed, "loss": loss, "active": size if arm == base else None}
        for arm, losses in by_arm.items()
        for seed, loss in enumerate(losses)
    ]
    return Results(path=Path(f"{stem or size}.jsonl"), head=head | {"arms": {arm: {} for arm in by_arm}}, lines=lines)


def written(folder: Path, *comparisons: Results) -> None:
    """Write comparisons into a folder, as results.py does."""
    for each in comparisons:
        rows = [each.head, *each.lines]
        (folder / each.path).write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the slope


def test_differences_on_a_line_have_its_slope_exactly() -> None:
    """However much each size varies."""
    found = {size: around(0.03 - 0.01 * i, 0.001 * 4**i) for i, size in enumerate(SIZES)}
    assert slope_of(found).value == pytest.approx(-0.01, abs=1e-12)


def test_two_sizes_are_compared_by_welchs_test() -> None:
    """They are two doublings apart, with 6 and 9 pairs."""
    first, last = around(0.01, 0.004, 6), around(0.05, 0.001, 9)
    v = [statistics.variance(each) / len(each) for each in (first, last)]
    freedom = sum(v) ** 2 / (v[0] ** 2 / 5 + v[1] ** 2 / 8)
    slope = slope_of({SIZES[0]: first, SIZES[2]: last})
    assert (slope.value, slope.turns) == (pytest.approx(0.02), 15)
    assert slope.high - slope.value == pytest.approx(students_t(int(freedom)) * math.sqrt(sum(v)) / 2)


def test_sizes_off_a_line_are_weighted_by_what_is_known_of_them() -> None:
    """Compare with numpy's weighted fit, and its covariance of known errors."""
    found = {
        SIZES[0]: around(0.01, 0.003),
        SIZES[1]: around(0.035, 0.009),
        300_000: around(0.02, 0.002),
        SIZES[2]: around(0.03, 0.004),
    }
    errors = [math.sqrt(statistics.variance(each) / len(each)) for each in found.values()]
    means = [statistics.fmean(each) for each in found.values()]
    line, covariance = np.polyfit(np.log2([*found]), means, 1, w=1 / np.array(errors), cov="unscaled")
    slope = slope_of(found)
    assert slope.value == pytest.approx(line[0])
    freedom = round((slope.high - slope.value) / math.sqrt(covariance[0, 0]) * 1e4)
    assert freedom in [round(students_t(n) * 1e4) for n in range(8, 32)], (
        "of at least the smallest size, and at most all"
    )


def test_a_size_without_spread_has_finite_weight() -> None:
    found = {SIZES[0]: [0.0] * 6, SIZES[1]: around(0.01), SIZES[2]: around(0.02)}
    slope = slope_of(found)
    assert slope.value == pytest.approx(0.01, abs=1e-4) and slope.is_clear
    nothing = slope_of({size: [0.0] * 6 for size in SIZES})
    assert (nothing.value, nothing.low, nothing.high) == (0.0, pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_the_interval_holds_the_true_slope_in_95_of_100() -> None:
    """Simulate ladders of two and three sizes; three deviations less are allowed, and weights that are estimates."""
    rng, times = random.Random(5), 400
    for sizes, least in ((SIZES[::2], 0.95), (SIZES, 0.94)):
        inside = 0
        for _ in range(times):
            found = {
                size: [rng.gauss(0.02 * math.log2(size), deviation) for _ in range(n)]
                for size, deviation, n in zip(sizes, (0.03, 0.01, 0.005), (20, 12, 8), strict=False)
            }
            slope = slope_of(found)
            inside += slope.low <= 0.02 <= slope.high
        assert least - 3 * (0.95 * 0.05 / times) ** 0.5 <= inside / times < 0.99, (sizes, inside)


# --- the word


@pytest.mark.parametrize(
    ("means", "spread", "word"),
    [
        ((0.03, 0.031, 0.029), 0.001, "holds"),
        ((0.001, 0.0, -0.001), 0.0001, "holds"),  # on both sides of 0, within the margin
        ((0.01, 0.02, 0.03), 0.001, "grows"),
        ((-0.01, -0.02, -0.03), 0.001, "grows"),
        ((0.0, 0.02, 0.04), 0.001, "grows"),
        ((0.04, 0.02, 0.001), 0.001, "shrinks"),
        ((-0.04, -0.02, 0.0), 0.001, "shrinks"),
        ((0.03, 0.0, -0.03), 0.001, "turns"),
        ((-0.03, 0.02), 0.001, "turns"),
        ((0.03, 0.031, 0.029), 0.02, "undecided"),
        ((0.03, 0.06, 0.03), 0.001, "undecided"),  # the ends are equal, the middle is not
        ((-0.012, 0.0, 0.0125), 0.02, "undecided"),  # a clear slope between two ends that are not
        ((0.03,), 0.001, "undecided"),
    ],
)
def test_an_arm_has_the_word_of_its_trend(means: Sequence[float], spread: float, word: Word) -> None:
    assert word_of({size: around(mean, spread) for size, mean in zip(SIZES, means, strict=False)}, 0.01) == word


def test_five_pairs_at_each_size_are_the_least() -> None:
    found = {SIZES[0]: around(0.01)[:5], SIZES[1]: around(0.03)[:5]}
    assert word_of(found, 0.01) == "grows"
    assert word_of(found | {SIZES[1]: around(0.03)[:4]}, 0.01) == "undecided"


def test_many_arms_ask_for_more_than_one() -> None:
    found = {size: around(mean, 0.012) for size, mean in zip(SIZES, (0.012, 0.025, 0.04), strict=True)}
    assert (word_of(found, 0.01), word_of(found, 0.01, arms=2000)) == ("grows", "undecided")


def test_an_idea_without_effect_is_rarely_named() -> None:
    """Simulate three sizes without a difference: 5 % are named, within three deviations; the rest are held or open."""
    rng, times = random.Random(6), 300
    words = [word_of({size: [rng.gauss(0, 0.01) for _ in range(8)] for size in SIZES}, 0.01) for _ in range(times)]
    assert sum(word in ("grows", "shrinks", "turns") for word in words) / times <= 0.05 + 3 * (0.0475 / times) ** 0.5


# --- ladders


def test_comparisons_of_one_question_are_matched_by_size_and_arm() -> None:
    small, large = (results_of(size, {"a": around(0.01), "b": around(0.02)}) for size in (SIZES[0], SIZES[2]))
    again = results_of(SIZES[0], {"a": around(9.0)}, "again")
    other = [
        results_of(SIZES[1], {"a": around(9.0)}, question="Another?"),
        results_of(SIZES[1], {"a": [1.0]}, base="x"),
    ]
    (ladder,) = ladders_of([large, small, again, *other])
    assert [*ladder] == [SIZES[0], SIZES[2]] and ladder[SIZES[0]] is small
    trends = answer_of_trends(ladder).record["trends"]
    assert {arm: trend["word"] for arm, trend in trends.items()} == {"a": "holds", "b": "holds"}
    assert trends["b"]["differences"][SIZES[2]]["value"] == pytest.approx(0.02)
    assert ladders_of([small, again, *other]) == [], "one size"


def test_runs_that_diverged_or_are_missing_are_said() -> None:
    steps = [results_of(size, {"a": around(0.01), "b": around(0.02)}) for size in SIZES]
    steps[1] = results_of(SIZES[1], {"a": [*around(0.01), None]})
    (ladder,) = ladders_of(steps)
    answer = answer_of_trends(ladder)
    assert answer.sentences == [
        "a diverged at 200,000 active parameters, in 1 of its runs.",
        "b has no two pairs at 200,000 active parameters; its trend leaves that size out.",
    ]
    a, b = answer.record["trends"]["a"], answer.record["trends"]["b"]
    assert (a["word"], b["word"], [*b["differences"]]) == ("undecided", "holds", [SIZES[0], SIZES[2]])


def test_sizes_that_were_made_otherwise_are_said() -> None:
    small, large = (results_of(size, {"a": around(0.01)}) for size in SIZES[:2])
    large.lines = [line | {"sources": "4567", "scored": [[1, 9]]} for line in large.lines]
    (ladder,) = ladders_of([small, large])
    assert answer_of_trends(ladder).sentences == [
        "Its sizes are of other sources, other bytes of the text; what seems a trend may come from these."
    ]


def test_an_arm_with_one_size_has_no_slope(tmp_path: Path) -> None:
    (ladder,) = ladders_of([results_of(SIZES[0], {"a": around(0.01)}), results_of(SIZES[1], {"b": around(0.01)})])
    answer = answer_of_trends(ladder)
    assert {arm: trend["slope"] for arm, trend in answer.record["trends"].items()} == {"a": None, "b": None}
    draw(tmp_path / "trends.png", [answer])
    assert [*answer.table.rows[1]] == ["a", "each doubling", "", "undecided"]


def test_a_picture_has_each_size_and_below_them_the_slope() -> None:
    small, large = (results_of(size, {"a": around(mean)}) for size, mean in ((SIZES[0], 0.02), (SIZES[1], 0.05)))
    (ladder,) = ladders_of([large, small])
    rows = answer_of_trends(ladder).rows
    told = [(row.at, row.word, len(row.differences), row.mean and round(row.mean.value, 6)) for row in rows]
    assert told == [
        ("100,000", "worse", 9, 0.02),
        ("200,000", "worse", 9, 0.05),
        ("each doubling", "grows", 0, 0.03),
    ]


def test_a_number_of_parameters_that_is_none_is_refused(tmp_path: Path) -> None:
    broken = results_of(SIZES[0], {"a": around(0.01)})
    broken.lines[0]["active"] = "many"
    written(tmp_path, broken)
    with pytest.raises(ValueError, match=r"line 2 of .* is not a finished run"):
        read_results(tmp_path / broken.path)


def test_a_report_shows_trends_of_two_sizes_and_none_of_one(tmp_path: Path) -> None:
    small, large = (results_of(size, {"$a": around(mean)}) for size, mean in ((SIZES[0], 0.01), (SIZES[1], 0.04)))
    written(tmp_path, small)
    alone = finish("dsmini.compare --report . --json", tmp_path)
    assert len(json.loads(alone.stdout)) == 1 and "trend" not in alone.stderr
    assert not (tmp_path / "trends.png").exists()
    written(tmp_path, large)
    both = finish("dsmini.compare --report . --json", tmp_path)
    for words in (f"{QUESTION} By active parameters of base", "100,000", "each doubling", "grows", "+0.0300 ±"):
        assert words in both.stderr, words
    *_, trend = json.loads(both.stdout)
    assert trend["files"] == {"100000": "100000.jsonl", "200000": "200000.jsonl"}
    assert (trend["trends"]["$a"]["word"], trend["margin"]) == ("grows", 0.01)
    assert trend["trends"]["$a"]["slope"]["value"] == pytest.approx(0.03)
    assert (tmp_path / "trends.png").stat().st_size > 5000
