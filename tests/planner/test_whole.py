"""Whole plans: every figure in one section, with an explanation, a source and no number of its own."""

import dataclasses
from typing import Any

import pytest

from dsmini.planner import answers
from dsmini.planner.binding import Resource
from dsmini.planner.hardware import known_hardware, load_hardware
from dsmini.planner.pages.sections import COMPARED, HEADLINES, sections
from dsmini.planner.quantities.explanation import explain, named
from dsmini.planner.quantities.formula import walk
from dsmini.planner.quantities.quantity import BYTES, COUNT
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, setup
from dsmini.planner.whole import Plan, whole_plan
from tests.helpers.configs import CONFIGS

NUMBERS = {0, 1, 2, 3, 4, 6, 86400}
"""Numbers that formulas may contain without a name: structural ones, and the seconds of a day."""


def plan_of(name: str, hardware: str = "h800", **chosen: object) -> Plan:
    request = PlanRequest(hardware=hardware, **chosen)  # pyright: ignore[reportArgumentType]
    return whole_plan(setup(request, Model.from_file(CONFIGS / f"{name}.toml"), load_hardware(hardware)))


@pytest.fixture(scope="module")
def v3() -> Plan:
    return plan_of("deepseek-v3")


def test_every_figure_is_in_one_section(v3: Plan) -> None:
    found = [name for section in v3.sections.values() for name in section]
    assert len(found) == len(set(found)) == len(v3.all) > 200
    assert list(v3.sections) == ["model", "training", "inference", "attention", "reliability"]


def test_every_figure_has_a_name_a_title_and_an_explanation(v3: Plan) -> None:
    for figure in named(v3.all.values()).values():
        assert figure.name.isidentifier() and figure.name == figure.name.lower(), figure
        assert figure.title and figure.title[0].isupper(), figure
        if figure.op != "input":
            assert explain(figure).steps[0].name == figure.name
        else:
            assert figure.source, figure


def test_no_figure_has_a_typed_number(v3: Plan) -> None:
    numbers = {node.value for figure in v3.all.values() for node in walk(figure) if node.op == "number"}
    assert numbers <= NUMBERS


def test_headlines_and_compared_figures_exist_somewhere() -> None:
    """Each is in V3's plan or in one of a single process, so that no name is misspelt."""
    known = plan_of("deepseek-v3").all.keys() | plan_of("toy").all.keys()
    assert {name for names in HEADLINES.values() for name in names} <= known
    assert set(COMPARED) <= known


@pytest.mark.parametrize("hardware", known_hardware())
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "toy", "toy-dense", "toy-mha", "shakespeare"])
def test_every_model_is_planned_on_every_hardware(name: str, hardware: str) -> None:
    plan = plan_of(name, hardware)
    found = {section.name: section for section in sections(plan)}
    for section in found.values():
        assert section.finding.endswith(".") and "None" not in section.finding, section.finding
    assert plan.training.fits == ("reliability" in found) != ("It does not fit: no " in found["training"].finding)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"hardware": "laptop"}, "no layout on gpus=1 fits 17.2 GB a GPU: .*; use hardware with more memory"),
        ({"gpus": 8}, "no layout on gpus=8 fits 80 GB a GPU: .*; use gpus=128"),
        ({"batch": 1}, "no layout on gpus=8 fits 80 GB a GPU: .*; use gpus=128 and batch=16"),
        ({"decode_gpus": 1}, "decode on 1 GPU does not fit: .* take 674 GB of 80 GB; use decode_gpus=16"),
        ({"prefill_gpus": 3}, "prefill on 3 GPUs does not fit: .* take 240 GB of 80 GB; use prefill_gpus=16"),
        ({"sequences": 1_000_000}, "decode on 256 GPUs does not fit: .* take 576 TB of 80 GB; use sequences=101"),
    ],
)
def test_what_was_asked_for_and_does_not_fit_is_an_error(chosen: dict[str, Any], said: str) -> None:
    """One sentence with what would fit, which does fit when it is taken."""
    request = PlanRequest(**chosen)
    model, hardware = Model.from_file(CONFIGS / "deepseek-v3.toml"), load_hardware(request.hardware)
    with pytest.raises(ValueError, match=f"^{said}$") as error:
        answers.planned(setup(request, model, hardware), "a test")
    if "hardware" not in chosen:
        fix = str(error.value).rpartition("use ")[2].replace(" and ", "=").split("=")
        better = dataclasses.replace(request, **dict(zip(fix[::2], map(int, fix[1::2]), strict=True)))
        answers.planned(setup(better, model, hardware), "a test")


def test_what_does_not_fit_is_explained_and_varied() -> None:
    """A figure such as the memory that is needed tells why."""
    made = setup(PlanRequest(gpus=8), Model.from_file(CONFIGS / "deepseek-v3.toml"), load_hardware("h800"))
    assert made.refused and answers.explained(made, "memory_needed", 80).lines


def test_either_of_training_and_serving_may_not_fit() -> None:
    """Nobody asked for what does not fit, so the plan goes on without it and says what would."""
    large = dataclasses.replace(load_hardware("laptop"), memory=BYTES(100e9, "gpu_memory", "Memory", "a test"))
    made = setup(PlanRequest(), Model.from_file(CONFIGS / "deepseek-v2-lite.toml"), large)
    found = {s.name: s for s in sections(whole_plan(made))}
    assert not made.refused and answers.planned(made, "a test").record["fits"] is False
    assert found["training"].finding.startswith("It does not fit: no layout on gpus=1 fits 100 GB a GPU")
    assert set(found["training"].headlines) == {"memory_free", "process_memory"}, "no days and no rent"
    assert "reliability" not in found and found["inference"].finding.startswith("A sequence gets ")
    tight = dataclasses.replace(load_hardware("laptop"), memory=BYTES(1e6, "gpu_memory", "Memory", "a test"))
    both = setup(PlanRequest(), Model.from_file(CONFIGS / "toy.toml"), tight)
    assert both.refused.startswith("no layout on gpus=1 fits 1 MB")
    assert both.serving is None and both.unserved.startswith("decode on 1 GPU does not fit: weights and cache take ")


@pytest.mark.parametrize("speedup", [2, 10.8, 100, 1e4])
def test_faster_computing_gains_less_than_the_verdict_says(v3: Plan, speedup: float) -> None:
    """The verdict is the limit of plans on faster machines; rows of experts that computing hid bind then."""
    found, h800 = v3.training_binding, v3.setup.hardware
    assert found.first.resource is Resource.COMPUTE and found.ratio is not None
    assert found.second is not None and found.second.resource is Resource.LINKS_BETWEEN
    peaks = {name: COUNT(speedup) * peak for name, peak in h800.peaks.items()}
    faster = whole_plan(dataclasses.replace(v3.setup, hardware=dataclasses.replace(h800, peaks=peaks)))
    gain = v3.training.step.roof_step.value / faster.training.step.roof_step.value
    assert 1 < gain < found.ratio.value < 2.5
    assert speedup < 1e4 or gain == pytest.approx(found.ratio.value, rel=1e-3)


@pytest.mark.parametrize(("field", "place"), [("slow_link", 1), ("fast_link", 2), ("memory_bandwidth", 4)])
def test_step_without_a_resource_is_that_of_a_fast_one(v3: Plan, field: str, place: int) -> None:
    setup = v3.setup.with_layout(dataclasses.replace(v3.training.layout, tensor=2, expert=8), "chosen")
    fast = dataclasses.replace(setup.hardware, **{field: COUNT(1e9) * getattr(setup.hardware, field)})
    without = whole_plan(setup).training.step.without[place].value
    faster = whole_plan(dataclasses.replace(setup, hardware=fast)).training.step.roof_step.value
    assert faster == pytest.approx(without, rel=1e-6) and without < whole_plan(setup).training.step.roof_step.value


def test_layout_that_misses_the_assumed_utilization_is_a_warning(v3: Plan) -> None:
    slow = {"pipeline": 1, "expert": 256, "tensor": 8, "zero": 3, "recompute": "full", "schedule": "1f1b"}
    (found,) = [s for s in sections(plan_of("deepseek-v3", **slow)) if s.name == "training"]
    assert "by the parts of a step, at an MFU of 0.107." in found.finding and "54" not in found.finding
    assert "reach an MFU of 0.107, which days and rent are computed with, not 0.389 (as in V3)" in str(found.warnings)
    (own,) = [s for s in sections(v3) if s.name == "training"]
    assert "2,048 GPUs take 54.5 days and $5.36 million" in own.finding and own.warnings == ()
    (given,) = [s for s in sections(plan_of("deepseek-v3", utilization=0.5)) if s.name == "training"]
    assert "at an MFU of 0.500 (the command line)" in given.finding and "an MFU of 0.388, not" in str(given.warnings)


def test_attention_of_v32_is_planned_at_the_served_context(v3: Plan) -> None:
    finding = next(section.finding for section in sections(v3) if section.name == "attention")
    for said in ("At 4,096 tokens", "638 MFLOP", "1.14 GFLOP", "2,176 tokens", "48.1 kB", "20.1 % larger"):
        assert said in finding, finding
    longer = plan_of("deepseek-v3", context=131072, sequences=1).all
    assert longer["v32_flops_ratio"].value == pytest.approx(13.4, abs=0.05)
    assert longer["v32_kv_cache"].value == 48_068
    assert [section.name for section in sections(plan_of("toy-mha"))].count("attention") == 0


def test_figures_that_agree_with_each_other(v3: Plan) -> None:
    """The same number from two sides: layers, blocks, products and parameters."""
    figures = v3.all
    assert figures["dense_blocks"].value == figures["dense_layers"].value
    assert figures["expert_products"].value == figures["expert_parameters"].value
    assert figures["decode_gpu_tokens_per_second"].value == pytest.approx(
        60 * figures["decode_tokens_per_second"].value
    )
    assert v3.cache.per_token.value == 70_272
    assert v3.training.model.parameters.parameters_main.value == 671_026_404_352


@pytest.mark.parametrize("hardware", ["h800", "gb200-nvl72", "a100-pcie"])
def test_no_part_of_an_output_token_takes_longer_than_the_token(hardware: str) -> None:
    """Links alone among them: they count as in the whole time, reached and without what stays in the node."""
    found = plan_of("deepseek-v3", hardware).all
    parts = [found[name].value for name in found if name.startswith("decode_") and name.endswith("_time")]
    assert len(parts) >= 5 and max(parts) <= found["decode_time_per_token"].value
    assert "decode_exchange_limit" not in found
