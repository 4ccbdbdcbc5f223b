"""Counting without running: the same operations as a real step, no numbers, next to no memory."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, TrainConfig, ops
from dsmini.measure.counting import Count, count, counted_twice
from dsmini.measure.dry import Dry, dry_count, idle_kernels
from dsmini.measure.workloads import StepDtype, StepShape, Work
from tests.helpers.questions import TINY

CPU = torch.device("cpu")
LARGER = dataclasses.replace(TINY, n_layers=1, n_dense_layers=0, dim=256, moe_inter_dim=128, n_mtp_layers=1)
"""Large enough for the kernels of experts."""
SHAPES: list[tuple[Work, ModelConfig, int, int]] = [
    ("training", LARGER, 3, 96),
    ("prefill", LARGER, 2, 63),
    ("decode", TINY, 3, 40),
]


def shape_of(work: Work, config: ModelConfig, batch: int, tokens: int, dtype: StepDtype) -> StepShape:
    return StepShape(work=work, config=config, dtype=dtype, batch=batch, tokens=tokens)


def ran(counted: Count) -> list[tuple[str, str, int, torch.dtype]]:
    return [(op.name, op.kind, op.flops, op.dtype) for op in counted.operations]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("given", SHAPES, ids=lambda given: given[0])
def test_dry_step_counts_the_operations_of_a_real_one(
    given: tuple[Work, ModelConfig, int, int], dtype: StepDtype
) -> None:
    shape = shape_of(*given, dtype)
    real = counted_twice(lambda: shape.make(CPU), Count())
    dry = dry_count(lambda: shape.make(CPU))
    assert ran(dry) == ran(real)
    assert dry.views == real.views
    assert len(dry.operations) > 10
    # decoding reads the experts that tokens visit, which chance decides: here 4 to 6 of 8
    assert dry.bytes == pytest.approx(real.bytes, rel=0.3 if shape.work == "decode" else 1e-3)
    assert dry.peak == pytest.approx(real.peak, rel=0.01)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_dry_step_counts_each_optimizer(optimizer: Any) -> None:
    train = TrainConfig(optimizer=optimizer, moments="bfloat16", grad_accum=2, recompute=True)
    config = dataclasses.replace(TINY, n_layers=1, n_dense_layers=0)
    shape = dataclasses.replace(shape_of("training", config, 2, 16, "bfloat16"), train=train)
    real = counted_twice(lambda: shape.make(CPU), Count())
    assert ran(dry_count(lambda: shape.make(CPU))) == ran(real)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_dry_step_chooses_fewer_keys_than_there_are(backend: str | None) -> None:
    dense = dataclasses.replace(TINY, n_dense_layers=TINY.n_layers)  # chance decides the products of experts
    sparse = dataclasses.replace(dense, attention="dsa", index_n_heads=2, index_head_dim=64, index_topk=16)
    shape = shape_of("decode", sparse, 2, 40, "float32")
    with ops.use(backend):
        assert ran(dry_count(lambda: shape.make(CPU))) == ran(counted_twice(lambda: shape.make(CPU), Count()))


def test_dry_step_computes_no_numbers() -> None:
    with Dry():
        x = torch.full((64, 64), 3.0)
        y = x @ x
        assert y.sum().item() == 1.0, "a number that is asked for"
        assert bool((y > 5).all()), "a comparison is true"
        assert torch.arange(3).sum().item() == 3, "shapes depend on whole numbers"
    assert y.shape == (64, 64) and y.dtype == torch.float32


def test_dry_step_needs_no_memory() -> None:
    """Multiply matrices that this machine could not hold."""
    with Dry() as counted:
        x = torch.empty(1 << 17, 1 << 15, dtype=torch.bfloat16)
        (x @ torch.empty(1 << 15, 1 << 15, dtype=torch.bfloat16)).mul_(2)
    assert counted.flops == 2 << 47
    assert counted.peak == 2 * ((2 << 32) + (1 << 30))
    assert counted.held == counted.peak - 2 * ((1 << 32) + (1 << 30)), "only x has a name"


def test_held_bytes_follow_what_exists() -> None:
    with Count() as counted:
        x = torch.ones(1000)
        assert counted.held == 4000
        y = x + x
        del x
        assert (counted.held, counted.peak) == (4000, 8000)
        z = y[:10]
        del y
        assert counted.held == 4000, "a view holds the whole"
        del z
    assert (counted.held, counted.peak) == (0, 8000)


def test_experts_are_chosen_distinct_and_alike_likely() -> None:
    with Dry():
        chosen = torch.rand(4000, 8).sort(dim=-1, descending=True, stable=True).indices[:, :3]
    counts = chosen.flatten().bincount(minlength=8)
    assert all(len(set(row)) == 3 for row in chosen[:200].tolist())
    assert counts.min() > 0.9 * 1500 and counts.max() < 1.1 * 1500


def test_kernels_compute_again_after_a_dry_run() -> None:
    x, weight = torch.randn(4, 512), torch.randn(512, 512)
    want = x @ weight.T

    def linear() -> Tensor:
        from dsmini.nn.layers import linear as multiply

        with torch.no_grad():
            return multiply(x, weight)

    with idle_kernels(), torch.no_grad():
        idle = count(linear)
    assert [op.name for op in idle.operations] == ["linear"]
    torch.testing.assert_close(linear(), want, rtol=1e-4, atol=1e-3)
