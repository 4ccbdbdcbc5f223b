"""Bounds and estimates next to measured systems, which measured.toml has with their sources."""

import re
from collections import Counter

import pytest

from dsmini.planner.request import presets
from tests.helpers.fitted import RANGES, fit, halves
from tests.helpers.measured import HIGH, LOW, PAGE, bound, estimate, page, rows

ROWS = {row.name: row for row in rows()}


@pytest.mark.parametrize("name", ROWS)
def test_no_bound_is_below_what_was_measured(name: str) -> None:
    row = ROWS[name]
    own, best = bound(row, own=True), bound(row, own=False)
    assert row.measured <= own and row.measured <= best
    assert row.source and row.measured > 0
    said = [*row.stated, *row.assumed]
    assert set(said) == row.inputs and len(said) == len(row.inputs), "each input is stated or assumed"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.half])
def test_estimate_is_near_what_was_measured_or_the_row_says_why_not(name: str) -> None:
    row = ROWS[name]
    ratio = (estimate(row) or 0) / row.measured
    assert (LOW <= ratio <= HIGH) != bool(row.apart), ratio
    assert ratio <= bound(row, own=True) / row.measured, "no estimate is above its bound"


def test_halves_are_about_equal_and_have_every_phase() -> None:
    halves = Counter(row.half for row in ROWS.values() if row.half)
    assert len(ROWS) >= 20 and abs(halves["fitted"] - halves["kept"]) < 8
    assert {row.phase for row in ROWS.values()} == {"decode", "prefill", "both", "training"}


def test_efficiencies_are_those_of_the_fit_to_one_half() -> None:
    ours = {name: presets()["assumed"][name][0] for name in RANGES}
    assert fit(halves()["fitted"]) == pytest.approx(ours)


def test_sources_are_spelled_out_where_they_are_used() -> None:
    named = [*re.findall(r"^\d+\. (.*)$", PAGE.read_text(), re.MULTILINE), *(row.apart for row in ROWS.values())]
    assert len(named) > 20 and {row.source for row in ROWS.values()} <= set(named)
    assert [said for said in named if re.search(r"\b(LM|TL|IX|VB|AIC)\b", said)] == []


@pytest.mark.slow
def test_page_of_the_documentation_is_as_computed() -> None:
    assert PAGE.read_text() == page(), "python -m tests.helpers.measured writes it again"
