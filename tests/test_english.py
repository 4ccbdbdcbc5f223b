"""Prose is plain: openings and words that slow a reader down stay below 4 in 10,000 words of every folder."""

import pytest

from tests.helpers.english import PLACES, RULES, found, words

PER_10_000_WORDS = 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", PLACES)
def test_prose_is_plain(place: str, rule: str) -> None:
    places = found(place, rule)
    assert len(places) <= max(1, PER_10_000_WORDS * words(place) / 10_000), places


def test_headless_clauses_are_found() -> None:
    rule = RULES["headless clause"]
    for text in ("What is saved.", "Return it. Of each layer, the bytes.", "Whether it is"):
        assert rule.search(text), text
    for text in ("Return what is saved.", "What is saved?", "Of which kind is it?", "Offsets of groups."):
        assert not rule.search(text), text
