"""Outcome of a run with failures, and the rent of a served token."""

import math

import pytest

from dsmini.planner.hardware import load_hardware
from dsmini.planner.outcome import reliability_plan
from dsmini.planner.quantities.formula import inputs
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, setup
from dsmini.planner.whole import Plan, whole_plan
from tests.helpers.configs import CONFIGS


@pytest.fixture(scope="module")
def plan() -> Plan:
    return whole_plan(setup(PlanRequest(), Model.from_file(CONFIGS / "deepseek-v3.toml"), load_hardware("h800")))


def test_v3s_run_with_failures(plan: Plan) -> None:
    """256 nodes fail every 14.4 hours; Young's interval is sqrt(2 * 10 s * 14.4 h)."""
    r = plan.reliability
    mean = 86400 / (256 * 6.5e-3)
    assert r.mean_time.value == pytest.approx(mean)
    assert r.interval.value == pytest.approx(math.sqrt(2 * 10 * mean))
    assert r.elapsed.value == pytest.approx(r.running.value / r.share.value)
    assert r.failures.value == pytest.approx(r.elapsed.value / mean)
    assert r.running.value == pytest.approx(plan.training.time.days.value * 86400)
    assert 0.97 < r.share.value < 0.98
    assert r.elapsed_cost is not None and plan.training.time.cost is not None
    assert r.elapsed_cost.value == pytest.approx(plan.training.time.cost.value / r.share.value)
    assert r.energy is not None and r.energy.value == pytest.approx(2048 * 1275 * r.elapsed.value)


def test_checkpoint_holds_master_weights_and_moments(plan: Plan) -> None:
    """4 bytes of FP32 weights and twice 2 of BF16 moments for each of 682.6B parameters, from 256 nodes at 10 GiB/s."""
    size = plan.reliability.checkpoint_bytes.value
    assert size == 8 * 682_636_472_320
    assert plan.reliability.checkpoint_write.value == pytest.approx(size / (256 * 10 * 2**30))


@pytest.mark.parametrize(("precision", "number"), [("fp32", 12), ("bf16", 12)])
def test_checkpoint_in_other_precisions(precision: str, number: int) -> None:
    request = PlanRequest(precision=precision, optimizer="adamw")  # pyright: ignore[reportArgumentType]
    toy = whole_plan(setup(request, Model.from_file(CONFIGS / "toy.toml"), load_hardware("h800")))
    parameters = toy.training.model.parameters.parameters_total.value
    assert toy.training.layout.optimizer in ("adamw", "muon")
    moments = 8 if toy.training.layout.optimizer == "adamw" else 4
    assert toy.reliability.checkpoint_bytes.value == parameters * (number - 8 + moments)


def test_hardware_without_price_and_power_has_neither_rent_nor_energy() -> None:
    toy = whole_plan(setup(PlanRequest(), Model.from_file(CONFIGS / "toy.toml"), load_hardware("laptop")))
    assert toy.reliability.elapsed_cost is None and toy.serving is not None and toy.serving.cost is None
    assert load_hardware("laptop").power is not None or toy.reliability.energy is None


def test_rent_of_a_token_is_rent_over_rate(plan: Plan) -> None:
    assert plan.serving is not None and plan.serving.cost is not None
    rate = plan.serving.decode.gpu_tokens_per_second.value
    assert plan.serving.cost.decode.value == pytest.approx(2 / 3600 / rate)
    assert plan.serving.cost.prefill.value == pytest.approx(2 / 3600 / plan.serving.prefill.gpu_tokens_per_second.value)


def test_outcome_depends_on_failures_and_on_training(plan: Plan) -> None:
    needed = set(inputs(reliability_plan(plan.training, plan.setup.hardware, plan.setup.failures).elapsed))
    assert needed >= {"failures_per_node_day", "restart_time", "checkpoint_halt", "gpus", "tokens", "utilization"}


@pytest.mark.parametrize(
    "chosen", [{"failures_per_node_day": 1000.0}, {"failures_per_node_day": 1e9}, {"restart_time": 1e9}]
)
def test_failures_that_let_no_run_end_are_an_error(chosen: dict[str, float]) -> None:
    made = setup(PlanRequest(**chosen), Model.from_file(CONFIGS / "deepseek-v3.toml"), load_hardware("h800"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^a failure every .* lets no run end with restart_time="):
        whole_plan(made)
