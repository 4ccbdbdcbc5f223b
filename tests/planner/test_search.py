"""Search for layouts against plans made one by one, and its sentence where nothing fits."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.grid import evaluate_many
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    BYTES,
    COUNT,
    exponential,
    geometric_mean,
    largest,
    power,
    rounded_up,
    smallest,
)
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.layout_table import Choices
from dsmini.planner.training.search import Candidate, binds, search
from dsmini.planner.training.training_plan import TrainingPlan, training_plan
from dsmini.planner.training.workload import Workload
from tests.helpers.configs import refusal, released
from tests.helpers.plans import H800, V3_LAYOUT, V3_WORKLOAD

V3 = ModelInputs.of(released("deepseek-v3"), "configs/deepseek-v3.toml")
LITE = ModelInputs.of(released("deepseek-v2-lite"), "configs/deepseek-v2-lite.toml")
SMALL = Workload.of(seq_len=4096, batch=96, tokens=1e12, source="a test")


def memory_of(gigabytes: float) -> Hardware:
    return dataclasses.replace(H800, memory=BYTES(gigabytes * 1e9, "memory", "Memory of a GPU", "a test"))


SOME = Choices(zeros=(0, 1, 3), recomputes=("none", "full"), precisions=("fp8",), micro_batches=(1, 2))


def every_plan(hardware: Hardware, gpus: int) -> Iterator[TrainingPlan]:
    """Yield the plan of every layout with some choices that is allowed, from its own formulas."""
    numbers = [n for n in range(1, gpus + 1) if gpus % n == 0]
    sizes = itertools.product(numbers, [1, 2, 4, 8], numbers, SOME.micro_batches)
    for pipeline, tensor, expert, micro_batch in sizes:
        for schedule, zero, recompute in itertools.product(SOME.schedules, SOME.zeros, SOME.recomputes):
            try:
                layout = Layout(
                    gpus=gpus,
                    pipeline=pipeline,
                    tensor=tensor,
                    expert=expert,
                    micro_batch=micro_batch,
                    schedule=schedule,
                    zero=zero,
                    recompute=recompute,
                    precision="fp8",
                )
                yield training_plan(LITE, hardware, layout, SMALL)
            except ValueError:
                continue


def sizes_of(layout: Layout) -> tuple[int, int, int, int]:
    return layout.pipeline, layout.tensor, layout.expert, layout.micro_batch


@pytest.mark.parametrize(("gpus", "gigabytes"), [(12, 45), (4, 80)])
def test_search_finds_the_best_of_all_plans(gpus: int, gigabytes: float) -> None:
    hardware = memory_of(gigabytes)
    best: dict[tuple[int, ...], tuple[float, float]] = {}
    number = 0
    for plan in every_plan(hardware, gpus):
        number += 1
        if plan.fits:
            sizes, found = sizes_of(plan.layout), (plan.step.roof_step.value, plan.memory_needed.value)
            best[sizes] = min(found, best.get(sizes, found))
    found = search(LITE, hardware, SMALL, gpus, choices=SOME, most=1000)
    assert number > 100 and 1 < len(found) == len(best)
    assert {sizes_of(one.layout): one.plan.step.roof_step.value for one in found} == pytest.approx(
        {sizes: step for sizes, (step, _) in best.items()}, rel=1e-12
    )
    assert all(one.plan.fits for one in found)
    steps = [one.plan.step.roof_step.value for one in found]
    assert steps == sorted(steps)


@pytest.fixture(scope="module")
def published() -> list[Candidate]:
    return search(V3, H800, V3_WORKLOAD, 2048, choices=Choices(moments="bfloat16"), most=20)


def test_published_layout_is_among_the_best(published: list[Candidate]) -> None:
    """V3's own division of 2048 GPUs is within 5 % of the fastest that the search finds."""
    (own,) = [one for one in published if one.layout == V3_LAYOUT]
    assert own.plan.step.roof_step.value < 1.05 * published[0].plan.step.roof_step.value
    assert own.binds == "compute"
    assert own.memory_costs > 0  # recomputation, which the memory asks for


def test_search_of_a_large_cluster_takes_seconds() -> None:
    """Ten seconds are allowed. CPU time is compared, since other programs may run, with room for a slower machine."""
    told: list[tuple[float, str]] = []
    start = time.process_time()
    search(V3, H800, V3_WORKLOAD, 2048, on_part=lambda share, what: told.append((share, what)))
    assert time.process_time() - start < 8
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert told[-1][0] == 1 and all(what for _, what in told)


def test_choices_that_are_not_allowed_are_not_made() -> None:
    only = Choices(schedules=("zb1p",), zeros=(1,), recomputes=("full",), precisions=("bf16",), micro_batches=(2,))
    for one in search(LITE, H800, SMALL, 12, choices=only):
        layout = one.layout
        assert (layout.schedule, layout.zero, layout.recompute, layout.precision) == ("zb1p", 1, "full", "bf16")
        assert layout.micro_batch == 2


def test_model_that_fits_nothing_says_what_would() -> None:
    """64 GPUs have 5.1 TB; the state of 682.6B parameters alone, 17 bytes each in FP8, is 11.6 TB."""
    sentence = refusal(search, V3, H800, V3_WORKLOAD, 64)
    assert sentence.startswith("no layout on gpus=64 fits 80 GB a GPU: the smallest needs 184 GB, with pipeline=1, ")
    assert sentence.endswith("; use gpus=256")
    lean = Choices(zeros=(3,), recomputes=("full",), precisions=("fp8",), schedules=("1f1b",))
    assert search(V3, H800, V3_WORKLOAD, 256, choices=lean)[0].plan.fits


def test_choices_that_would_fit_are_named() -> None:
    """Each remedy of the sentence fits when it is taken."""
    tight = Choices(zeros=(0,), recomputes=("none",), precisions=("bf16",), micro_batches=(1,), schedules=("1f1b",))
    sentence = refusal(search, LITE, memory_of(26), SMALL, 12, choices=tight)
    freed: dict[str, Any] = {
        "allow recomputation": {"recomputes": ("none", "selective", "full")},
        "use moments='bfloat16'": {"moments": "bfloat16"},
        "allow precision='fp8'": {"precisions": ("fp8",)},
    }
    assert sentence.endswith("; " + " or ".join([*freed, "use gpus=24"]))
    for change in freed.values():
        assert search(LITE, memory_of(26), SMALL, 12, choices=dataclasses.replace(tight, **change))
    assert search(LITE, memory_of(26), SMALL, 24, choices=tight)


def test_zero_is_named_where_only_the_batch_can_be_divided() -> None:
    """29 GPUs divide neither layers, heads nor experts."""
    workload = Workload.of(seq_len=4096, batch=58, tokens=1e12, source="a test")
    whole = Choices(zeros=(0,))
    sentence = refusal(search, LITE, H800, workload, 29, choices=whole)
    assert sentence.endswith("precision='fp8'; allow ZeRO 3 or use gpus=116")
    assert {one.layout.zero for one in search(LITE, H800, workload, 29)} <= {1, 2, 3}


def test_batch_that_no_layout_divides_raises() -> None:
    odd = Workload.of(seq_len=4096, batch=7, tokens=1e12, source="a test")
    assert refusal(search, LITE, H800, odd, 64) == (
        "gpus=64 allow no layout for a step of batch=7 sequences; use a batch that the GPUs divide"
    )


def test_hardware_without_a_precision_raises() -> None:
    old = dataclasses.replace(H800, title="a CPU", peaks={})
    assert refusal(search, LITE, old, SMALL, 1) == "a CPU has no units for bf16, fp8; allow another precision"


def test_one_process_is_searched_too() -> None:
    (best, *_) = search(ModelInputs.of(released("toy"), "a test"), H800, SMALL, 1)
    assert best.plan.process is not None and best.layout.gpus == 1


def test_longest_part_binds() -> None:
    slow = dataclasses.replace(H800, slow_link=COUNT(0.05) * H800.slow_link if H800.slow_link else None)
    plan = training_plan(V3, slow, V3_LAYOUT, V3_WORKLOAD)
    assert binds(plan.step) == "links between nodes"
    whole = training_plan(V3, H800, V3_LAYOUT, V3_WORKLOAD)
    assert binds(whole.step) == "compute"
    assert binds(whole.step, memory_costs=2.0) == "memory"
    few = Workload.of(seq_len=4096, batch=128 * 16, tokens=1e12, source="a test")
    waits = training_plan(V3, H800, dataclasses.replace(V3_LAYOUT, schedule="1f1b"), few)
    assert waits.step.bubble.value == pytest.approx(
        (waits.step.computing.value + waits.step.dispatching.value) * 15 / 16
    )


def test_formulas_on_arrays_equal_formulas() -> None:
    x, y = COUNT(3.5, "x", "X", "a test"), COUNT(2, "y", "Y", "a test")
    figures = [
        x + y * x - y / x,
        largest(x, y, x * y) + smallest(x, y),
        rounded_up(x) + power(x, y) + exponential(x),
        geometric_mean(x, y).named("mean", "Mean"),
        y,
    ]
    columns = {"x": np.array([3.5, 0.5, 7.25]), "y": np.array([2.0, 3.0, 1.0])}
    found = evaluate_many(figures, columns)
    for row in range(3):
        a, b = COUNT(columns["x"][row], "x", "X", "a test"), COUNT(columns["y"][row], "y", "Y", "a test")
        want = [
            a + b * a - b / a,
            largest(a, b, a * b) + smallest(a, b),
            rounded_up(a) + power(a, b) + exponential(a),
            geometric_mean(a, b),
            b,
        ]
        assert [values[row] for values in found] == pytest.approx([figure.value for figure in want], rel=1e-15)
