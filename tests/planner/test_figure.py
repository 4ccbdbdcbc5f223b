"""Figures: numbers that are explained. The laws of all real ones are in test_formulas.py, and pages/ shows some."""

from dsmini.planner.figure import Figure, figure, figures_of


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
