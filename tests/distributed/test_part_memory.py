"""The memory that a rank's part of a run is judged by before it is made, and what is said of one that does not fit."""

import dataclasses
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from dsmini import ModelConfig, RunConfig, accounting
from dsmini.checkpoint import memory
from dsmini.config.parallel import ParallelConfig
from dsmini.distributed.drawing import ModelPart
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.world import World
from dsmini.training.part_memory import part_bytes, refuse_oversized
from dsmini.training.summary import write_sample
from tests.conftest import SMALL
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import CPU, TRAIN, new_run, new_trainer

MODELS: list[dict[str, Any]] = [{}, {"n_mtp_layers": 0, "n_dense_layers": 2}, {"precision": "fp8", "n_dense_layers": 4}]
TRAINS: list[dict[str, Any]] = [{"moments": "bfloat16", "grad_accum": 2}, {"optimizer": "muon", "dtype": "bfloat16"}]


@pytest.mark.parametrize("train", TRAINS, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_one_process_holds_what_is_counted_from_its_config(model: dict[str, Any], train: dict[str, Any]) -> None:
    config = RunConfig(model=ModelConfig(**SMALL | model), train=dataclasses.replace(TRAIN, **train))
    t = config.train
    want = accounting.training_bytes(
        config.model,
        **{"batch_size": t.batch_size // t.grad_accum, "seq_len": config.seq_len, "recompute": t.recompute},
        **{"dtype": t.dtype, "optimizer": t.optimizer, "moments": t.moments},
    )
    assert part_bytes(config, ModelPart.divided(config.model, Mesh())) == want


def counted_and_held(world: World, parallel: dict[str, Any], train: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    trainer = new_trainer(world, parallel, {"n_layers": 4}, train)
    config = trainer.config
    part = ModelPart.divided(config.model, Mesh(config.parallel, CPU))
    trainer.step()
    held = {name: sum(t.nbytes for t in of.values()) for name, of in trainer.tensors().items()}
    return part_bytes(config, part).by_part, held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "train"),
    [
        ({"ep": 2}, {"optimizer": "muon", "dtype": "bfloat16"}),
        ({"pp": 2}, {"grad_accum": 4, "moments": "bfloat16"}),
        ({"pp": 2, "schedule": "zbv"}, {"grad_accum": 4, "optimizer": "muon"}),
        ({"zero": 3}, {"optimizer": "muon"}),
        ({"ep": 2, "zero": 1}, {}),
    ],
    ids=str,
)
def test_rank_holds_what_is_counted_for_it(parallel: dict[str, Any], train: dict[str, Any]) -> None:
    every = run_ranks(2, counted_and_held, parallel, train)
    for counted, held in every:
        assert (counted["parameters"], counted["optimizer"]) == (held["model"], held["optimizer"])
    config = ModelConfig(**SMALL | {"n_layers": 4})
    rows = TRAIN.batch_size // train.get("grad_accum", 1) // (1 if "pp" in parallel else 2)
    dtype = train.get("dtype", "float32")
    whole = accounting.activation_bytes(config, batch_size=rows, seq_len=TRAIN.seq_len, dtype=dtype).total
    total = sum(counted["activations"] for counted, _ in every)
    if "pp" in parallel:  # what lies before and after the blocks is counted for both
        assert whole < total < 1.05 * whole
    else:
        assert total == 2 * whole
    if dtype == "bfloat16":
        copies = accounting.saved_weight_bytes(config).by_part
        divided = sum(nbytes for name, nbytes in copies.items() if name.endswith("routed experts"))
        kept = sum(counted["weights kept for backward"] for counted, _ in every)
        assert divided and kept == 2 * sum(copies.values()) - divided


def refusal(world: World, missing: int) -> str:
    """Return what is said of a run for which this machine has a byte less than both ranks need, or more."""
    config = RunConfig(model=ModelConfig(**SMALL), train=TRAIN, parallel=ParallelConfig(ep=2))
    part = ModelPart.divided(config.model, Mesh(config.parallel, CPU))
    both = sum(world.gather(int(part_bytes(config, part).total)))
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
