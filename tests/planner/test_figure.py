"""Figures: numbers that are explained. The laws of all real ones are in test_formulas.py, and pages/ shows some."""

from dsmini.planner.figure import Figure, explain, figure, figures_of
from tests.helpers.plans import plan_of


class Cache:
    """Cache of a token."""

    n_layers = 61

    @figure("B/token")
    def kv_cache(self) -> float:
        """Cache of a token, all layers."""
        return self.n_layers * 1152


def test_number_has_the_name_of_an_input_only_where_it_is_that_input() -> None:
    for layers, formula in ((61, "n_layers * 1152"), (60, "61 * 1152")):
        found = figures_of(Cache(), {"n_layers": Figure("n_layers", layers, "", "Layers", "a file")})
        assert found["kv_cache"].formula == formula


def test_explanation_goes_as_deep_as_it_is_asked_to() -> None:
    found = explain(plan_of("deepseek-v3").figures, "kv_cache", depth=1)
    assert [step.name for step in found["steps"] + found["inputs"]] == ["kv_cache", "cache_row", "n_layers"]
