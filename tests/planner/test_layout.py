"""Layouts: the published one, and a sentence for each that cannot be."""

import dataclasses
from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.training.layout import Layout, check_layout, layout_figures
from tests.helpers.configs import refusal, released
from tests.helpers.plans import V3_LAYOUT, V3_WORKLOAD

V3 = released("deepseek-v3")


def test_layout_of_v3_as_printed() -> None:
    """PP16 and EP64 over 8 nodes on 2048 GPUs: 128 parts of the batch, 4 experts a GPU (V3, section 3.2)."""
    check_layout(V3_LAYOUT, V3, gpus_per_node=8, batch=15360)
    found = layout_figures(V3_LAYOUT, ModelInputs.of(V3, "configs"), V3_WORKLOAD)
    assert (found.data.value, found.experts_per_gpu.value, found.expert_data.value) == (128, 4, 2)
    assert (found.layers_first.value, found.layers_last.value) == (4, 3)
    assert found.micro_batches.value == 120
    assert (V3_LAYOUT.data, V3_LAYOUT.copies) == (128, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"gpus": 2048, "pipeline": 16, "tensor": 3},
            "pipeline=16 and tensor=3 do not divide gpus=2048; use a tensor of 1, 2, 4, 8, 16, 32, 64 or 2048",
        ),
        (
            {"gpus": 48, "pipeline": 5, "tensor": 4},
            "pipeline=5 and tensor=4 do not divide gpus=48; use a pipeline of 1, 2, 3, 4, 6 or 12",
        ),
        (
            {"gpus": 32, "pipeline": 4, "expert": 6},
            "expert=6 does not divide the 8 GPUs of a stage; use an expert of 1, 2, 4 or 8",
        ),
        (
            {"gpus": 9, "pipeline": 3, "schedule": "dualpipe"},
            "schedule='dualpipe' pairs stages, got pipeline=3; use an even number, or 1f1b",
        ),
        ({"zero": 1}, "zero=1 divides the state over data-parallel GPUs, of which there is one; use zero=0"),
        ({"gpus": 0}, "gpus=0 is not positive; use 1 or more"),
        ({"precision": "fp4"}, "layout.precision='fp4' is not one of 'fp32', 'bf16', 'fp8'; did you mean 'fp8'?"),
    ],
)
def test_layout_that_contradicts_itself_raises(changes: dict[str, Any], sentence: str) -> None:
    assert refusal(Layout, **changes) == sentence


@pytest.mark.parametrize(
    ("changes", "config", "batch", "sentence"),
    [
        (
            {"gpus": 64, "pipeline": 64},
            {},
            64,
            "pipeline=64 is more than n_layers=61; use 61 or fewer stages",
        ),
        (
            {"gpus": 48, "expert": 48},
            {},
            48,
            "n_routed_experts=256 is not divisible by expert=48; use 1, 2, 4, 8, 16, 32, 64 or 256",
        ),
        ({"gpus": 8, "expert": 8}, {"n_dense_layers": 62}, 8, "expert=8 but the model has no MoE layers; use expert=1"),
        (
            {"gpus": 12, "expert": 12},
            {"n_routed_experts": 96},
            12,
            "expert=12 neither fills nodes of 8 GPUs nor divides one; use a multiple or a divisor",
        ),
        ({"gpus": 16, "tensor": 16}, {}, 16, "tensor=16 is more than the 8 GPUs of a node; use 8 or fewer"),
        (
            {"gpus": 8, "tensor": 8},
            {"attention": "gqa", "n_kv_heads": 4},
            8,
            "n_kv_heads=4 is not divisible by tensor=8; use 1, 2 or 4",
        ),
        (
            {"gpus": 8, "micro_batch": 3},
            {},
            50,
            "micro_batch=3 does not divide batch=50 sequences; use 1, 2, 5, 10, 25 or 50",
        ),
        (
            {"gpus": 4, "pipeline": 4},
            {},
            2,
            "pipeline=4 needs at least 4 micro-batches a step, got 2; "
            "use a larger batch, a smaller micro_batch or fewer stages",
        ),
        (
            {"gpus": 4, "pipeline": 4, "schedule": "dualpipe"},
            {},
            9,
            "schedule='dualpipe' with pipeline=4 needs an even number of micro-batches from 8, got 9; "
            "use a larger batch, a smaller micro_batch or fewer stages",
        ),
    ],
)
def test_layout_that_cannot_be_raises(
    changes: dict[str, Any], config: dict[str, Any], batch: int, sentence: str
) -> None:
    model: ModelConfig = dataclasses.replace(V3, **config)
    assert refusal(check_layout, Layout(**changes), model, gpus_per_node=8, batch=batch) == sentence


def test_workload_without_tokens_raises() -> None:
    wrong: dict[str, Any] = {"seq_len": 4096, "batch": 0, "tokens": 1e12, "source": "a test"}
    assert refusal(type(V3_WORKLOAD).of, **wrong) == "batch=0 is not positive; use 1 or more"
