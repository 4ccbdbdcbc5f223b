"""The question of how far a plan is off: its verdict, its dtypes, and held-out shapes that no rate was measured on."""

import dataclasses

import pytest

from benchmarks.questions import plan
from dsmini.measure.step_rates import SHAPES
from tests.helpers.questions import setting


def figures(*predicted: float) -> list[plan.Figure]:
    return [plan.figure("seconds", {"step": str(i)}, 1.0, predicted=p) for i, p in enumerate(predicted)]


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        ((1.1, 0.9, 1.29), "3 steps, forecast before they ran: error of the time 10% in the median, 29% at worst (as"),
        ((1.1, 0.9, 1.31), "10% in the median, 31% at worst (asked: 15% and 30%)"),
        ((0.8, 1.2, 1.0), "20% in the median, 20% at worst (asked: 15% and 30%)"),
    ],
)
def test_finding_says_whether_the_target_is_met(predicted: tuple[float, ...], said: str) -> None:
    assert said in plan.finding(figures(*predicted))


def test_finding_says_how_far_memory_is_off() -> None:
    memory = [plan.figure("process_memory", {"step": "a"}, 100.0, predicted=112.0)]
    memory += [plan.figure("tensor_memory", {"step": "a"}, 100.0, predicted=101.0)]
    text = plan.finding([*figures(1.0), *memory])
    assert "peak memory at most 12% (asked: 10%)" in text and "tensors' 1.0%" in text
    assert plan.finding([]) == ""


def test_held_out_steps_are_none_of_those_that_rates_are_of() -> None:
    for quick in (False, True):
        shapes = plan.held_out(quick)
        assert len(shapes) == 6
        for shape in shapes.values():
            for config, batch, tokens in SHAPES[shape.work]:
                assert shape.config != config and (shape.batch, shape.tokens) != (batch, tokens)


def test_dtypes_too_slow_here_are_left_out() -> None:
    here = setting()
    assert plan.usable(here) == ["float32", "bfloat16", "fp8"]
    slow = dataclasses.replace(here.roofs, peak={"float32": 1e11, "bfloat16": 1e9})
    assert plan.usable(dataclasses.replace(here, roofs=slow)) == ["float32"]
