"""Figures: numbers that are explained, with titles in docstrings."""

import pytest

from dsmini.planner.figure import Figure, check_name, counted, exactly, explain, figure, figures_of, text


class Cache:
    """Cache of a token."""

    kv_lora_rank, n_layers, absent = 512, 61, None

    def __init__(self, stage: str = "", dtype: str = "bf16") -> None:
        self.stage, self.dtype = stage, dtype
        self.rope = Figure("rope", 64, "", "Width", "a page")

    @counted("B")
    def scales(self) -> int:
        """Scales of a row."""
        return sum(4 for _ in range(4))

    @figure("B")
    def cache_row(self) -> float:
        """Cache of a token in one layer."""
        width = self.kv_lora_rank + self.rope
        if self.dtype == "fp8":
            return width + self.scales
        return width * self.bytes_of_a_number()

    @figure("B/token")
    def kv_cache(self) -> float:
        """Cache of a token,
        all layers. Source: V2, table 1.
        """
        return self.n_layers * (self.cache_row if self.stage else max(self.cache_row, 0))

    @figure("$")
    def cost(self) -> float | None:
        """Rent."""
        return self.absent

    def bytes_of_a_number(self) -> int:
        return 2


INPUTS = {"n_layers": Figure("n_layers", 61, "", "Layers", "a file")}
INPUTS["kv_lora_rank"] = Figure("kv_lora_rank", 512, "", "Width", "a file")


def test_explanation_has_the_formula_the_numbers_and_the_inputs() -> None:
    figures = figures_of(Cache(), INPUTS)
    assert "cost" not in figures, "there is none"
    found = explain(figures, "kv_cache")
    cache, row = found["steps"]
    assert (cache.formula, cache.numbers) == ("n_layers × max(cache_row, 0)", "61 × max(1.152 kB, 0)")  # noqa: RUF001
    assert (cache.value, cache.exact) == ("70.3 kB/token", "70,272 B/token")
    assert (cache.title, cache.source) == ("Cache of a token, all layers", "V2, table 1")
    assert row.formula == "(kv_lora_rank + rope) × 2"  # noqa: RUF001
    assert [(line.name, line.source) for line in found["inputs"]] == [
        ("n_layers", "a file"),
        ("kv_lora_rank", "a file"),
        ("rope", "a page"),
    ]
    assert all(len(line) <= 60 for line in text(found, 60).splitlines())
    near = explain(figures, "kv_cache", depth=1)
    assert [step.name for step in near["steps"] + near["inputs"]] == ["kv_cache", "cache_row", "n_layers"]


def test_formula_is_of_the_branch_that_was_taken_and_names_the_stage() -> None:
    found = figures_of(Cache("decode_", "fp8"), INPUTS)
    assert found["decode_kv_cache"].formula == "n_layers * decode_cache_row"
    assert found["decode_cache_row"].formula == "kv_lora_rank + rope + decode_scales"
    assert (found["decode_scales"].formula, found["decode_scales"].source) == ("", "counted by dsmini.accounting")
    other = figures_of(Cache(), {"n_layers": Figure("n_layers", 60, "", "Layers", "another")})
    assert other["kv_cache"].formula == "61 * max(cache_row, 0)", "not the input of this name"
    with pytest.raises(ValueError, match="unknown figure 'kv_cach'; did you mean decode_kv_cache"):
        check_name(found, "kv_cach")


def test_input_is_shown_as_it_was_given() -> None:
    peak = Figure("peak", 1978.9e12, "FLOP/s", "Peak", "a data sheet")
    assert (str(peak), exactly(peak)) == ("1.9789 PFLOP/s", "1,978,900,000,000,000 FLOP/s")
