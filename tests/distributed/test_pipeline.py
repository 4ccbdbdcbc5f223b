"""A pipeline trains as one process does with the same parts, bit for bit where the order of sums is the same."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.questions.pipeline import record_timeline
from dsmini import ModelConfig, TrainConfig, Transformer
from dsmini.config.run import CHUNKS, ParallelConfig, ScheduleName
from dsmini.distributed.mesh import unequal_replicas
from dsmini.distributed.pipeline import Pipeline, StageLayout, divided
from dsmini.distributed.world import World
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import (
    Trained,
    assert_near,
    exactly,
    far_apart,
    manifest_of_rewritten,
    new_trainer,
    run,
    train,
)
from tests.distributed.test_layouts import FP8, assert_alike

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
ALIKE: dict[str, Case] = {
    **{f"MTP, {name}": ({"pp": 2, "schedule": name}, {"n_layers": 4}, {"grad_accum": 4}) for name in CHUNKS},
    "Muon and EMA": ({"pp": 2}, {}, {"grad_accum": 2, "optimizer": "muon", "ema_decay": 0.9}),
    "embed_norm": ({"pp": 2}, {"embed_norm": True}, {"grad_accum": 2, "balance_alpha": 0.1}),
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


@pytest.mark.parametrize("name", ["1f1b", *(pytest.param(n, marks=pytest.mark.slow) for n in EXACT if n != "1f1b")])
def test_pipeline_equals_parts_bit_for_bit(name: str, in_one_process: Callable[[Case], Trained]) -> None:
    want = in_one_process(EXACT[name])
    ranks = run_ranks(2, train, *EXACT[name], STEPS)
    assert far_apart([got.pieces for got in ranks], want.tensors, exactly) == []
    for got in ranks:
        assert got.losses.equal(want.losses)
        for g, w in zip(got.steps, want.steps, strict=True):
            assert (g.counts is None and w.counts is None) or torch.equal(g.counts, w.counts)  # pyright: ignore
            assert g.grad_norm == pytest.approx(w.grad_norm, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_pipeline_is_alike_one_process(name: str, in_one_process: Callable[[Case], Trained]) -> None:
    parallel = ALIKE[name][0]
    n = parallel["pp"] * parallel.get("ep", 1) * parallel.get("dp", 1)
    assert_alike(run_ranks(n, train, *ALIKE[name], STEPS), in_one_process(ALIKE[name]))


def timeline_and_rest(world: World) -> dict[str, Any]:
    """Return what else a pipeline does, for each schedule."""
    found: dict[str, Any] = {}
    for name in CHUNKS:
        options = {"grad_accum": 4, "eval_tokens": 64}
        trainer = new_trainer(world, {"pp": 2, "schedule": name}, {"n_layers": 4}, options)
        passes = trainer.pipeline
        assert isinstance(passes, Pipeline)
        trainer.step()
        phases: list[str] = []
        trainer.phase = phases.append
        with record_timeline(passes.schedule(2, 16, 4)) as rows:
            trainer.step()
        found[name] = {
            "rows": rows,
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
    return run_ranks(2, timeline_and_rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHUNKS)
def test_each_stage_sees_every_part_once_and_in_order(name: ScheduleName, rest: list[dict[str, Any]]) -> None:
    """Check the order of torch's schedule, with the stages that each rank has."""
    rows = [row for of_rank in rest for row in of_rank[name]["rows"]]
    done = Counter(
        (kind, row.stage, row.microbatch) for row in rows for kind in ("IW" if row.kind == "B" else row.kind)
    )
    assert done == Counter((kind, s, m) for kind in "FIW" for s in range(2 * CHUNKS[name]) for m in range(4))
    ends = {(row.kind.replace("B", "I"), row.stage, row.microbatch): row.end for row in rows}
    for row in rows:
        before = {"F": ("F", row.stage - 1), "W": ("I", row.stage)}.get(row.kind, ("F", row.stage))
        assert row.start >= ends.get((*before, row.microbatch), 0.0)
    kinds = {"1f1b": "FB", "interleaved1f1b": "FB", "zero_bubble": "FIW", "zbv": "FIW", "dualpipev": "FBIW"}
    assert {row.kind for row in rows} == set(kinds[name])
    if name == "1f1b":
        first = [f"{row.kind}{row.microbatch}" for row in rest[0][name]["rows"]]
        assert first == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"], "two in flight, not all"
    for rank, of_rank in enumerate(rest):
        assert all(row.rank == rank for row in of_rank[name]["rows"])
        assert {"forward", "backward"} <= set(of_rank[name]["phases"])
        times = [time for row in of_rank[name]["rows"] for time in (row.start, row.end)]
        assert times == sorted(times)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHUNKS)
def test_validation_is_that_of_one_process(name: str, rest: list[dict[str, Any]]) -> None:
    trainer = new_trainer(World(), {}, {"n_layers": 4}, {"grad_accum": 4})
    for _ in range(2):
        trainer.step()
    want = trainer.validate()
    for of_rank in rest:
        assert of_rank[name]["validation"] == pytest.approx([want, want], rel=1e-6)


@pytest.mark.slow
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
            assert of_rank[name]["unequal"] == ([], "")
            assert set(compared) <= set(of_rank[name]["compared"][0, 1])


# Checkpoints


@pytest.mark.slow
def test_checkpoint_has_the_bytes_of_one_process(tmp_path: Path) -> None:
    run(World(), tmp_path / "one", until=5, grad_accum=2)
    want = (tmp_path / "one" / "checkpoints" / "step-000005" / "manifest.json").read_text()
    assert run_ranks(2, manifest_of_rewritten, tmp_path / "one", {"pp": 2}, 5, grad_accum=2)[0] == want


@pytest.mark.slow
def test_one_process_continues_a_pipeline_and_the_other_way_round(tmp_path: Path) -> None:
    run(World(), tmp_path / "whole", grad_accum=2)
    for name, pipeline_until in (("to one", 5), ("from one", 0)):
        for until in (5, 0):
            if until == pipeline_until:
                run_ranks(2, run, tmp_path / name, {"pp": 2}, until=until, grad_accum=2)
            else:
                run(World(), tmp_path / name, until=until, grad_accum=2)
        assert_near(tmp_path / name, tmp_path / "whole")


# Config and layout


@pytest.mark.parametrize(
    ("parallel", "train", "n_layers", "said"),
    [
        ({"pp": 3}, {"grad_accum": 4}, 2, "parallel.pp=3 with parallel.schedule=1f1b has 3 stages, more than .*=2"),
        ({"pp": 2, "schedule": "zbv"}, {"grad_accum": 4}, 2, "schedule=zbv has 4 stages, more than model.n_layers=2"),
        (
            {"pp": 2},
            {"grad_accum": 1},
            2,
            "train.grad_accum=1 is too small for parallel.schedule=1f1b with parallel.pp=2",
        ),
        ({"pp": 2, "zero": 1}, {"grad_accum": 2}, 2, "parallel.zero=1 does not go with a pipeline"),
        ({"pp": 2, "schedule": "dualpipev"}, {"grad_accum": 3}, 4, "grad_accum=3 is too small .*dualpipev.* use 4"),
        ({"pp": 2, "schedule": "interleaved1f1b"}, {"grad_accum": 5}, 4, "=5 does not go .* 2 equal rounds .* use 4"),
        ({"pp": 2, "schedule": "zero_bubble"}, {"grad_accum": 7}, 4, "=7 does not go .* 3 equal rounds .* use 6"),
    ],
    ids=str,
)
def test_config_refuses_what_a_pipeline_cannot_do(
    parallel: dict[str, Any], train: dict[str, Any], n_layers: int, said: str
) -> None:
    config, recipe = ParallelConfig(**parallel), TrainConfig(batch_size=840, **train)
    with pytest.raises(ValueError, match=said):
        config.check(ModelConfig(**{**SMALL, "n_layers": n_layers}), recipe, config.pp)


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
