"""Figures: arithmetic that remembers itself, names that are declared, explanations, and numbers in words."""

import numpy as np
import pytest

from dsmini.accounting.tensors import ceiling, largest, smallest, total
from dsmini.planner.figure import Figure, Sheet, call
from dsmini.planner.words import exactly, explain, shown, step_of, text
from dsmini.report.units import human


def cache_sheet() -> Sheet:
    s = Sheet()
    s.put("n_layers", 61, "a file")
    s.put("kv_lora_rank", 512, "a file")
    s.cache_row = (s.kv_lora_rank + 64) * 2
    s.kv_cache = s.n_layers * s.cache_row
    return s


def test_a_formula_gives_the_same_for_numbers_arrays_and_figures() -> None:
    def formula(a, b):  # pyright: ignore
        return total([largest(a, 2 * b), smallest(a, b), ceiling(a, b), (a - 1) / (b + 3) ** 2])

    rows = np.array([[5.0, 3.0], [4.0, 9.0], [128.0, 1.0]]).T
    by_array = formula(*rows)
    for i in range(3):
        a, b = (float(x) for x in rows[:, i])
        found = formula(Figure(a), Figure(b))
        assert found.value == pytest.approx(formula(a, b)) == pytest.approx(by_array[i])


def test_whole_numbers_stay_exact_beyond_64_bits() -> None:
    assert (Figure(2**62) * Figure(8) + 1).value == 2**65 + 1
    assert ceiling(2**62 + 1, 2**61) == 3


def test_explanation_has_the_formula_the_numbers_and_the_inputs() -> None:
    found = explain(cache_sheet().kv_cache)
    assert [step.name for step in found["steps"]] == ["kv_cache", "cache_row"]
    assert (found["steps"][0].formula, found["steps"][0].numbers) == ("n_layers × cache_row", "61 × 1.152 kB")  # noqa: RUF001
    assert (found["steps"][0].value, found["steps"][0].exact) == ("70.3 kB/token", "70,272 B/token")
    assert found["steps"][1].formula == "(kv_lora_rank + 64) × 2"  # noqa: RUF001
    assert [(line.name, line.source) for line in found["inputs"]] == [
        ("n_layers", "a file"),
        ("kv_lora_rank", "a file"),
    ]
    assert all(len(line) <= 60 for line in text(found, 60).splitlines())


def test_parentheses_are_written_where_they_are_needed() -> None:
    a, b, c = (Figure(x, "input", (), name) for x, name in ((2, "dim"), (3, "batch"), (4, "tensor")))
    cases = {
        "dim - (batch - tensor)": a - (b - c),
        "dim / (batch × tensor)": a / (b * c),  # noqa: RUF001
        "dim / batch / tensor": a / b / c,
        "(1 - dim)^batch": (1 - a) ** b,
        "max(dim + batch, tensor)": np.maximum(a + b, c),
        "places_hit(dim, 2)": call("places_hit", lambda x, y: x + y, a, 2),
    }
    for written, figure in cases.items():
        assert step_of(Figure(figure.value, "name", (figure,), "kv_cache")).formula == written


def test_name_that_is_not_declared_raises() -> None:
    s = Sheet()
    with pytest.raises(AttributeError, match=r"kv_cach is not in titles\.toml"):
        s.kv_cach = 3
    with pytest.raises(AttributeError, match="kv_cache was not computed"):
        _ = s.kv_cache
    assert s.get("kv_cache") is None and s.get("kv_cache", 0) == 0


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
    given = Figure(1978.9e12, "input", (), "peak_fp8", "a data sheet")
    assert (shown(given), exactly(given)) == ("1.9789 PFLOP/s", "1,978,900,000,000,000 FLOP/s")
