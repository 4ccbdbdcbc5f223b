"""Counted bytes and FLOPs: each rule by hand, whole steps against torch's counter and the config."""

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsmini import ModelConfig, TrainConfig, Transformer, ops
from dsmini.measure import counting
from dsmini.measure.costs import Cost
from dsmini.measure.counting import Count, CountedOperation, count, counted_twice
from dsmini.measure.dry import Dry, dry_count, idle_kernels
from dsmini.measure.workloads import StepDtype, StepShape, Work, training_step
from tests.conftest import SMALL, randomise
from tests.helpers.configs import V4_MODEL
from tests.helpers.questions import TINY

F4, I8 = 4, 8


def only(run: Callable[[], object]) -> CountedOperation:
    counted = count(run).operations
    assert len(counted) == 1, [op.name for op in counted]
    return counted[0]


X, Y, MASK = torch.rand(6, 10), torch.rand(6, 10), torch.rand(6, 10) < 0.3
TABLE, ROWS = torch.rand(50, 10), torch.tensor([3, 3, 7])
BYTES = tomllib.loads(Path(__file__).with_name("bytes.toml").read_text())


@pytest.mark.parametrize("what", BYTES)
def test_bytes_by_hand(what: str) -> None:
    operation, *counted = BYTES[what]
    run = lambda: eval(operation)  # noqa: E731
    op = count(run).operations[-1] if what.endswith("in a copy") else only(run)
    assert [op.read, op.written] == [eval(of) for of in counted]


def test_in_inference_mode_the_same_is_counted() -> None:
    model = randomise(Transformer(TINY)).eval()
    tokens = torch.randint(0, 256, (2, 70))
    with torch.no_grad():
        plain = count(lambda: model(tokens))
    with torch.inference_mode():
        whole = count(lambda: model(tokens))
    assert whole.flops == plain.flops > 0
    assert 0.9 < whole.bytes / plain.bytes <= 1  # there torch computes a norm with other operations


def test_a_fused_optimizer_reads_gradients_and_leaves_them() -> None:
    p = torch.nn.Parameter(torch.rand(1000))
    adamw = torch.optim.AdamW([p], fused=True)
    p.grad = torch.rand(1000)
    adamw.step()
    (op,) = [op for op in count(adamw.step).operations if op.name == "_fused_adamw_"]
    assert abs(op.written - 3 * 4000) <= 8 and abs(op.read - 4 * 4000) <= 8


def test_views_and_room_are_free_but_are_calls() -> None:
    counted = count(lambda: torch.empty(4, 4).view(16).unsqueeze(0).expand(3, 16).transpose(0, 1).detach())
    assert not counted.operations and counted.views >= 5


def test_experts_without_rows_are_not_read() -> None:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    x, w = torch.rand(12, 16), torch.rand(4, 16, 8)
    ends = torch.tensor([5, 5, 12, 12], dtype=torch.int32)
    op = only(lambda: F.grouped_mm(x, w, offs=ends))
    assert (op.kind, op.flops) == ("grouped product", 2 * 12 * 16 * 8)
    assert (op.read, op.written) == (12 * 16 * F4 + 2 * 16 * 8 * F4 + 4 * 4, 12 * 8 * F4)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_is_counted_with_causality(causal: bool) -> None:
    q, k, v = (torch.rand(2, 3, 200, 16, requires_grad=True) for _ in range(3))
    with Count() as forward:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with Count() as backward:
        y.sum().backward()
    pairs = 200 * 201 // 2 if causal else 200 * 200
    assert forward.flops == 2 * 6 * pairs * 32
    assert backward.flops == 5 * 6 * pairs * 32


def test_products_as_torch_counts_them() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 8))
    x = torch.rand(5, 7, 16)

    def step() -> None:
        y = layers(x)
        (y @ y.mT).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        step()
    assert count(step).flops == theirs.get_total_flops() > 0


def test_a_cache_keeps_what_was_used_last() -> None:
    """Use sums, which write only four bytes, so that cold bytes are those read."""
    a, b, c, large = (torch.rand(n) for n in (1000, 1000, 1000, 3000))
    for room, order, warm in (
        (1 << 20, (a, b, c, a, b, c), (False, False, False, True, True, True)),
        (8100, (a, b, b, a, c, a, b), (False, False, True, True, False, True, False)),
        (8100, (large, a, a, large, large), (False, False, True, False, False)),
    ):
        with Count(room) as counted:
            results = [x.sum() for x in order]
        assert [op.cold < 4000 for op in counted.operations] == list(warm)
        of_last = {results[-1].data_ptr(): 4, order[-1].data_ptr(): 0 if warm[-1] else order[-1].nbytes}
        assert counted.cold_parts == of_last, "of the last operation alone"
        del results


@pytest.mark.parametrize(("n", "first", "again"), [(1000, 4000, 0), (3000, 24_000, 24_000)])
def test_a_kernel_finds_what_it_used_last(monkeypatch: pytest.MonkeyPatch, n: int, first: int, again: int) -> None:
    """Count a kernel that changes a tensor in place: one that a cache of 8,100 bytes holds, and a larger one."""
    counter, x = Count(8100), torch.rand(n)
    monkeypatch.setattr(counting, "cost_of", lambda *_: Cost(x.nbytes, x.nbytes, 0))
    for _ in range(2):
        counter.kernel_ran(ops.Call("a_kernel", (x,), {}, None))
    assert [(op.cold, op.kind) for op in counter.operations] == [(first, "a kernel"), (again, "a kernel")]


# --- counting without running

CPU = torch.device("cpu")
LARGER = dataclasses.replace(TINY, n_layers=1, n_dense_layers=0, dim=256, moe_inter_dim=128, n_mtp_layers=1)
"""Large enough for the kernels of experts."""
SHAPES: list[tuple[Work, ModelConfig, int, int]] = [
    ("training", LARGER, 3, 96),
    ("prefill", LARGER, 2, 63),
    ("decode", TINY, 3, 40),
    ("decode", ModelConfig(**SMALL | V4_MODEL | {"n_mtp_layers": 0, "max_seq_len": 64}), 3, 40),
]


def shape_of(work: Work, config: ModelConfig, batch: int, tokens: int, dtype: StepDtype) -> StepShape:
    return StepShape(work=work, config=config, dtype=dtype, batch=batch, tokens=tokens)


def ran(counted: Count) -> list[tuple[str, str, int, torch.dtype]]:
    return [(op.name, op.kind, op.flops, op.dtype) for op in counted.operations]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("given", SHAPES, ids=lambda given: given[0])
def test_dry_step_counts_what_a_real_one_runs(given: tuple[Work, ModelConfig, int, int], dtype: StepDtype) -> None:
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


def test_indexers_learn_in_a_training_step() -> None:
    sparse = dataclasses.replace(TINY, attention="dsa", index_n_heads=2, index_head_dim=64, index_topk=16)
    models: list[Transformer] = []
    step = training_step(sparse, TrainConfig(), torch.float32, 2, 40, CPU, change=models.append)
    weights = [p for name, p in models[0].named_parameters() if name.endswith("indexer.wk.weight")]
    before = [p.detach().clone() for p in weights]
    step()
    assert weights and not any(torch.equal(p, was) for p, was in zip(weights, before, strict=True))


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
