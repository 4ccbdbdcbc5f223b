"""Plans of this machine: forecasts next to the roofs, and none for other hardware."""

import subprocess
import sys

import pytest

from dsmini.measure import step_rates
from dsmini.planner import answers
from dsmini.planner.hardware import load_hardware
from dsmini.planner.here import MOST_TOKENS, steps_here
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, setup
from dsmini.planner.whole import Plan, whole_plan
from tests.helpers.commands import ROOT
from tests.helpers.questions import invented_rates


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have invented rates."""
    rates = invented_rates(process=5 << 20)
    monkeypatch.setattr("dsmini.measure.calibration.load_or_measure", lambda *_, **__: rates.roofs)
    monkeypatch.setattr(step_rates, "load_or_measure_rates", lambda *_, **__: rates)


def made(config: str = "toy", **choices: object) -> Plan:
    request = PlanRequest(hardware="this", **choices)  # pyright: ignore[reportArgumentType]
    return whole_plan(setup(request, Model.from_file(ROOT / "configs" / f"{config}.toml"), load_hardware("this")))


def test_forecasts_are_of_the_steps_that_are_planned() -> None:
    steps = steps_here(made(sequences=3, context=100, prompt=50))
    shapes = {step.name: step.forecast.shape for step in steps}
    found = {name: (s.work, s.batch, s.tokens, s.dtype) for name, s in shapes.items()}
    assert found == {
        "training step": ("training", 4, 256, "bfloat16"),
        "prompt": ("prefill", 1, 50, "bfloat16"),
        "decoding step": ("decode", 3, 100, "bfloat16"),
    }
    assert shapes["training step"].train.optimizer == "muon", "as the file says"
    assert all(step.forecast.seconds > step.roof > 0 for step in steps), "roofs are lower bounds"


def test_a_plan_of_this_machine_shows_and_records_forecasts() -> None:
    plan = made(sequences=2)
    answer = answers.planned(plan.setup, "plan toy")
    assert answer.report is not None and answer.page is not None
    assert [s.title for s in answer.report.sections][-1] == "What will this machine take?"
    assert "here_section" in [s.name for s in answer.page().sections]
    training, prompt = (answer.record["here"][name] for name in ("training step", "prompt"))
    assert training["seconds"] > training["roof_seconds"]
    assert prompt["process_bytes"] == prompt["tensor_bytes"] + (5 << 20)


def test_headline_is_by_the_forecast_where_there_is_one() -> None:
    plan = made()
    answer = answers.planned(plan.setup, "plan toy")
    figures, seconds = answer.record["figures"]["training"], answer.record["here"]["training step"]["seconds"]
    assert figures["step_seconds"]["value"] == pytest.approx(seconds)
    assert seconds > figures["roof_step_seconds"]["value"]
    steps = plan.setup.workload.tokens.value / plan.training.time.step_tokens.value
    assert figures["training_days"]["value"] == pytest.approx(steps * seconds / 86400)
    given = answers.planned(made(utilization=0.9).setup, "plan toy").record
    assert given["figures"]["training"]["step_seconds"]["value"] != pytest.approx(seconds), "the user's own holds"


def test_a_plan_of_other_hardware_has_no_forecasts() -> None:
    request = PlanRequest(hardware="h800")
    there = setup(request, Model.from_file(ROOT / "configs" / "toy.toml"), load_hardware("h800"))
    answer = answers.planned(there, "plan toy")
    assert "here" not in answer.record


def test_steps_of_too_many_tokens_are_not_forecast() -> None:
    assert [s.name for s in steps_here(made(batch=MOST_TOKENS // 256 + 1, sequences=1))] == ["prompt", "decoding step"]


def test_a_plan_of_known_hardware_imports_no_torch() -> None:
    run = "main(['configs/toy.toml', '--hardware', 'h800'])"
    code = f"import sys; from dsmini.plan import main; {run}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
