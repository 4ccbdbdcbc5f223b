"""Formulas: walked through once, computed again, and differentiated."""

from collections.abc import Callable

import pytest

from dsmini.planner.quantities.formula import evaluate, gradient, inputs, walk
from dsmini.planner.quantities.quantity import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    RULES,
    SECONDS,
    Anything,
    Count,
    largest,
    rounded_down,
    rounded_up,
)
from tests.helpers.random_figures import SMOOTH, drawn, random_figure

STEP = 1e-5
"""Relative step of a difference. A central one errs by its square, 1e-10, and by rounding, 1e-16 / 1e-5."""


def slope(figure: Anything, name: str, value: float) -> float:
    """Return the central difference of a figure in one input."""
    high, low = (evaluate(figure, {name: value * (1 + sign * STEP)}) for sign in (1, -1))
    return (high - low) / (2 * STEP * value)


@pytest.mark.parametrize("seed", range(25))
def test_evaluate_is_the_computation_again(seed: int) -> None:
    first, second = drawn(f"{seed} first"), drawn(f"{seed} second")
    figure = random_figure(f"{seed}", first)
    assert evaluate(figure, {}) == figure.value
    assert evaluate(figure, second) == random_figure(f"{seed}", second).value != figure.value
    one = {"c": second["c"]}
    assert evaluate(figure, one) == random_figure(f"{seed}", first | one).value


@pytest.mark.parametrize("seed", range(25))
def test_gradient_is_the_slope_of_a_random_figure(seed: int) -> None:
    values = drawn(f"{seed} first")
    figure = random_figure(f"{seed}", values)
    found = gradient(figure)
    scale = 1 + abs(figure.value) + max(map(abs, found.values()))
    for name in inputs(figure):
        assert found[name] == pytest.approx(slope(figure, name, values[name]), abs=1e-6 * scale), name


@pytest.mark.parametrize("op", SMOOTH)
def test_gradient_is_the_slope_of_each_operation(op: str) -> None:
    values = {"x": 1.3, "y": 0.7}
    figure = SMOOTH[op](*(COUNT(value, name, name) for name, value in values.items()))
    found = gradient(figure)
    for name, value in values.items():
        assert found.get(name, 0.0) == pytest.approx(slope(figure, name, value), rel=1e-8, abs=1e-9)


def test_every_operation_is_tried() -> None:
    assert RULES.keys() - SMOOTH.keys() == {"ceil", "floor", "name"}
    x, y = COUNT(2.0, "x", "x"), COUNT(3.0, "y", "y")
    assert all(op in {node.op for node in walk(make(x, y))} for op, make in SMOOTH.items() if op != "shared")


@pytest.mark.parametrize("rounded", [rounded_up, rounded_down])
def test_rounding_counts_as_constant(rounded: Callable[[Count], Count]) -> None:
    x = COUNT(2.3, "x", "x")
    assert gradient(rounded(x) * x) == {"x": rounded(x).value}


def test_gradient_of_a_sum_with_a_shared_part_adds_both_ways() -> None:
    x = COUNT(3, "x", "x")
    square = (x * x).named("square", "Square")
    assert gradient(square * x + square) == {"x": 27 + 6}


def test_gradient_of_an_input_made_twice_adds_both() -> None:
    x, again = COUNT(3, "x", "x"), COUNT(3, "x", "x")
    assert gradient(x * again) == {"x": 6}


def test_gradient_of_the_largest_is_that_of_the_first_of_equals() -> None:
    x, y = COUNT(2, "x", "x"), COUNT(2, "y", "y")
    assert gradient(largest(x, y)) == {"x": 1, "y": 0}


def test_gradient_has_units_of_the_figure_over_the_input() -> None:
    time = BYTES(6e9, "size", "Size") / BYTES_PER_SECOND(2e9, "rate", "Rate")
    assert gradient(time) == pytest.approx({"size": 1 / 2e9, "rate": -6e9 / 4e18})


def test_walk_visits_shared_nodes_once() -> None:
    """A node used twice in each of 60 levels has 2 ** 60 paths to it."""
    node: Anything = SECONDS(1, "x", "x")
    for _ in range(60):
        node = node + node
    visited = list(walk(node))
    assert len(visited) == 61
    assert len({id(n) for n in visited}) == 61
    assert evaluate(node, {"x": 3}) == 3 * 2**60
    assert gradient(node) == {"x": 2**60}


def test_walk_yields_what_is_needed_first() -> None:
    figure = random_figure("order", drawn("order"))
    seen: set[int] = set()
    for node in walk(figure):
        assert all(id(arg) in seen for arg in node.args)
        seen.add(id(node))
    assert next(iter(reversed(list(walk(figure))))) is figure


def test_long_sums_need_no_recursion() -> None:
    x = COUNT(2, "x", "x")
    chain = x
    for _ in range(10_000):
        chain = chain + x
    assert len(list(walk(chain))) == 10_001
    assert evaluate(chain, {"x": 3}) == 30_003
    assert gradient(chain) == {"x": 10_001}


def test_inputs_come_in_the_order_of_their_use() -> None:
    a, b, c = (COUNT(1, name, name) for name in "abc")
    assert list(inputs(b * c + a * b)) == ["b", "c", "a"]


def test_evaluate_takes_values_of_named_results_from_their_formula() -> None:
    """Only inputs can be changed: a named result is what its formula gives."""
    double = (2 * COUNT(4, "x", "x")).named("double", "Double")
    assert evaluate(double + double, {"double": 100}) == 16
