"""Layouts that are left open: V3's own, or the fastest on the fewest GPUs that fit."""

import dataclasses
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.planner.hardware import Hardware, load_hardware
from dsmini.planner.layout_search import search_layouts
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.request import PlanRequest
from dsmini.planner.setup import Model, setup, with_reached_links
from dsmini.planner.training import layout_choice, layout_table
from dsmini.planner.training.assumptions import Assumptions
from dsmini.planner.training.layout import Layout
from dsmini.planner.training.layout_choice import V3_LAYOUT, ChosenLayout, Cluster, choose_layout
from dsmini.planner.training.layout_table import Choices
from dsmini.planner.training.search import search
from dsmini.planner.training.training_plan import plan_unchecked, training_plan
from dsmini.planner.training.workload import Workload
from tests.helpers.configs import CONFIGS, refusal, released

H800 = with_reached_links(load_hardware("h800"))


def cluster_of(name: str, hardware: Hardware = H800, batch: int = 15360, **changes: Any) -> Cluster:
    config: ModelConfig = released(name, **changes)
    return Cluster(
        m=ModelInputs.of(config, "a test"),
        hardware=hardware,
        workload=Workload.of(seq_len=4096, batch=batch, tokens=1e12, source="a test"),
        assumptions=Assumptions.of(),
        defaults=Layout(precision="bf16"),
    )


def fits(cluster: Cluster, chosen: ChosenLayout) -> bool:
    plan = training_plan(cluster.m, cluster.hardware, chosen.layout, cluster.workload, cluster.assumptions)
    return plan.fits


def test_v3_takes_its_own_layout() -> None:
    chosen = choose_layout(cluster_of("deepseek-v3"), {})
    assert chosen.layout == V3_LAYOUT and chosen.how == "as DeepSeek-V3 was trained"


def test_choices_of_the_user_replace_those_of_v3() -> None:
    chosen = choose_layout(cluster_of("deepseek-v3"), {"gpus": 1024, "zero": 0})
    assert chosen.layout == dataclasses.replace(V3_LAYOUT, gpus=1024, zero=0)
    assert chosen.how.endswith("but gpus=1024, zero=0")


def test_another_model_does_not_take_v3s_layout() -> None:
    """One size of V3 does not make a model V3."""
    chosen = choose_layout(cluster_of("deepseek-v3", n_layers=60), {})
    assert chosen.layout != V3_LAYOUT and "DeepSeek" not in chosen.how


def test_v3_on_hardware_that_its_layout_does_not_fit_takes_another() -> None:
    small = with_reached_links(load_hardware("a100-pcie"))
    cluster = cluster_of("deepseek-v3", small)
    chosen = choose_layout(cluster, {})
    assert chosen.layout.pipeline != 16 or chosen.layout.precision != "fp8"
    assert fits(cluster, chosen)


def test_fewest_gpus_that_fit() -> None:
    """Half as many have no layout at all, by a search of all choices."""
    cluster = cluster_of("deepseek-v2-lite")
    chosen = choose_layout(cluster, {})
    assert fits(cluster, chosen)
    half = chosen.layout.gpus // 2
    assert half >= 1
    all_choices = Choices(precisions=("bf16",))
    said = refusal(search, cluster.m, H800, cluster.workload, half, choices=all_choices)
    assert said.startswith(f"no layout on gpus={half} fits 80 GB")


@pytest.mark.parametrize("hardware", ["h800", "a100-pcie"])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "kimi-k2"])
@pytest.mark.parametrize("given", [{}, {"gpus": 512}])
def test_sizes_left_out_early_would_not_be_chosen(
    name: str, hardware: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = cluster_of(name, with_reached_links(load_hardware(hardware)), n_mtp_layers=0)
    chosen = choose_layout(cluster, given)
    monkeypatch.setattr(layout_choice, "SLACK", 1e9)
    assert choose_layout(cluster, given) == chosen


def test_choice_for_a_trillion_parameters_builds_few_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building formulas is what takes the time of a plan: 112 of them took most of 1.3 s."""
    built: list[Layout] = []

    def count(m: Any, hardware: Any, layout: Layout, *rest: Any) -> Any:
        built.append(layout)
        return plan_unchecked(m, hardware, layout, *rest)

    monkeypatch.setattr(layout_table, "plan_unchecked", count)
    choose_layout(cluster_of("kimi-k2"), {})
    assert 12 < len(built) <= 80


def test_given_sizes_are_held() -> None:
    cluster = cluster_of("deepseek-v2-lite")
    chosen = choose_layout(cluster, {"gpus": 16, "pipeline": 2, "expert": 4, "zero": 1}).layout
    assert (chosen.gpus, chosen.pipeline, chosen.expert, chosen.zero) == (16, 2, 4, 1)
    assert choose_layout(cluster, {"pipeline": 4}).layout.pipeline == 4


def test_gpus_that_are_too_few_are_an_error_with_what_would_fit() -> None:
    said = refusal(choose_layout, cluster_of("deepseek-v3"), {"gpus": 8})
    assert said.startswith("no layout on gpus=8 fits 80 GB a GPU: the smallest needs ") and "use gpus=256" in said


def test_chosen_sizes_that_do_not_fit_are_planned_with_least_memory() -> None:
    cluster = cluster_of("deepseek-v3", n_layers=60)
    chosen = choose_layout(cluster, {"gpus": 8, "pipeline": 1})
    assert chosen.layout.gpus == 8 and "none fits" in chosen.how and not fits(cluster, chosen)


def test_layout_that_does_not_divide_is_an_error() -> None:
    said = refusal(choose_layout, cluster_of("deepseek-v2-lite"), {"gpus": 16, "pipeline": 3})
    assert said.startswith("pipeline=3 and tensor=1 do not divide gpus=16; use ")
    said = refusal(choose_layout, cluster_of("deepseek-v2-lite"), {"gpus": 64, "expert": 64, "pipeline": 2})
    assert said.startswith("expert=64 does not divide the 32 GPUs of a stage")
    said = refusal(choose_layout, cluster_of("deepseek-v2-lite", batch=10), {"gpus": 16, "pipeline": 1, "tensor": 1})
    assert said.startswith("a step of batch=10 sequences is not divisible")


def test_hardware_without_links_takes_one_gpu() -> None:
    chosen = choose_layout(cluster_of("deepseek-v2-lite", load_hardware("laptop")), {"precision": "fp32"})
    assert chosen.layout.gpus == 1 and "none fits" in chosen.how


def test_search_holds_what_was_chosen() -> None:
    request = PlanRequest(gpus=256, precision="fp8", schedule="1f1b", recompute="full")
    made = setup(request, Model.from_file(CONFIGS / "deepseek-v3.toml"), load_hardware("h800"))
    seen: list[float] = []
    found = search_layouts(made, request.layout_fields, lambda done, what: seen.append(done))
    assert {(c.layout.precision, c.layout.schedule, c.layout.recompute) for c in found} == {("fp8", "1f1b", "full")}
    assert {c.layout.moments for c in found} == {"bfloat16"}, "as the config's recipe says"
    times = [c.plan.step.roof_step.value for c in found]
    assert times == sorted(times) and seen[-1] == pytest.approx(1)
