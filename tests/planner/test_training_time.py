"""Time and cost of training against DeepSeek's printed figures."""

import dataclasses

import pytest

from dsmini.planner.published.v3_training import published_training
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import D, N, Quantity
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.training_plan import TrainingPlan, training_plan
from tests.helpers.configs import refusal, released
from tests.helpers.plans import H800, V3_LAYOUT, V3_WORKLOAD

V3 = released("deepseek-v3")
M = ModelInputs.of(V3, "configs/deepseek-v3.toml")


@pytest.fixture(scope="module")
def plan() -> TrainingPlan:
    return training_plan(M, H800, V3_LAYOUT, V3_WORKLOAD)


def test_published_step_gives_the_printed_rates() -> None:
    """INS, table 4, and V3, table 1."""
    found = published_training(M, H800, V3_WORKLOAD)
    time, use = found.time, found.utilization
    assert time.tokens_per_day.value == pytest.approx(272.80e9, rel=1e-4)
    assert use.flops_per_gpu.value == pytest.approx(385e12, rel=0.01)
    assert use.flops_per_gpu_full_square.value == pytest.approx(432e12, rel=0.01)
    assert use.utilization.value == pytest.approx(0.3894, rel=0.01)
    assert use.utilization_full_square.value == pytest.approx(0.4373, rel=0.01)
    assert time.hours_per_trillion.value == pytest.approx(180e3, rel=0.002)
    assert time.days_per_trillion.value == pytest.approx(3.7, rel=0.01)
    assert time.gpu_hours.value == pytest.approx(2664e3, rel=0.01)


def test_printed_hours_and_cost() -> None:
    found = published_training(M, H800, V3_WORKLOAD)
    assert found.printed_hours.value == 2788e3
    assert found.printed_cost is not None
    assert found.printed_cost.value == pytest.approx(5.576e6, rel=1e-12)


def test_context_extension_is_a_known_miss() -> None:
    """119K GPU-hours are printed; at the utilization of pre-training it would be 75.7K, by 385 TFLOP/s."""
    found = published_training(M, H800, V3_WORKLOAD).extension_hours
    assert found.value == pytest.approx(75.7e3 * 385 / 386.1, rel=0.001)
    assert found.value < 0.65 * 119e3


def test_plan_at_the_printed_utilization(plan: TrainingPlan) -> None:
    """MFU 38.94 % gives the step of the run, 19.926 s. The parts of a step take 0.3 % longer, and decide."""
    assert plan.step.assumed_step.value == pytest.approx(19.926, rel=0.005)
    assert plan.time.step_seconds.value == plan.step.roof_step.value > plan.step.assumed_step.value
    assert plan.time.tokens_per_day.value == pytest.approx(272.80e9, rel=0.01)
    assert plan.time.gpu_hours.value == pytest.approx(2664e3, rel=0.01)
    assert plan.time.days.value == pytest.approx(14.8 * 3.7, rel=0.01)
    assert plan.time.cost is not None
    assert plan.time.cost.value == pytest.approx(2664e3 * 2, rel=0.01)


def test_plan_from_parts_is_near_the_printed_step(plan: TrainingPlan) -> None:
    """The parts know one time of the run, that of a pair of forward and backward; the sum is within 1 %."""
    step = plan.step
    pair = step.compute.chunk_forward.value + step.compute.chunk_backward.value
    assert pair == pytest.approx(13.95 / 97, rel=0.01)
    assert step.roof_step.value == pytest.approx(19.926, rel=0.01)
    assert step.bubble.value == pytest.approx(1.09, rel=0.05)
    assert step.roof_utilization.value == pytest.approx(0.3894, rel=0.01)
    parts = (step.computing, step.dispatching, step.reducing, step.bubble, step.exchange, step.update)
    assert step.roof_step.value == pytest.approx(sum(part.value for part in parts))


def test_slower_of_parts_and_assumed_utilization_decides() -> None:
    """ZeRO 3 over 2,048 GPUs exchanges for minutes, which no assumed MFU hides; one that was measured holds."""
    layout = dataclasses.replace(V3_LAYOUT, pipeline=1, expert=256, tensor=8, zero=3, recompute="full", schedule="1f1b")
    slow = training_plan(M, H800, layout, V3_WORKLOAD)
    assert slow.is_slowed and slow.time.step_seconds.value == slow.step.roof_step.value > 60
    assert slow.time.days.value == pytest.approx(14.8e12 / (15360 * 4096) * slow.step.roof_step.value / 86400)
    lazy = training_plan(M, H800, V3_LAYOUT, V3_WORKLOAD, dataclasses.replace(Assumptions.of(0.2), stated=False))
    assert not lazy.is_slowed and lazy.time.step_seconds.value == lazy.step.assumed_step.value
    measured = training_plan(M, H800, layout, V3_WORKLOAD, Assumptions.of(0.39))
    assert measured.time.step_seconds.value == measured.step.assumed_step.value < 21


def test_rows_of_experts_fill_the_link_as_derived(plan: TrainingPlan) -> None:
    """A token's 7 remote rows take 68 % of InfiniBand, 78 % of computing. Rows to 4 nodes take half of that."""
    assert plan.link is not None
    assert plan.link.rate_unlimited.value == pytest.approx(30.8e9 * 7 / 8, rel=0.02)
    assert plan.link.share_unlimited.value == pytest.approx(0.68, abs=0.01)
    assert plan.link.share_unlimited.value == pytest.approx(2 * plan.link.share.value)
    computing = plan.step.computing.value / plan.time.step_seconds.value
    assert plan.link.share_unlimited.value / computing == pytest.approx(0.78, abs=0.01)


def test_share_of_multiprocessors_as_printed(plan: TrainingPlan) -> None:
    """20 of 132 multiprocessors carry rows: 15.2 % (V3, section 3.2.2)."""
    assert 1 - plan.step.compute.computing_share.value == pytest.approx(0.152, abs=0.0005)
    alone = training_plan(M, H800, dataclasses.replace(V3_LAYOUT, expert=1), V3_WORKLOAD)
    assert alone.step.compute.computing_share.value == 1
    assert alone.dispatch is None and alone.link is None


def test_stages_that_do_not_divide_are_slower() -> None:
    """61 layers in 40 stages leave some with 2: at least twice the work of a 61st."""
    forty = dataclasses.replace(V3_LAYOUT, gpus=2560, pipeline=40, schedule="1f1b")
    step = training_plan(M, H800, forty, V3_WORKLOAD).step.compute
    assert step.stage_share.value > 1.1 / 40
    assert step.stage_share.value == 2 * step.dense_layer_seconds.value / step.forward_seconds.value


def test_dualpipe_hides_the_rows_of_experts() -> None:
    plans = {
        s: training_plan(M, H800, dataclasses.replace(V3_LAYOUT, schedule=s), V3_WORKLOAD) for s in ("1f1b", "zb1p")
    }
    dual = training_plan(M, H800, V3_LAYOUT, V3_WORKLOAD).step
    for other in plans.values():
        assert other.step.dispatching.value == pytest.approx(120 * 2 * other.step.chunk_dispatch.value)
        assert dual.dispatching.value == pytest.approx(16 * 2 * dual.chunk_dispatch.value)
        assert dual.roof_step.value < other.step.roof_step.value
    assert plans["zb1p"].step.bubble.value < plans["1f1b"].step.bubble.value


def test_rows_that_take_longer_than_computing_are_not_hidden() -> None:
    """At a twentieth of the link's rate a pair of DualPipe takes as long as its rows: 120 micro-batches, two passes."""
    assert H800.slow_link is not None
    slow = dataclasses.replace(H800, slow_link=again(H800.slow_link, 1 / 20))
    step = training_plan(M, slow, V3_LAYOUT, V3_WORKLOAD).step
    alone, rows = 16 * step.computing.value / 120, 120 * 2 * step.chunk_dispatch.value
    assert step.compute_to_dispatch is not None and step.compute_to_dispatch.value < 1
    assert step.computing.value + step.dispatching.value == pytest.approx(alone + rows)


def again(figure: Quantity[N, D], factor: float) -> Quantity[N, D]:
    """Return an input with another value."""
    return Quantity(figure.value * factor, figure.unit, "input", (), (figure.name, figure.title, figure.source))


def test_zero_exchanges_more_from_two_on() -> None:
    def exchange(zero: int, **changes: object) -> float:
        layout = dataclasses.replace(V3_LAYOUT, zero=zero, schedule="1f1b", **changes)
        return training_plan(M, H800, layout, V3_WORKLOAD).step.exchange.value

    gradients = exchange(0) / 2
    assert gradients < exchange(1) < 2 * gradients
    assert exchange(2) == pytest.approx(120 * gradients + exchange(1) - gradients - computing(zero=2))
    assert exchange(3) > exchange(2)


def computing(zero: int) -> float:
    layout = dataclasses.replace(V3_LAYOUT, zero=zero, schedule="1f1b")
    return training_plan(M, H800, layout, V3_WORKLOAD).step.computing.value


def test_tensor_parallelism_reduces_four_times_a_layer() -> None:
    """Two all-reduces a layer and pass move each row of 7168 BF16 numbers twice, but for the own part."""
    step = training_plan(M, H800, dataclasses.replace(V3_LAYOUT, tensor=4), V3_WORKLOAD).step
    assert step.chunk_tensor.value == pytest.approx(62 / 16 * 4 * 3 / 4 * 4096 * 14336 / 160e9)
    micro_batches = 15360 / (2048 / 16 / 4)
    assert step.reducing.value == pytest.approx(2 * micro_batches * step.chunk_tensor.value)


def test_one_process_is_planned_without_a_cluster() -> None:
    toy = ModelInputs.of(released("toy"), "a test")
    alone = dataclasses.replace(H800, fast_link=None, slow_link=None, price=None)
    layout = dataclasses.replace(V3_LAYOUT, gpus=1, pipeline=1, expert=1, zero=0, schedule="1f1b", precision="bf16")
    plan = training_plan(toy, alone, layout, V3_WORKLOAD, Assumptions.of(utilization=0.2))
    assert plan.memory is None and plan.process is not None and plan.link is None
    assert plan.memory_needed is plan.process.total and plan.fits
    assert plan.time.cost is None
    assert plan.step.exchange.value == plan.step.bubble.value == plan.step.dispatching.value == 0
    peak = 989e12 * 0.2
    assert plan.time.step_seconds.value == pytest.approx(plan.time.step_flops.value / peak)


def test_precision_or_link_that_the_hardware_lacks_raises() -> None:
    old = dataclasses.replace(H800, title="NVIDIA A100", peaks={"bfloat16": H800.peaks["bfloat16"]})
    assert refusal(training_plan, M, old, V3_LAYOUT, V3_WORKLOAD) == "NVIDIA A100 has no fp8 units; use one of bfloat16"
    node = dataclasses.replace(H800, slow_link=None)
    assert "no link" in refusal(training_plan, M, node, V3_LAYOUT, V3_WORKLOAD)
    layout = dataclasses.replace(V3_LAYOUT, expert=1)
    assert (
        refusal(training_plan, M, node, layout, V3_WORKLOAD)
        == "NVIDIA H800 SXM has no link that gpus=2048 need; use 8 or fewer"
    )
