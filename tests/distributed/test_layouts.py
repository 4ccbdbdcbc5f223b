"""Training in every layout of ranks equals training in one process: losses, loads, and all tensors afterwards.

Two parts of the batch, and the stages of a pipeline, sum in the order of one process: they have the same bits.
"""

import itertools
import math
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsmini import ModelConfig, TrainConfig, Transformer
from dsmini.config.run import CHUNKS, ParallelConfig, ScheduleName
from dsmini.distributed.expert_parallel import moe_layers, run_local
from dsmini.distributed.mesh import Mesh, unequal_replicas
from dsmini.distributed.pipeline import StageLayout, divided
from dsmini.distributed.world import World
from dsmini.nn.transformer import IGNORE
from tests.conftest import MODELS, SMALL
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Trained, exactly, far_apart, held_pieces, new_trainer, train, up_to_sums
from tests.helpers.configs import refusal
from tests.helpers.tolerances import FP32_MODEL, FP32_UNIT, rounding

STEPS = 6
FP8: dict[str, Any] = {"dim": 128, "inter_dim": 128, "moe_inter_dim": 128, "precision": "fp8"}


def assert_alike(ranks: list[Trained], want: Trained) -> None:
    """Compare all ranks up to the order of sums. AdamW divides by the size of a gradient: a tiny one may be noise."""
    steps = max(STEPS, len(want.steps))
    most = rounding(FP32_UNIT, 48, 80) * want.losses.abs().max() * steps
    for got in ranks:
        assert (got.losses - want.losses).abs().max() < most and got.losses.equal(ranks[0].losses)
        assert all(torch.equal(g.counts, w.counts) for g, w in zip(got.steps, want.steps, strict=True))  # pyright: ignore
    pieces = [got.pieces for got in ranks]
    assert far_apart(pieces, want.tensors, up_to_sums(steps)) == []
    biases = {name: w for name, w in want.tensors.items() if name.endswith("gate.bias")}
    held = [{name: piece for name, piece in of.items() if name in biases} for of in pieces]
    assert biases and far_apart(held, biases, exactly) == []


class Row(NamedTuple):
    """A layout that trains as one process does, up to the order of sums or bit for bit."""

    parallel: dict[str, Any]
    train: dict[str, Any] = {}  # noqa: RUF012
    base: str = ""
    """Name of a model of helpers/models.toml."""
    model: dict[str, Any] = {}  # noqa: RUF012
    alone: dict[str, Any] | None = None
    """Changes of the train config in one process, which then has the same bits, if that is `exact`."""
    steps: int = STEPS
    exact: bool = True


ROWS = [Row(**row) for row in tomllib.loads(Path(__file__).with_name("layouts.toml").read_text())["row"]]


def test_layouts_have_every_schedule_of_2_and_of_4_stages() -> None:
    for pp in (2, 4):
        assert {row.parallel.get("schedule", "1f1b") for row in ROWS if row.parallel.get("pp") == pp} == {*CHUNKS}


@pytest.mark.parametrize("row", [*ROWS[:4], *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS[4:])], ids=str)
def test_layout_equals_one_process(row: Row) -> None:
    model = MODELS.get(row.base, {}) | row.model
    want = train(World(), None, model, row.train | (row.alone or {}), row.steps)
    n = math.prod(row.parallel.get(name, 1) for name in ("pp", "dp", "ep"))
    ranks = run_ranks(n, train, row.parallel, model, row.train, row.steps)
    if row.alone is None or not row.exact:
        assert_alike(ranks, want)
    else:
        assert all(got.losses.equal(want.losses) for got in ranks)
        assert far_apart([got.pieces for got in ranks], want.tensors, exactly) == []
    for got, step in zip(ranks[0].steps, want.steps, strict=True):
        assert got.tokens == step.tokens
        assert (got.counts is None and step.counts is None) or torch.equal(got.counts, step.counts)  # pyright: ignore
        assert got.grad_norm == pytest.approx(step.grad_norm, rel=FP32_MODEL * STEPS)
        assert (got.indexers is None) == (step.indexers is None) == (row.base not in ("dsa", "glm", "v4"))
        for name, figures in (step.indexers or {}).items():
            assert (got.indexers or {})[name] == pytest.approx(figures, rel=FP32_MODEL * STEPS), name


def masked(world: World, parallel: dict[str, Any]) -> Trained:
    """Take steps of clipped gradients in which half of the rows have one target alone."""
    trainer = new_trainer(world, parallel, {}, {"grad_clip": 0.1})
    real = trainer.loader.take

    def take(requests: Any) -> tuple[Tensor, Tensor]:
        tokens, targets = real(requests)
        first = trainer.mesh.part * len(targets)
        targets = targets.clone()
        targets[[row for row in range(len(targets)) if first + row < 4], 1:] = IGNORE
        return tokens, targets

    trainer.loader.take = take
    return Trained([trainer.step() for _ in range(STEPS)], held_pieces(trainer))


def test_mean_is_over_the_targets_of_all_ranks() -> None:
    assert_alike(run_ranks(2, masked, {"ep": 2}), masked(World(), {}))


@pytest.mark.slow
def test_fp8_rows_are_sent_exactly() -> None:
    """Compare the first step."""
    want, got = train(World(), None, FP8, None, 1), run_ranks(2, train, {"ep": 2}, FP8, None, 1)[0]
    assert (got.losses - want.losses).abs().max() < FP32_MODEL * want.losses.abs().max()
    assert got.steps[0].grad_norm == pytest.approx(want.steps[0].grad_norm, rel=FP32_MODEL)


AVOIDED = [1, 4, 5, 6, 7]
"""Experts that no token goes to: one of rank 0, and all of rank 1."""


def lonely(world: World, parallel: dict[str, Any]) -> Trained:
    """Take two steps in which no token goes to some experts."""
    trainer, steps = new_trainer(world, parallel, {"n_limited_groups": 4}, {"optimizer": "adamw"}), []
    for _ in range(2):
        for gate in trainer.model.gates():
            gate.bias[AVOIDED] = -1e4
        steps.append(trainer.step())
    return Trained(steps, held_pieces(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_experts_without_a_token_have_zero_gradients_and_stay_in_step(zero: int) -> None:
    """AdamW counts the steps of a parameter whose gradient is zero, and not those of one that has none."""
    whole = lonely(World(), {})
    assert not any(step.counts[:, AVOIDED].any() for step in whole.steps if step.counts is not None)
    counts = {name: int(tensor) for name, tensor in whole.tensors.items() if name.endswith(".w1/step")}
    assert counts and set(counts.values()) == {2}
    assert_alike(run_ranks(2, lonely, {"ep": 2, "zero": zero}), whole)


# --- bytes that the expert exchange sends: noted where they leave, and worked out from the routing


@contextmanager
def noted() -> Iterator[list[int]]:
    """Yield a list that gets the bytes which leave this rank in each exchange, in order."""
    left, send = list[int](), dist.all_to_all_single

    def note(came: Tensor, rows: Tensor, receive: Any = None, each: Sequence[int] | None = None, **how: Any) -> Any:
        stay = len(rows) // dist.get_world_size(how["group"]) if each is None else each[dist.get_rank(how["group"])]
        left.append((len(rows) - stay) * rows.shape[1:].numel() * rows.element_size())
        return send(came, rows, receive, each, **how)

    with patch.object(dist, "all_to_all_single", note):
        yield left


def exchange(world: World) -> tuple[dict[str, int], int]:
    """Run a MoE layer forward and backward on tokens; return what was sent, and the token-expert pairs elsewhere."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL | FP8 | {"n_mtp_layers": 0}))
    ranks = Mesh(ParallelConfig(ep=world.size), torch.device("cpu"))
    ranks.divide(model)
    (moe,) = moe_layers(model)
    torch.manual_seed(1 + world.rank)
    with noted() as left:
        y, routing = moe(torch.randn(50, 128, requires_grad=True))
        y.sum().backward()
    sent = dict(zip(("counts", *BYTES), left, strict=True))
    return sent, int((routing.indices // (8 // world.size) != world.rank).sum())


BYTES = {"dispatch": 128 + 4, "combine": 4 * 128, "combine_gradients": 4 * 128, "dispatch_gradients": 4 * 128}
"""Bytes of a row in each exchange after that of counts, in order: E4M3 codes with one scale, else FP32."""


@pytest.mark.slow
def test_exchange_sends_one_row_a_token_expert_pair() -> None:
    every = run_ranks(4, exchange)
    for sent, pairs in every:
        for what in ("dispatch", "combine_gradients"):  # leave with the token
            assert sent[what] == pairs * BYTES[what]
    for what in ("combine", "dispatch_gradients"):  # come back to it, so they leave from all others
        assert sum(sent[what] for sent, _ in every) == sum(pairs for _, pairs in every) * BYTES[what]


def dispatched(world: World, zero: int) -> list[int]:
    """Return the bytes that leave this rank in each exchange of a step of FP8 training."""
    trainer = new_trainer(world, {"ep": 2, "dp": 2, "zero": zero}, MODELS["fp8"], {})
    with noted() as left:
        trainer.step()
    return left


@pytest.mark.slow
def test_rows_travel_as_codes_where_experts_are_divided_too() -> None:
    assert run_ranks(4, dispatched, 1) == run_ranks(4, dispatched, 0)


def test_experts_of_what_came_wait_for_no_device() -> None:
    """The number of rows is known. On the meta device there are no counts that could be added up to it."""
    chosen: Any = lambda rows, experts, ones: experts * ones.long()  # noqa: E731
    counts = torch.tensor([[2, 0], [1, 3]])
    assert run_local(chosen, torch.randn(6, 4), counts).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert run_local(chosen, torch.randn(6, 4, device="meta"), counts.to("meta")).shape == (6, 1)


# --- the stages of a pipeline: what they do besides training, and their layers


REFUSALS = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text())


def steps_and_rest(world: World) -> dict[str, Any]:
    """Return what a pipeline does besides training, for each schedule."""
    found: dict[str, Any] = {}
    for name in CHUNKS:
        options = {"grad_accum": 4, "eval_tokens": 64}
        trainer = new_trainer(world, {"pp": 2, "schedule": name}, {"n_layers": 4}, options)
        phases: list[str] = []
        trainer.phase = phases.append
        for _ in range(2):
            trainer.step()
        found[name] = {
            "phases": phases,
            "unequal": unequal_replicas(world, trainer.held_alike()),
            "compared": {tensor for named in trainer.held_alike().values() for tensor in named},
            "validation": [trainer.validate(tokens_at_a_time=n) for n in (48, 8192)],
            "names": {n for n, _ in trainer.model.named_parameters()},
        }
    return found


@pytest.fixture(scope="module")
def rest() -> list[dict[str, Any]]:
    return run_ranks(2, steps_and_rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHUNKS)
def test_stages_validate_as_one_and_share_the_embedding(name: ScheduleName, rest: list[dict[str, Any]]) -> None:
    ranks = [of_rank[name] for of_rank in rest]
    trainer = new_trainer(World(), {}, {"n_layers": 4}, {"grad_accum": 4})
    for _ in range(2):
        trainer.step()
    want = trainer.validate()
    for found in ranks:
        assert found["validation"] == pytest.approx([want, want], rel=1e-6)
        assert {"forward", "backward"} <= set(found["phases"])
        assert found["unequal"] == ([], "")
    first, last = (found["names"] for found in ranks)
    assert first | last == {n for n, _ in trainer.model.named_parameters()}
    assert first & last == (set() if name in ("zbv", "dualpipev") else {"embed.weight"})
    if first & last:
        of_embedding = {"model/embed.weight", "optimizer/embed.weight/exp_avg"}
        assert all(of_embedding <= found["compared"] for found in ranks)


SHARED = MODELS["glm"] | {"indexer_types": ("full", "shared", "shared", "shared"), "n_mtp_layers": 0}


def scored(world: World, parallel: dict[str, Any], index_topk: int) -> float:
    model = SHARED | {"index_topk": index_topk, "init_std": 0.3}
    return new_trainer(world, parallel, model, {"grad_accum": 4, "eval_tokens": 64}).validate(tokens_at_a_time=48)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("index_topk", [4, 16])
def test_stages_that_begin_with_a_shared_layer_validate_as_one(schedule: str, index_topk: int) -> None:
    """With a top-k of 16 all keys of 16 tokens are read, and no choice is sent."""
    want = scored(World(), {}, index_topk)
    got = run_ranks(2, scored, {"pp": 2, "schedule": schedule}, index_topk)
    assert got == pytest.approx([want, want], rel=1e-6)
    assert abs(want - scored(World(), {}, 20 - index_topk)) > 1e-4, "the choice shows"


def test_a_stage_takes_the_choice_that_its_first_layer_needs() -> None:
    """Only there, and only with an objective of several layers what the indexer learns by."""
    for types, target, want in (
        (("full", "shared", "full", "shared"), "own", []),
        (("full", "shared", "shared", "shared"), "own", [(3, 16, 8)]),
        (("full", "shared", "shared", "full"), "served", [(3, 16, 8), (3, 16, 5, 32), (3, 16, 32), (3, 16, 5)]),
    ):
        model = Transformer(ModelConfig(**SMALL | SHARED | {"indexer_types": types, "indexer_target": target}))
        layout = StageLayout.of(model, ParallelConfig(pp=2))
        assert layout.layers[1] == range(2, 4)
        assert layout.carried(1, 3, 16) == [(2,), *want]  # one MoE layer before, and the indexers' loss


# Config and layout


@pytest.mark.parametrize("case", REFUSALS["pipeline"], ids=lambda case: case["said"])
def test_config_refuses_what_a_pipeline_cannot_do(case: dict[str, Any]) -> None:
    config, recipe = ParallelConfig(**case["parallel"]), TrainConfig(batch_size=840, **case["train"])
    model = ModelConfig(**SMALL | MODELS.get(case.get("base"), {}) | case.get("model", {}))
    said = refusal(config.check, model, recipe, config.pp)
    assert case["said"] in said and case.get("fix", "") in said


def test_layers_are_divided_where_the_largest_cost_is_smallest() -> None:
    for costs in itertools.product((1, 2, 5), repeat=5):
        for n in range(1, 6):
            got = divided(costs, n)
            cuts = itertools.combinations(range(1, 5), n - 1)
            ways = ([range(a, b) for a, b in itertools.pairwise((0, *cut, 5))] for cut in cuts)
            best = min(max(sum(costs[i] for i in layers) for layers in way) for way in ways)
            assert max(sum(costs[i] for i in layers) for layers in got) == best
            assert [i for layers in got for i in layers] == list(range(5)) and all(map(len, got))
