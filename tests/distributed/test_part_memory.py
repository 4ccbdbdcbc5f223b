"""The memory that a rank takes at least, and what is said of a run that does not fit."""

import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from dsmini import ModelConfig, RunConfig
from dsmini import machine as memory
from dsmini.config.run import ParallelConfig
from dsmini.distributed.mesh import Mesh, ModelPart, local
from dsmini.distributed.world import World
from dsmini.training.outputs import write_sample
from dsmini.training.start import least_bytes, refuse_oversized
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import CPU, TRAIN, new_run, new_trainer


def least_and_held(world: World, parallel: dict[str, Any]) -> tuple[int, int]:
    trainer = new_trainer(world, parallel, {"n_layers": 4}, {"grad_accum": 4})
    part = ModelPart.divided(trainer.config.model, Mesh(trainer.config.parallel, CPU))
    return least_bytes(trainer.config, part), sum(local(p).nbytes for p in trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"ep": 2}, {"pp": 2}, {"zero": 3}, {"ep": 2, "zero": 1}], ids=str)
def test_rank_holds_its_parameters_and_gradients(parallel: dict[str, Any]) -> None:
    assert all(least == 2 * held for least, held in run_ranks(2, least_and_held, parallel))


def refusal(world: World, missing: int) -> str:
    """Return what is said of a run for which this machine has a byte less than both ranks need, or more."""
    config = RunConfig(model=ModelConfig(**SMALL), train=TRAIN, parallel=ParallelConfig(ep=2))
    part = ModelPart.divided(config.model, Mesh(config.parallel, CPU))
    both = sum(world.gather(least_bytes(config, part)))
    with mock.patch.object(memory, "free_bytes", return_value=both - missing):
        try:
            refuse_oversized(config, CPU, part, world)
        except ValueError as error:
            return str(error).replace(f"{both:,}", "BOTH")
    return ""


@pytest.mark.slow
def test_ranks_of_a_machine_share_its_memory() -> None:
    assert run_ranks(2, refusal, 0) == ["", ""]
    for said in run_ranks(2, refusal, 1):
        assert said.startswith("training this model with such a batch needs BOTH bytes of memory, and this machine has")


def samples(world: World, folder: Path) -> tuple[str, str, str]:
    """Return samples of a trained model where it fits into one process, and where not, and what is said then."""
    training = new_run(world, folder, {"ep": 2}, sample_tokens=5, steps=2)
    training.train()
    if world.rank:
        return "", "", ""
    training.console = Console(file=io.StringIO(), width=500)
    good = write_sample(training)
    training.console = Console(file=io.StringIO(), width=500)
    with mock.patch.object(memory, "free_bytes", return_value=7):
        return good, write_sample(training), training.console.file.getvalue()


@pytest.mark.slow
def test_sample_is_left_out_where_the_model_does_not_fit(tmp_path: Path) -> None:
    good, none, said = run_ranks(2, samples, tmp_path / "run")[0]
    assert len(good) > len(RunConfig().train.sample_prompt) and none == ""
    assert said.startswith("no sample: the model of ") and len(said.splitlines()) == 1
