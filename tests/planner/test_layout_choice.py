"""Layouts that are left open: V3's own, or the fastest on the fewest GPUs that fit."""

import dataclasses
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.planner.answers import searched
from dsmini.planner.hardware import Hardware, load_hardware
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
    chosen = choose_layout(cluster_of("deepseek-v3"), {"gpus": 1024, "zero": 2})
    assert chosen.layout == dataclasses.replace(V3_LAYOUT, gpus=1024, zero=2)
    assert chosen.how.endswith("but gpus=1024, zero=2")


def test_v3s_other_choices_give_way_where_they_do_not_fit() -> None:
    """DualPipe holds parameters twice, which does not fit without ZeRO."""
    cluster = cluster_of("deepseek-v3")
    chosen = choose_layout(cluster, {"gpus": 2048, "pipeline": 16, "expert": 64, "tensor": 1, "zero": 0})
    assert (chosen.layout.schedule, chosen.layout.zero) == ("1f1b", 0) and fits(cluster, chosen)


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


def test_gpus_that_are_too_few_are_told_with_what_would_fit() -> None:
    cluster = cluster_of("deepseek-v3")
    said = choose_layout(cluster, {"gpus": 8}).misfit
    assert said.startswith("no layout on gpus=8 fits 80 GB a GPU: the smallest needs ") and "use gpus=256" in said
    chosen = choose_layout(cluster, {"gpus": 256})
    assert fits(cluster, chosen) and not chosen.misfit


def test_sizes_that_do_not_fit_are_told_with_what_would() -> None:
    """The sentence is about these sizes alone, and names choices that were made."""
    cluster = cluster_of("deepseek-v3", n_layers=60)
    given = {"gpus": 256, "pipeline": 1, "zero": 0}
    chosen = choose_layout(cluster, given)
    assert chosen.layout.gpus == 256 and chosen.layout.pipeline == 1 and not fits(cluster, chosen)
    assert ", with pipeline=1, " in chosen.misfit and ", zero=0, " in chosen.misfit
    assert "allow ZeRO 3" in chosen.misfit and "recomputation" not in chosen.misfit
    assert fits(cluster, choose_layout(cluster, given | {"zero": 3}))


def test_one_part_of_the_batch_needs_no_zero() -> None:
    """27 stages of one GPU each: ZeRO has nothing to divide the state over, and without it the model fits."""
    cluster = cluster_of("moonlight")
    chosen = choose_layout(cluster, {"gpus": 27, "pipeline": 27})
    assert (chosen.layout.pipeline, chosen.layout.zero) == (27, 0) and fits(cluster, chosen)


def test_gpus_are_multiples_of_the_given_sizes() -> None:
    cluster = cluster_of("deepseek-v3")
    chosen = choose_layout(cluster, {"pipeline": 7, "precision": "fp8", "moments": "bfloat16"})
    assert chosen.layout.gpus % 7 == 0 and chosen.layout.pipeline == 7 and fits(cluster, chosen)
    said = refusal(choose_layout, cluster, {"pipeline": 62})
    assert said == "pipeline=62 is more than n_layers=61; use 61 or fewer stages"
    said = refusal(choose_layout, cluster, {"micro_batch": 7})
    assert said.startswith("micro_batch=7 does not divide batch=15360 sequences; use 1, 2, 3, ")


def test_small_batch_is_told_with_one_that_fits() -> None:
    """One sequence divides over the 8 GPUs of a node; GPUs that nobody asked for are not named."""
    said = choose_layout(cluster_of("deepseek-v3", batch=1), {}).misfit
    assert said.startswith("no layout on gpus=8 fits 80 GB") and said.endswith("; use gpus=256 and batch=32")
    cluster = cluster_of("deepseek-v3", batch=32)
    assert fits(cluster, choose_layout(cluster, {"gpus": 256}))


def test_hardware_without_links_is_not_told_to_use_more_gpus() -> None:
    laptop = cluster_of("deepseek-v2-lite", load_hardware("laptop"))
    for given in ({"precision": "fp32"}, {"precision": "fp32", "gpus": 1}):
        chosen = choose_layout(laptop, given)
        assert chosen.layout.gpus == 1 and "none fits" in chosen.how
        assert chosen.misfit.startswith("no layout on gpus=1 fits 17.2 GB a GPU")
        assert chosen.misfit.endswith("; use hardware with more memory")
    said = refusal(choose_layout, laptop, {"precision": "fp32", "gpus": 2})
    assert said == "Laptop with eight AVX2 cores has no link that gpus=2 need; use 1"


def test_layout_that_does_not_divide_is_an_error() -> None:
    said = refusal(choose_layout, cluster_of("deepseek-v2-lite"), {"gpus": 16, "pipeline": 3})
    assert said.startswith("pipeline=3 and tensor=1 do not divide gpus=16; use ")
    said = refusal(choose_layout, cluster_of("deepseek-v2-lite"), {"gpus": 64, "expert": 64, "pipeline": 2})
    assert said.startswith("expert=64 does not divide the 32 GPUs of a stage")
    said = refusal(choose_layout, cluster_of("deepseek-v2-lite", batch=10), {"gpus": 16, "pipeline": 1, "tensor": 1})
    assert said.startswith("a step of batch=10 sequences is not divisible")


def test_search_holds_what_was_chosen() -> None:
    request = PlanRequest(gpus=256, precision="fp8", schedule="1f1b", recompute="full")
    made = setup(request, Model.from_file(CONFIGS / "deepseek-v3.toml"), load_hardware("h800"))
    seen: list[float] = []
    found = searched(made, request, "a test", lambda done, what: seen.append(done)).record["layouts"]
    assert {(c["precision"], c["schedule"], c["recompute"]) for c in found} == {("fp8", "1f1b", "full")}
    assert {c["moments"] for c in found} == {"bfloat16"}, "as the config's recipe says"
    times = [c["step_seconds"] for c in found]
    assert times == sorted(times) and seen[-1] == pytest.approx(1)
