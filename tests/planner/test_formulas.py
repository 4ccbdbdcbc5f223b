"""Laws of all figures: they are what their formulas say, have fitting units, and are all documented."""

import ast
import tomllib
from pathlib import Path

import pytest

from dsmini.planner.figure import Figures
from dsmini.planner.plan import COMPARED, changed, read_axis
from tests.helpers.plans import computed, every_of, plan_of


def written_out(words: str) -> str:
    """Return words with those of each set in place of its name."""
    return " ".join(PLANS["sets"].get(word, word) for word in words.split())


PLANS = tomllib.loads(Path(__file__).with_name("plans.toml").read_text())
KINDS = PLANS["kinds"]
CASES = {written_out(plan): written_out(others) for plan, others in PLANS["cases"].items()}
"""Plans, and other values of their inputs."""


@pytest.mark.parametrize("words", [*KINDS, *CASES])
def test_each_formula_gives_its_figure(words: str) -> None:
    """No figure depends on anything that its formula does not name, also with other values of all inputs."""
    plans = [plan_of(words)]
    if words in CASES:
        changes = {name: value for name, (value,) in map(read_axis, CASES[words].split())}
        plans.append(changed(plans[0], changes, plans[0].hardware))
    for figures in map(every_of, plans):
        values = {name: float(figure) for name, figure in figures.items()}
        named = {name: figure for name, figure in figures.items() if figure.formula}
        found = {name: computed(figure.formula, values) for name, figure in named.items()}
        assert len(named) > 60
        assert {name: values[name] for name in named} == pytest.approx(found, rel=1e-12)
        assert [name for name, figure in figures.items() if not figure.title] == []
        assert [name for name, figure in figures.items() if not (figure.formula or figure.source)] == []


SECONDS = ("mean_time_to_failure", "training_gpu_hours")
"""Figures whose formula has the seconds of an hour or a day as a plain number."""


def dimension(unit: str) -> dict[str, float]:
    """Return the exponents of seconds and dollars; bytes, tokens and operations count as plain numbers."""
    over, _, under = unit.partition("/")
    return dict.fromkeys({over} & {"s", "$"}, 1.0) | dict.fromkeys({under} & {"s", "$"}, -1.0)


def of_formula(node: ast.AST, figures: Figures) -> dict[str, float] | None:
    """Return the dimension of a formula by the units of the names in it; None for a zero, which has any."""
    match node:
        case ast.Constant(value=0):
            return None
        case ast.Name(id=name):
            return dimension(figures[name].unit)
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=right):
            a, b = of_formula(left, figures) or {}, of_formula(right, figures) or {}
            sign = 1 if isinstance(op, ast.Mult) else -1
            both = {base: a.get(base, 0.0) + sign * b.get(base, 0.0) for base in {*a, *b}}
            return {base: power for base, power in both.items() if power}
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner]):
            return {base: power / 2 for base, power in (of_formula(inner, figures) or {}).items()}
        case ast.BinOp(left=left, right=right):
            parts = [of_formula(left, figures), of_formula(right, figures)]
        case ast.Call(args=args):
            parts = [of_formula(arg, figures) for arg in args]
        case _:
            return {}
    known = [part for part in parts if part is not None]
    assert all(part == known[0] for part in known), ast.unparse(node)
    return known[0] if known else None


@pytest.mark.parametrize("words", [*CASES, "deepseek-v3"])
def test_units_of_formulas_are_those_of_figures(words: str) -> None:
    """Sums add like to like, and an amount over a rate is a time."""
    figures = every_of(plan_of(words))
    for name, figure in figures.items():
        if figure.formula and name not in SECONDS and figure:
            found = of_formula(ast.parse(figure.formula, mode="eval").body, figures)
            assert found == dimension(figure.unit), name


def test_headlines_are_figures_of_some_plan() -> None:
    every = [figure for words in KINDS for figure in every_of(plan_of(words)).values()]
    assert set(COMPARED) <= {figure.name for figure in every}
    main = {figure.name for figure in every if figure.main}
    assert {"kv_cache", "memory_needed", "training_cost", "decode_time", "prefill_cost"} <= main and len(main) > 60
