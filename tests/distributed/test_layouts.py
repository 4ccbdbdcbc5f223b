"""Training in every layout of ranks equals training in one process: losses, loads, and all tensors afterwards.

Two parts of the batch, and the stages of a pipeline, sum in the order of one process: they have the same bits.
"""

import itertools
import math
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ModelConfig, TrainConfig, Transformer
from dsmini.config.run import CHUNKS, ParallelConfig, ScheduleName
from dsmini.distributed.expert_parallel import moe_layers, run_local
from dsmini.distributed.mesh import Mesh, local, unequal_replicas
from dsmini.distributed.pipeline import Pipeline, StageLayout, divided
from dsmini.distributed.world import World
from dsmini.nn.transformer import IGNORE
from dsmini.training.optim import optimizer_state
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
        assert (got.indexers is None) == (step.indexers is None) == (row.base not in ("dsa", "v4"))
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


def lonely(world: World, parallel: dict[str, Any], avoided: list[int]) -> dict[str, Any]:
    """Take two steps in which no token goes to some experts; return this rank's gradients of experts, and moments."""
    trainer = new_trainer(world, parallel, {"n_limited_groups": 4}, {"optimizer": "adamw"})
    gates = list(trainer.model.gates())
    grads: dict[str, Any] = {}

    def phase(name: str) -> None:
        if name == "optimizer":
            for p_name, p in trainer.model.named_parameters():
                if ".experts." in p_name:
                    grads[p_name] = None if p.grad is None else local(p.grad).clone()

    trainer.phase = phase
    for _ in range(2):
        for gate in gates:
            gate.bias[avoided] = -1e4
        result = trainer.step()
        assert result.counts is not None and not result.counts[:, avoided].any() and result.counts.sum() > 0
    state = optimizer_state(trainer.optimizers, trainer.model.named_parameters())
    steps = {name: t.item() for name, t in state.items() if name.endswith("/step")}
    moments = {name: local(t).clone() for name, t in state.items() if "exp_avg" in name}
    return {"grads": grads, "steps": steps, "moments": moments, "bias": [gate.bias.clone() for gate in gates]}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_experts_without_a_token_have_zero_gradients_and_stay_in_step(zero: int) -> None:
    avoided = [1, 4, 5, 6, 7]  # one of rank 0, and all of rank 1
    whole = lonely(World(), {}, avoided)
    for rank, got in enumerate(run_ranks(2, lonely, {"ep": 2, "zero": zero}, avoided)):
        assert got["grads"].keys() == whole["grads"].keys()
        for name, grad in got["grads"].items():
            assert grad is not None, name
            empty = [number for number in range(4) if rank * 4 + number in avoided]
            assert not grad[empty].any() and (rank == 1 or grad[0].any())
        assert got["steps"] == whole["steps"] and set(got["steps"].values()) == {2.0}
        for name, moment in got["moments"].items():
            if ".experts." in name:
                torch.testing.assert_close(moment, whole["moments"][name][4 * rank : 4 * rank + 4])
        assert all(torch.equal(a, b) for a, b in zip(got["bias"], whole["bias"], strict=True))


# --- bytes that the expert exchange sends: counted, and worked out from the routing

TOKENS, E, K = 1500, 8, 2
EVEN: dict[str, Any] = SMALL | {
    **{"dim": 128, "inter_dim": 128, "moe_inter_dim": 128, "n_routed_experts": E, "n_activated_experts": K},
    **{"n_expert_groups": 2, "n_limited_groups": 2, "n_mtp_layers": 0, "precision": "fp8"},
}


def exchange(world: World) -> tuple[Counter[str], int]:
    """Run a MoE layer forward and backward on evenly drawn tokens; return what was sent, and the pairs elsewhere."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**EVEN))
    ranks = Mesh(ParallelConfig(ep=world.size), torch.device("cpu"))
    ranks.divide(model)
    (moe,) = moe_layers(model)
    torch.nn.init.orthogonal_(moe.gate.weight)  # independent scores: all experts are equally likely
    torch.manual_seed(1 + world.rank)
    x = torch.randn(TOKENS, 128, requires_grad=True)
    y, routing = moe(x)
    y.sum().backward()
    return ranks.traffic, int((routing.indices // (E // world.size) != world.rank).sum())


BYTES = {"dispatch": 128 + 4, "combine": 4 * 128, "dispatch_gradients": 4 * 128, "combine_gradients": 4 * 128}
"""Bytes of a row: E4M3 codes with one scale, else FP32."""


@pytest.mark.slow
def test_exchange_sends_one_row_a_token_expert_pair() -> None:
    every = run_ranks(4, exchange)
    remote = [pairs for _, pairs in every]
    for sent, pairs in every:
        for what in ("dispatch", "combine_gradients"):  # leave with the token
            assert sent[what] == pairs * BYTES[what]
    for what in ("combine", "dispatch_gradients"):  # come back to it, so they leave from all others
        assert sum(sent[what] for sent, _ in every) == sum(remote) * BYTES[what]
    predicted = TOKENS * K * (1 - 1 / 4)
    for pairs in remote:
        assert pairs == pytest.approx(predicted, abs=4 * math.sqrt(predicted / 4))


def dispatched(world: World, zero: int) -> int:
    """Return the bytes of the rows that a step of FP8 training sends to their experts."""
    trainer = new_trainer(world, {"ep": 2, "dp": 2, "zero": zero}, MODELS["fp8"], {})
    trainer.step()
    return trainer.mesh.traffic["dispatch"]


@pytest.mark.slow
def test_rows_travel_as_codes_where_experts_are_divided_too() -> None:
    assert run_ranks(4, dispatched, 1) == run_ranks(4, dispatched, 0)


def test_experts_of_what_came_wait_for_no_device() -> None:
    """The number of rows is known: without it repeat_interleave asks the device for the sum of its counts."""
    known: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.repeat_interleave.Tensor:
                known.append((kwargs or {}).get("output_size") is not None)
            return func(*args, **(kwargs or {}))

    class Chosen(torch.nn.Module):
        def forward(self, rows: Tensor, experts: Tensor, ones: Tensor) -> Tensor:
            return experts * ones.long()

    with Watch():
        chosen = run_local(Chosen(), torch.randn(6, 4), torch.tensor([[2, 0], [1, 3]]))
    assert chosen.flatten().tolist() == [0, 0, 0, 1, 1, 1] and known == [True]


# --- the stages of a pipeline: what they do besides training, and their layers


REFUSALS = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text())


def steps_and_rest(world: World) -> dict[str, Any]:
    """Return what a pipeline does besides training, for each schedule."""
    found: dict[str, Any] = {}
    for name in CHUNKS:
        options = {"grad_accum": 4, "eval_tokens": 64}
        trainer = new_trainer(world, {"pp": 2, "schedule": name}, {"n_layers": 4}, options)
        assert isinstance(trainer.pipeline, Pipeline)
        trainer.step()
        phases: list[str] = []
        trainer.phase = phases.append
        trainer.step()
        found[name] = {
            "phases": phases,
            "unequal": unequal_replicas(world, trainer.held_alike()),
            "compared": {holders: list(named) for holders, named in trainer.held_alike().items()},
            "validation": [trainer.validate(tokens_at_a_time=n) for n in (48, 8192)],
            "embedding": trainer.model.state_dict().get("embed.weight"),
            "names": [n for n, _ in trainer.model.named_parameters()],
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
    first, last = (set(found["names"]) for found in ranks)
    assert first | last == {n for n, _ in trainer.model.named_parameters()}
    assert first & last == (set() if name in ("zbv", "dualpipev") else {"embed.weight"})
    if first & last:
        assert torch.equal(*(found["embedding"] for found in ranks))
        compared = {f"{part}embed.weight{key}" for part, key in (("model/", ""), ("optimizer/", "/exp_avg"))}
        assert all(compared <= set(found["compared"][0, 1]) for found in ranks)


# Config and layout


@pytest.mark.parametrize("case", REFUSALS["pipeline"], ids=lambda case: case["said"])
def test_config_refuses_what_a_pipeline_cannot_do(case: dict[str, Any]) -> None:
    config, recipe = ParallelConfig(**case["parallel"]), TrainConfig(batch_size=840, **case["train"])
    model = ModelConfig(**SMALL | MODELS.get(case.get("base"), {}) | case.get("model", {}))
    said = refusal(config.check, model, recipe, config.pp)
    assert case["said"] in said and case.get("fix", "") in said


def test_layers_are_divided_where_the_largest_cost_is_smallest() -> None:
    assert divided([1, 1, 1, 1], 2) == (range(0, 2), range(2, 4))
    assert divided([1, 1, 1, 4], 2) == (range(0, 3), range(3, 4))
    assert divided([5, 1, 1, 1, 1, 1], 3) == (range(0, 1), range(1, 3), range(3, 6))
    assert divided([3, 1], 2) == (range(0, 1), range(1, 2))
    for costs in itertools.product((1, 2, 5), repeat=5):
        for n in range(1, 6):
            got = divided(costs, n)
            cuts = itertools.combinations(range(1, 5), n - 1)
            ways = ([range(a, b) for a, b in itertools.pairwise((0, *cut, 5))] for cut in cuts)
            best = min(max(sum(costs[i] for i in layers) for layers in way) for way in ways)
            assert max(sum(costs[i] for i in layers) for layers in got) == best
            assert [i for layers in got for i in layers] == list(range(5)) and all(map(len, got))


@pytest.mark.parametrize(
    ("schedule", "ranks"), [("1f1b", (0, 1)), ("interleaved1f1b", (0, 1, 0, 1)), ("dualpipev", (0, 1, 1, 0))]
)
def test_stages_are_on_the_ranks_of_their_schedule(schedule: Any, ranks: tuple[int, ...]) -> None:
    model = Transformer(ModelConfig(**{**SMALL, "n_layers": 6}))
    layout = StageLayout.of(model, ParallelConfig(pp=2, schedule=schedule))
    assert layout.ranks == ranks
    assert sum(map(len, layout.layers)) == 6
    assert sorted(layout.rows(0) + layout.rows(1)) == list(range(7))  # 5 layers and 2 of MTP have experts
    assert layout.moe_before(1) == len(layout.layers[0]) - 1
