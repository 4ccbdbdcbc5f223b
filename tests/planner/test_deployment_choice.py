"""Deployments that are left open: V3's own, or the fewest GPUs that hold weights and cache."""

import dataclasses
from typing import Any

import pytest

from dsmini.planner.hardware import Hardware, load_hardware
from dsmini.planner.model.references import reference
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment import Deployment, serving_workload, v3_decode, v3_prefill
from dsmini.planner.serving.deployment_choice import Serving, Stage, choose_deployment
from tests.helpers.configs import refusal, released

H800 = load_hardware("h800")


def serving_of(model: ModelInputs, hardware: Hardware = H800, **changes: Any) -> Serving:
    made = Serving(
        m=model,
        hardware=hardware,
        workload=serving_workload(sequences=1),
        weight_dtype="bfloat16",
        cache_dtype="bfloat16",
    )
    return dataclasses.replace(made, **changes)


def model(name: str) -> ModelInputs:
    return ModelInputs.of(released(name), "a test")


def numbers(found: Any) -> tuple[float, ...]:
    made = found.deployment
    return (made.tensor_parallel.value, made.expert_parallel.value, made.redundant_experts.value)


def test_v3_takes_its_own_deployments() -> None:
    serving = serving_of(model("deepseek-v3"), weight_dtype="fp8")
    stages: list[tuple[Stage, Deployment]] = [("decode", v3_decode()), ("prefill", v3_prefill())]
    for stage, published in stages:
        made = choose_deployment(serving, stage, None, None, None).deployment
        for field in dataclasses.fields(made):
            mine, theirs = getattr(made, field.name), getattr(published, field.name)
            assert repr(mine) == repr(theirs), field.name


def test_other_dtypes_change_what_is_sent() -> None:
    made = choose_deployment(serving_of(model("deepseek-v3")), "decode", None, None, None).deployment
    assert made.weight_dtype == "bfloat16" and made.dispatch_number.value == 2


@pytest.mark.parametrize(("name", "gpus"), [("deepseek-v2-lite", 1), ("deepseek-v2", 16), ("kimi-k2", 64)])
def test_fewest_gpus_hold_weights_and_cache(name: str, gpus: int) -> None:
    """V2-Lite has 31 GB of weights, V2 470 GB and Kimi K2 2 TB in BF16; dense parts are on every GPU."""
    serving = serving_of(model(name))
    found = choose_deployment(serving, "decode", None, None, None)
    assert numbers(found)[:2] == (1, gpus)

    def share(count: int) -> float:
        made = choose_deployment(serving, "decode", count, None, None).deployment
        return decode_plan(serving.m, H800, serving.workload, made).memory.share.value

    assert share(gpus) <= 1
    assert gpus == 1 or share(gpus // 2) > 1


def test_dense_model_divides_its_heads_within_a_node() -> None:
    found = choose_deployment(
        serving_of(reference("llama-3.1-405b"), load_hardware("b200")), "decode", None, None, None
    )
    tensor, gpus, _ = numbers(found)
    assert tensor == gpus == 8


def test_redundant_experts_make_them_divide() -> None:
    serving = serving_of(model("deepseek-v2"))
    assert numbers(choose_deployment(serving, "decode", 48, None, None)) == (1, 48, 32)
    assert numbers(choose_deployment(serving, "decode", 48, 4, 80)) == (4, 48, 80)


def test_hardware_without_links_takes_one_gpu() -> None:
    laptop = serving_of(model("deepseek-v2"), load_hardware("laptop"), weight_dtype="float32")
    found = choose_deployment(laptop, "decode", None, None, None)
    assert numbers(found) == (1, 1, 0) and "none fits" in found.how
    assert "use 1" in refusal(choose_deployment, laptop, "decode", None, 2, None)


@pytest.mark.parametrize(
    ("stage", "tensor", "said"),
    [
        ("decode", 3, "decode_tensor=3 does not divide n_heads=128; use 1, 2, 4, 8"),
        ("prefill", 300, "prefill_tensor=300 does not divide n_heads=128; use 1, 2, 4, 8"),
        ("decode", 16, "decode_tensor=16 has no node of 8 GPUs to be in; use 1, 2, 4, 8"),
    ],
)
def test_gpus_that_cannot_share_heads_are_refused_with_the_reason(stage: Stage, tensor: int, said: str) -> None:
    assert refusal(choose_deployment, serving_of(model("deepseek-v3")), stage, None, tensor, None) == said


def test_redundant_experts_are_refused_without_numbers_of_gpus_that_nobody_chose() -> None:
    """256 + 5 experts divide by 1, which does not hold V3, and by no other power of two; 320 divide by 64."""
    serving = serving_of(model("deepseek-v3"))
    said = refusal(choose_deployment, serving, "decode", None, None, 5)
    assert said.startswith("decode_redundant=5 makes 261 experts of a layer, which no number of GPUs")
    assert numbers(choose_deployment(serving, "decode", None, None, 64))[1:] == (64, 64)
