"""Figures: numbers that are explained, titles in docstrings, and numbers in words."""

import pytest

from dsmini.planner.figure import Figure, attribute_docs, check_name, exactly, explain, figures_of, given, text
from dsmini.report.units import human


class Cache:
    """Cache of a token.

    Attributes:
        cache_row: Cache of a token in one layer.
        kv_cache: Cache of a token,
            all layers. Source: V2, table 1.
    """

    def __init__(self) -> None:
        self.cache_row = Figure((512 + 64) * 2, "B", "(kv_lora_rank + 64) * 2")
        self.kv_cache = Figure(61 * self.cache_row, "B/token", "n_layers * cache_row")


INPUTS = {"n_layers": given(61, "", "Layers", "a file"), "kv_lora_rank": given(512, "", "Width", "a file")}


def test_explanation_has_the_formula_the_numbers_and_the_inputs() -> None:
    figures = figures_of(Cache()) | INPUTS
    found = explain(figures, "kv_cache")
    row, cache = reversed(found["steps"])
    assert (cache.formula, cache.numbers) == ("n_layers × cache_row", "61 × 1.152 kB")  # noqa: RUF001
    assert (cache.value, cache.exact) == ("70.3 kB/token", "70,272 B/token")
    assert (cache.title, cache.source) == ("Cache of a token, all layers", "V2, table 1")
    assert row.formula == "(kv_lora_rank + 64) × 2"  # noqa: RUF001
    assert [(line.name, line.source) for line in found["inputs"]] == [
        ("n_layers", "a file"),
        ("kv_lora_rank", "a file"),
    ]
    assert all(len(line) <= 60 for line in text(found, 60).splitlines())
    near = explain(figures, "kv_cache", depth=1)
    assert [step.name for step in near["steps"] + near["inputs"]] == ["kv_cache", "cache_row", "n_layers"]


def test_names_of_a_stage_are_whole_in_formulas() -> None:
    found = figures_of(Cache(), "decode_{}")
    assert found["decode_kv_cache"].formula == "n_layers * decode_cache_row"
    assert attribute_docs(Cache)["cache_row"] == ("Cache of a token in one layer", "")
    with pytest.raises(ValueError, match="unknown figure 'kv_cach'; did you mean decode_kv_cache"):
        check_name(found, "kv_cach")


WORDS = [
    (70272, "B/token", "70.3 kB/token"),
    (54.5 * 86400, "s", "54.5 days"),
    (3.37 * 365.25 * 86400, "s", "3.37 years"),
    (1019.05, "s", "17.0 min"),
    (0, "s", "0 s"),
    (3e-10, "s", "0.300 ns"),
    (5.576e6, "$", "$5.58 million"),
    (2 / 3600, "$/s", "$2.00/h"),
    (2.38e-7, "$/token", "$0.238 per million tokens"),
    (0.9824, "", "0.982"),
    (2176.0, "token", "2,176 tokens"),
]


@pytest.mark.parametrize(("value", "unit", "wanted"), WORDS)
def test_value_in_words(value: float, unit: str, wanted: str) -> None:
    assert human(float(value) if unit else value, unit) == wanted


def test_input_is_shown_as_it_was_given() -> None:
    peak = given(1978.9e12, "FLOP/s", "Peak", "a data sheet")
    assert (str(peak), exactly(peak)) == ("1.9789 PFLOP/s", "1,978,900,000,000,000 FLOP/s")
