"""The stages of a pipeline: their validation and layers. test_layouts.py compares what they train."""

import itertools
import tomllib
from pathlib import Path
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
from tests.helpers.configs import refusal

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
    model = ModelConfig(**SMALL | {"n_layers": case.get("n_layers", 2)})
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
