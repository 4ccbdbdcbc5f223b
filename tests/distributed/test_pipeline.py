"""A pipeline trains as one process does with the same parts, bit for bit where the order of sums is the same."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, TrainConfig, Transformer
from dsmini.config.parallel import CHUNKS, ParallelConfig
from dsmini.distributed import programs
from dsmini.distributed.pipeline import Pipeline, record_timeline
from dsmini.distributed.replicas import unequal_replicas
from dsmini.distributed.stages import StageLayout, divided
from dsmini.distributed.world import World
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import new_run, run, saved
from tests.distributed.test_layouts import FP8, MOVES, assert_alike
from tests.distributed.training import Trained, new_trainer, train
from tests.helpers.tolerances import FP32_MODEL

STEPS = 3
UNCLIPPED: dict[str, Any] = {"grad_clip": 1e6}
"""The norm is summed in another order. Clipping would carry its last bit into every parameter."""
PLAIN: dict[str, Any] = {"n_layers": 4, "n_mtp_layers": 0}
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Changes of the configs of parallel, model and train."""
EXACT: dict[str, Case] = {
    **{name: ({"pp": 2, "schedule": name}, PLAIN, {"grad_accum": 4, **UNCLIPPED}) for name in CHUNKS},
    "1f1b of unequal stages": ({"pp": 2}, {**PLAIN, "n_layers": 5}, {"grad_accum": 2, **UNCLIPPED}),
    "recompute": ({"pp": 2, "schedule": "zbv"}, PLAIN, {"grad_accum": 4, "recompute": True, **UNCLIPPED}),
    "dense": ({"pp": 2}, {**PLAIN, "n_dense_layers": 4}, {"grad_accum": 2, **UNCLIPPED}),
    "FP8": ({"pp": 2, "schedule": "zero_bubble"}, {**PLAIN, **FP8}, {"grad_accum": 2, **UNCLIPPED}),
    "BF16": ({"pp": 2}, PLAIN, {"grad_accum": 2, "dtype": "bfloat16", **UNCLIPPED}),
}
"""Cases without MTP, on 2 ranks."""
EIGHT = {"n_layers": 8, "n_mtp_layers": 1}
ALIKE_2: dict[str, Case] = {
    **{f"MTP, {name}": ({"pp": 2, "schedule": name}, {"n_layers": 4}, {"grad_accum": 4}) for name in CHUNKS},
    "Muon and EMA": ({"pp": 2}, {}, {"grad_accum": 2, "optimizer": "muon", "ema_decay": 0.9}),
    "embed_norm": ({"pp": 2}, {"embed_norm": True}, {"grad_accum": 2, "balance_alpha": 0.1}),
}
ALIKE_4: dict[str, Case] = {
    **{f"4 stages or 8, {name}": ({"pp": 4, "schedule": name}, EIGHT, {"grad_accum": 8}) for name in CHUNKS},
    "PP 2 x EP 2": ({"pp": 2, "ep": 2}, {}, {"grad_accum": 2}),
    "PP 2 x EP 2, dualpipev": ({"pp": 2, "ep": 2, "schedule": "dualpipev"}, {"n_layers": 4}, {"grad_accum": 4}),
    "PP 2 x EP 2, recompute": (
        {"pp": 2, "ep": 2, "schedule": "zero_bubble"},
        {"n_layers": 4},
        {"grad_accum": 4, "recompute": True, "optimizer": "muon"},
    ),
    "PP 2 x DP 2": ({"pp": 2, "dp": 2}, {}, {"grad_accum": 2}),
    "PP 2 x DP 2, zbv": ({"pp": 2, "dp": 2, "schedule": "zbv"}, {"n_layers": 4}, {"grad_accum": 4}),
}


def trained(world: World, cases: list[Case]) -> list[Trained]:
    """Train in several layouts of the same ranks, one after the other."""
    return [train(world, *case, STEPS) for case in cases]


@pytest.fixture(scope="module")
def in_one_process() -> Callable[[Case], Trained]:
    """Return what a case comes to in one process. Cases that differ in the layout have one result."""
    found: dict[str, Trained] = {}

    def run_once(case: Case) -> Trained:
        key = repr(case[1:])
        if key not in found:
            found[key] = train(World(), None, *case[1:], STEPS)
        return found[key]

    return run_once


@pytest.fixture(scope="module")
def exact() -> list[dict[str, Trained]]:
    return [dict(zip(EXACT, of, strict=True)) for of in run_ranks(2, trained, list(EXACT.values()))]


@pytest.fixture(scope="module")
def alike() -> dict[str, list[Trained]]:
    found: dict[str, list[Trained]] = {}
    for n, cases in ((2, ALIKE_2), (4, ALIKE_4)):
        of_ranks = run_ranks(n, trained, list(cases.values()), seconds=120)
        found |= {name: [of[i] for of in of_ranks] for i, name in enumerate(cases)}
    return found


@pytest.mark.parametrize("name", EXACT)
def test_pipeline_equals_parts_bit_for_bit(
    name: str, exact: list[dict[str, Trained]], in_one_process: Callable[[Case], Trained]
) -> None:
    want = in_one_process(EXACT[name])
    for got in (of_rank[name] for of_rank in exact):
        assert got.losses.equal(want.losses)
        assert got.tensors.keys() == want.tensors.keys()
        assert [n for n, w in want.tensors.items() if not torch.equal(got.tensors[n], w)] == []
        for g, w in zip(got.steps, want.steps, strict=True):
            assert (g.counts is None and w.counts is None) or torch.equal(g.counts, w.counts)  # pyright: ignore
            assert g.grad_norm == pytest.approx(w.grad_norm, rel=1e-6)


@pytest.mark.parametrize("name", [*ALIKE_2, *ALIKE_4])
def test_pipeline_is_alike_one_process(
    name: str, alike: dict[str, list[Trained]], in_one_process: Callable[[Case], Trained]
) -> None:
    results = alike[name]
    assert_alike(results[0], in_one_process((ALIKE_2 | ALIKE_4)[name]))
    assert all(result.losses.equal(results[0].losses) for result in results)


def timeline_and_rest(world: World) -> dict[str, Any]:
    """Return what else a pipeline does, for each schedule."""
    found: dict[str, Any] = {}
    for name in CHUNKS:
        model = {"n_layers": 4}
        trainer = new_trainer(ParallelConfig(pp=2, schedule=name), model, {"grad_accum": 4, "eval_tokens": 64}, world)
        passes = trainer.passes
        assert isinstance(passes, Pipeline)
        trainer.step()
        phases: list[str] = []
        trainer.phase = phases.append
        with record_timeline(passes.schedule(2, 16, 4)) as rows:
            trainer.step()
        found[name] = {
            "rows": rows,
            "phases": phases,
            "unequal": unequal_replicas(world, trainer.replicas()),
            "compared": {holders.holders: list(holders.named) for holders in trainer.replicas()},
            "validation": [trainer.validate(tokens_at_a_time=n) for n in (48, 8192)],
            "embedding": trainer.model.state_dict().get("embed.weight"),
            "names": [n for n, _ in trainer.model.named_parameters()],
        }
    return found


@pytest.fixture(scope="module")
def rest() -> list[dict[str, Any]]:
    return run_ranks(2, timeline_and_rest)


@pytest.mark.parametrize("name", CHUNKS)
def test_recorded_order_is_the_program(name: str, rest: list[dict[str, Any]]) -> None:
    for rank, program in enumerate(programs.programs(name, 2, 4)):
        rows = rest[rank][name]["rows"]
        assert [row[1:4] for row in rows] == [(a.kind, a.stage, a.microbatch) for a in program]
        assert all(row[0] == rank for row in rows)
        phases = rest[rank][name]["phases"]
        assert {"forward", "backward"} <= set(phases)
        times = [time for row in rows for time in row[4:]]
        assert times == sorted(times)


@pytest.mark.parametrize("name", CHUNKS)
def test_validation_is_that_of_one_process(name: str, rest: list[dict[str, Any]]) -> None:
    trainer = new_trainer(ParallelConfig(), {"n_layers": 4}, {"grad_accum": 4}, World())
    for _ in range(2):
        trainer.step()
    want = trainer.validate()
    for of_rank in rest:
        assert of_rank[name]["validation"] == pytest.approx([want, want], rel=1e-6)


@pytest.mark.parametrize("name", CHUNKS)
def test_each_parameter_is_on_one_rank_but_the_embedding(name: str, rest: list[dict[str, Any]]) -> None:
    names = [of_rank[name]["names"] for of_rank in rest]
    whole = [n for n, _ in Transformer(ModelConfig(**{**SMALL, "n_layers": 4})).named_parameters()]
    assert set(itertools.chain(*names)) == set(whole)
    twice = set(names[0]) & set(names[1])
    if name in ("zbv", "dualpipev"):
        assert twice == set()
    else:
        assert twice == {"embed.weight"}
        first, last = (of_rank[name]["embedding"] for of_rank in rest)
        assert torch.equal(first, last)
        compared = [f"{part}embed.weight{key}" for part, key in (("model/", ""), ("optimizer/", "/exp_avg"))]
        for of_rank in rest:
            assert of_rank[name]["unequal"] is None
            assert set(compared) <= set(of_rank[name]["compared"][0, 1])


def test_programs_have_the_same_stages_as_the_config() -> None:
    assert {name: programs.CHUNKS[name] for name in CHUNKS} == dict(CHUNKS)


# Checkpoints


def resumed(world: World, folder: Path, parallel: dict[str, Any], until: int, changes: dict[str, Any]) -> None:
    run(world, folder, parallel, until, **changes)


def manifest_of_rewritten(world: World, folder: Path, parallel: dict[str, Any], changes: dict[str, Any]) -> str:
    training = new_run(world, folder, parallel, **changes)
    place = folder / "checkpoints" / "step-000005"
    training.saver.config = training.saver.config.__class__.from_run(place / "config.toml")
    training.saver.saved_at = None
    training.saver.save()
    return world.first(lambda: (place / "manifest.json").read_text())


def test_checkpoint_has_the_bytes_of_one_process(tmp_path: Path) -> None:
    changes = {"grad_accum": 2}
    resumed(World(), tmp_path / "one", {}, 5, changes)
    want = (tmp_path / "one" / "checkpoints" / "step-000005" / "manifest.json").read_text()
    assert run_ranks(2, manifest_of_rewritten, tmp_path / "one", {"pp": 2}, changes)[0] == want


def test_one_process_continues_a_pipeline_and_the_other_way_round(tmp_path: Path) -> None:
    changes = {"grad_accum": 2}
    resumed(World(), tmp_path / "whole", {}, 8, changes)
    want = saved(tmp_path / "whole", 8)
    for name in ("to one", "from one"):
        folder = tmp_path / name
        for until, pipeline in ((5, name == "to one"), (8, name == "from one")):
            if pipeline:
                run_ranks(2, resumed, folder, {"pp": 2}, until, changes)
            else:
                resumed(World(), folder, {}, until, changes)
        got = saved(folder, 8)
        assert got.keys() == want.keys()
        for key, w in want.items():
            allowed = FP32_MODEL * 8 * max(w.double().abs().max().item(), MOVES)
            assert (got[key].double() - w.double()).abs().max().item() <= allowed, key


def checks(world: World, edits: dict[str, Any]) -> list[str]:
    """Return what each rank says of a whole run's tensors after each edit."""
    trainer = new_trainer(ParallelConfig(pp=2), {}, {"grad_accum": 2, "ema_decay": 0.9}, world)
    whole = new_trainer(ParallelConfig(), {}, {"grad_accum": 2, "ema_decay": 0.9}, World())
    whole.step()
    said: list[str] = []
    for part, name, tensor in edits:
        tensors = {of: dict(named) for of, named in whole.tensors().items()}
        if tensor is None:
            tensors[part].pop(name, None)
        else:
            tensors[part][name] = tensor
        try:
            world.together(lambda tensors=tensors: trainer.check(trainer.mine(tensors)))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_checkpoint_with_a_missing_or_unknown_tensor_is_refused() -> None:
    edits: list[tuple[str, str, Tensor | None]] = [
        ("model", "nothing", None),
        ("model", "layers.0.attn_norm.weight", None),
        ("model", "head.weight", None),
        ("model", "layers.7.attn_norm.weight", torch.zeros(24)),
        ("optimizer", "layers.1.attn_norm.weight/speed", torch.zeros(24)),
        ("optimizer", "layers.0.attn_norm.weight/exp_avg", torch.zeros(23)),
        ("average", "norm.weight", None),
    ]
    for said in run_ranks(2, checks, edits):
        assert said[0] == ""
        assert "layers.0.attn_norm.weight" in said[1] and "rank 0" in said[1]
        assert "head.weight" in said[2] and "rank 1" in said[2]
        assert "layers.7.attn_norm.weight" in said[3]
        assert "layers.1.attn_norm.weight/speed" in said[4]
        assert "layers.0.attn_norm.weight/exp_avg" in said[5]
        assert "norm.weight" in said[6]


# Config and layout


@pytest.mark.parametrize(
    ("parallel", "train", "said"),
    [
        (
            {"pp": 3},
            {"grad_accum": 4},
            "parallel.pp=3 with parallel.schedule=1f1b has 3 stages, more than model.n_layers=2",
        ),
        ({"pp": 2, "schedule": "zbv"}, {"grad_accum": 4}, "schedule=zbv has 4 stages, more than model.n_layers=2"),
        ({"pp": 2}, {"grad_accum": 1}, "train.grad_accum=1 is too small for parallel.schedule=1f1b with parallel.pp=2"),
        ({"pp": 2, "zero": 1}, {"grad_accum": 2}, "parallel.zero=1 does not go with a pipeline"),
    ],
    ids=str,
)
def test_config_refuses_what_a_pipeline_cannot_do(parallel: dict[str, Any], train: dict[str, Any], said: str) -> None:
    config = ParallelConfig(**parallel)
    with pytest.raises(ValueError, match=said):
        config.check(ModelConfig(**SMALL), TrainConfig(batch_size=8, **train), config.pp)


@pytest.mark.parametrize(
    ("schedule", "parts", "said"),
    [
        ("dualpipev", 3, "train.grad_accum=3 is too small for parallel.schedule=dualpipev with parallel.pp=2; use 4"),
        ("interleaved1f1b", 5, "train.grad_accum=5 does not go with .* 2 equal rounds for parallel.pp=2; use 4"),
        ("zero_bubble", 7, "train.grad_accum=7 does not go with .* 3 equal rounds for parallel.pp=2; use 6"),
    ],
)
def test_config_refuses_parts_that_a_schedule_does_not_take(schedule: Any, parts: int, said: str) -> None:
    config, model = ParallelConfig(pp=2, schedule=schedule), ModelConfig(**{**SMALL, "n_layers": 4})
    with pytest.raises(ValueError, match=said):
        config.check(model, TrainConfig(batch_size=parts, grad_accum=parts), 2)


def test_config_refuses_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match=r"gpipe.*dualpipev"):
        ParallelConfig(schedule="gpipe")  # pyright: ignore


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
