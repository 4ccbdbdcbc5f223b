"""Deployments as the DeepSeek-V3 report describes them, and the memory of their GPUs."""

import dataclasses
from typing import Any

import pytest

from dsmini.planner.quantities.formula import evaluate
from dsmini.planner.serving.decoding import DecodePlan, decode_plan
from dsmini.planner.serving.deployment import Deployment, deployment, serving_workload, v3_decode, v3_prefill
from dsmini.planner.serving.prefill import prefill_plan
from tests.helpers.serving_plans import V3, h800, model_of


def decoded(made: Deployment, **workload: Any) -> DecodePlan:
    return decode_plan(model_of(V3), h800(), serving_workload(**workload), made)


def test_prefill_as_printed() -> None:
    """Section 3.4.1: 4 nodes of 32 GPUs, TP4, DP8, EP32, 32 redundant experts, 9 experts a GPU."""
    plan = prefill_plan(model_of(V3), h800(), serving_workload(), v3_prefill())
    assert plan.memory.data_parallel.value == 8
    assert plan.memory.experts.value == 9
    assert v3_prefill().expert_parallel.value / h800().gpus_per_node.value == 4


def test_decode_as_printed() -> None:
    """Section 3.4.2: 40 nodes of 320 GPUs, TP4, DP80, EP320, one expert a GPU, 64 redundant or shared."""
    plan = decoded(v3_decode())
    assert plan.memory.data_parallel.value == 80
    assert plan.memory.experts.value == 1
    assert v3_decode().copies(model_of(V3)).value == 9
    assert v3_decode().expert_parallel.value / h800().gpus_per_node.value == 40


EXPERT = 3 * (7168 * 2048 + 4 * 56 * 16)
"""Bytes of a routed or shared expert in FP8: codes, and an FP32 scale for each block of 128x128."""
HEADS = 24576 * 1536 + 4 * 192 * 12 + 7168 * 16384 + 4 * 56 * 128 + 32768 * 512 + 4 * 256 * 4
LATENTS = 1536 * 7168 + 4 * 12 * 56 + 576 * 7168 + 4 * 5 * 56
GATE = 4 * (256 * 7168 + 256)
NORMS = 4 * (2 * 7168 + 1536 + 512)
DENSE = 3 * (7168 * 18432 + 4 * 56 * 144)
VOCABULARY = 2 * 129280 * 7168


@pytest.mark.parametrize(
    ("plan", "experts"),
    [
        (lambda: decoded(v3_decode()), 1),
        (lambda: prefill_plan(model_of(V3), h800(), serving_workload(), v3_prefill()), 9 + 1),
    ],
    ids=["decode", "prefill"],
)
def test_weights_of_a_gpu(plan: Any, experts: int) -> None:
    """The shared expert is one of decode's experts, and on every GPU in prefill."""
    block = HEADS / 4 + LATENTS + NORMS
    expected = 61 * block + 3 * DENSE + 58 * (experts * EXPERT + GATE) + 2 * VOCABULARY / 4 + 4 * 7168
    assert plan().memory.weights.value == expected


def test_group_of_mla_holds_the_cache_of_the_whole_group() -> None:
    memory = decoded(v3_decode(), sequences=32, context=1000).memory
    assert memory.cache.value == 4 * 2 * 32 * 1000 * 70_272
    alone = decoded(deployment("decode", expert_parallel=320, redundant_experts=64), sequences=64, context=1000).memory
    assert memory.cache.value == 4 * alone.cache.value


@pytest.mark.parametrize(("tp", "copies"), [(1, 1), (2, 1), (4, 1), (8, 2)])
def test_heads_divide_the_cache_of_gqa_as_far_as_there_are_heads(tp: int, copies: int) -> None:
    """Four key-value heads on up to four GPUs of a group; eight GPUs hold each head twice."""
    config = dataclasses.replace(V3, attention="gqa", n_kv_heads=4)
    made = deployment("decode", tensor_parallel=tp, expert_parallel=8, weight_dtype="bfloat16")
    memory = decode_plan(model_of(config), h800(), serving_workload(sequences=5, context=100), made).memory
    row = 4 * (128 + 128) * 61 * 2
    assert memory.cache.value == 5 * 100 * row * copies


def test_what_fits_fits() -> None:
    plan = decoded(v3_decode(), sequences=32, context=4096)
    memory = plan.memory
    assert memory.share.value > 1
    assert memory.sequences.value == 61
    sequence = memory.cache.value / 64
    assert memory.weights.value + 61 * sequence <= 80e9 < memory.weights.value + 62 * sequence
    token = memory.cache.value / 4096
    assert memory.weights.value + memory.context.value * token <= 80e9
    assert memory.weights.value + (memory.context.value + 1) * token > 80e9
    assert evaluate(memory.used, {"context": memory.context.value}) <= 80e9


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (
            deployment("decode", expert_parallel=3),
            "256 experts, redundant ones included, do not divide by 3 GPUs; add 2",
        ),
        (deployment("decode", expert_parallel=32, tensor_parallel=3), "use a divisor of 32"),
        (deployment("decode", expert_parallel=32, tensor_parallel=16), "more than a node has; use 8"),
    ],
)
def test_refusal_of_deployments_that_do_not_divide(made: Deployment, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decoded(made)


@pytest.mark.parametrize("name", ["tensor_parallel", "expert_parallel", "micro_batches", "imbalance"])
def test_refusal_of_numbers_below_one(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 is too small"):
        deployment("decode", **wrong)


@pytest.mark.parametrize(("name", "value"), [("sequences", 0), ("context", 0), ("acceptance", 1.0), ("drafts", 0)])
def test_refusal_of_workloads(name: str, value: float) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name}={value} is not"):
        serving_workload(**wrong)


def test_refusal_of_hardware_without_what_is_needed() -> None:
    alone = dataclasses.replace(h800(), fast_link=None, slow_link=None)
    with pytest.raises(ValueError, match="h800 has no slow link, want one for several nodes; plan one node"):
        decode_plan(model_of(V3), alone, serving_workload(), deployment("decode", expert_parallel=32))
    with pytest.raises(ValueError, match="h800 has no fast link, want one for several GPUs in a node; plan one GPU"):
        decode_plan(model_of(V3), alone, serving_workload(), deployment("decode", expert_parallel=8))
    with pytest.raises(ValueError, match="h800 has no float32 units"):
        decode_plan(model_of(V3), alone, serving_workload(), deployment("decode", weight_dtype="float32"))
    decode_plan(model_of(V3), alone, serving_workload(), deployment("decode"))
