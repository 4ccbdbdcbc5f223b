"""The stages of a pipeline: their validation and layers. test_layouts.py compares what they train."""

import itertools
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, TrainConfig, Transformer
from dsmini.config.run import CHUNKS, ParallelConfig, ScheduleName
from dsmini.distributed.mesh import unequal_replicas
from dsmini.distributed.pipeline import Pipeline, StageLayout, divided
from dsmini.distributed.world import World
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import new_trainer


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
def test_stages_tell_their_phases(name: ScheduleName, rest: list[dict[str, Any]]) -> None:
    assert all({"forward", "backward"} <= set(of_rank[name]["phases"]) for of_rank in rest)


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
