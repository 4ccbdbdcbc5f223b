"""Machines: the numbers of their files, each with its source and in use, and the machine at hand with forecasts."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from dsmini.planner import pages
from dsmini.planner.hardware import load_hardware
from dsmini.planner.here import MOST_TOKENS, TRAINING, steps_here, with_forecast
from dsmini.planner.pages import here_section, plan_page
from tests.helpers.commands import let_prices_be_invented
from tests.helpers.plans import INVENTED, plan_of, values_of
from tests.helpers.questions import invented_roofs


def test_numbers_of_an_own_file_are_in_base_units() -> None:
    wanted = {"gpu_memory": 96 * 2**30, "memory_bandwidth": 2e12, "gpus_per_node": 8, "fast_link": 100e9}
    wanted |= {"slow_link": 25e9, "gpu_price": 3 / 3600}
    wanted |= {"peak_float32": 50e12, "peak_bfloat16": 500e12, "peak_fp8": 1e15}
    assert {name: float(value) for name, value in load_hardware(INVENTED).numbers.items()} == pytest.approx(wanted)


# --- the machine at hand


@pytest.mark.parametrize(("bfloat16", "peaks"), [(300e9, ["float32", "bfloat16"]), (0.3e9, ["float32"])])
def test_this_is_the_measured_machine(monkeypatch: pytest.MonkeyPatch, bfloat16: float, peaks: list[str]) -> None:
    """It has no peak of a dtype that it multiplies too slowly."""
    roofs = invented_roofs(peak={"float32": 170e9, "bfloat16": bfloat16}, bandwidth=20e9, copy=15e9)
    asked: list[bool] = []
    measured = lambda device, fresh, **_: (asked.append(fresh), roofs)[1]  # noqa: E731
    monkeypatch.setattr("dsmini.measure.roofs.load_or_measure", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    this = load_hardware("this", fresh=True)
    assert asked == [True], "not what was stored"
    assert (this.name, this.title, this.peaks, this.linked) == ("this", "A processor", peaks, False)
    values = {name: float(value) for name, value in this.numbers.items()}
    assert values.pop("gpu_memory") > 1e8
    of_peaks = {f"peak_{dtype}": roofs.peak[dtype] for dtype in peaks}
    assert values == of_peaks | {"memory_bandwidth": 20e9, "gpus_per_node": 1}
    (source,) = {value.source for value in this.numbers.values()}
    assert re.fullmatch(r"measured here by dsmini\.measure, \d{4}-\d\d-\d\d", source)
    if "bfloat16" not in peaks:
        with pytest.raises(ValueError, match="A processor has no bfloat16 units; use a precision that it has: float32"):
            this.peak("bfloat16")


@pytest.fixture(scope="module")
def invented() -> Iterator[None]:
    """Let this machine have invented prices, and 16 GB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsmini.machine.memory_bytes", lambda device: 16 << 30)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        let_prices_be_invented(patch, process=5 << 20)
        yield


SMALL = "n_layers=2 n_mtp_layers=0"


def test_plan_of_this_machine_has_forecasts_of_its_steps(invented: None) -> None:
    words = f"toy @this sequences=3 context=100 prompt=50 {SMALL}"
    plan = plan_of(words)
    steps = steps_here(plan)
    shapes = {name: forecast.shape for name, (forecast, _) in steps.items()}
    assert {name: (s.work, s.batch, s.tokens, s.dtype) for name, s in shapes.items()} == {
        "training step": ("training", 4, 256, "bfloat16"),
        "prompt": ("prefill", 1, 50, "bfloat16"),
        "decoding step": ("decode", 3, 100, "bfloat16"),
    }
    assert shapes["training step"].train.optimizer == "muon", "as the file says"
    assert all(row["seconds"] > row["roof_seconds"] > 0 for _, row in steps.values()), "roofs are lower bounds"
    said = [row[1] for row in here_section(steps).tables[0].rows]
    assert said == [f"{size} tokens, bfloat16" for size in ("4 x 256", "1 x 50", "3 x 100")]
    assert with_forecast(plan, steps).request.utilization is not None
    stated = plan_of(f"{words} utilization=0.9")
    assert with_forecast(stated, steps) is stated, "the user's own holds"
    too_fast = SimpleNamespace(seconds=plan.run.mfu * plan.run.step_seconds)
    assert with_forecast(plan, {TRAINING: (too_fast, {})}) is plan, "no step is above the peak"


def test_forecasts_are_of_the_steps_that_were_asked_for(invented: None) -> None:
    words = f"toy @this {SMALL} optimizer=adamw moments=bfloat16 recompute=full micro_batch=2 cache_dtype=fp8"
    shapes = {name: forecast.shape for name, (forecast, _) in steps_here(plan_of(words)).items()}
    train = shapes["training step"].train
    asked = train.optimizer, train.moments, train.recompute, train.grad_accum, train.lr
    model = plan_of(words).model
    assert model.run is not None and asked == ("adamw", "bfloat16", True, 2, model.run.train.lr)
    assert [shapes[name].cache for name in ("prompt", "decoding step")] == ["fp8", "fp8"]


@pytest.mark.parametrize(("longest", "context"), [(16, 8), (64, 32), (256, 192)])
def test_short_model_has_forecasts(longest: int, context: int, invented: None) -> None:
    steps = steps_here(plan_of(f"toy-mha @this {SMALL} max_seq_len={longest} batch=4"))
    assert steps["decoding step"][0].shape.tokens == context


def test_answer_about_this_machine_shows_and_records_forecasts(invented: None) -> None:
    words = f"toy @this batch={MOST_TOKENS // 256} sequences=2 {SMALL}"
    answer = pages.planned(plan_of(words), "plan toy")
    assert answer.sections[-1].title == "What will this machine take?"
    training, prompt = (answer.record["here"][name] for name in ("training step", "prompt"))
    assert prompt["process_bytes"] == prompt["tensor_bytes"] + (5 << 20)
    figures = answer.record["figures"]["training"]
    assert figures["step_seconds"]["value"] == pytest.approx(training["seconds"])
    assert training["seconds"] > figures["parts_seconds"]["value"] == pytest.approx(training["roof_seconds"])
    seconds = values_of(words)["tokens"] / MOST_TOKENS * training["seconds"]
    assert figures["training_time"]["value"] == pytest.approx(seconds)


def test_other_machines_have_no_forecasts_and_this_says_what_was_measured(invented: None) -> None:
    assert "here" not in pages.planned(plan_of("toy"), "plan toy").record
    assert "measured on this machine" in plan_page(plan_of(f"toy @this {SMALL}"), "", []).lead
