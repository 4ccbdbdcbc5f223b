"""Each rank makes its part of a model with the bits of one process, and never holds more than that and one tensor."""

import io
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from dsmini import ModelConfig, RunConfig, Transformer, load_pretrained
from dsmini import machine as memory
from dsmini.checkpoint.load import PretrainedTensors
from dsmini.checkpoint.tensor_files import SafetensorsReader
from dsmini.config.run import ParallelConfig
from dsmini.distributed.mesh import Mesh, divided_model, fill, local
from dsmini.distributed.world import World
from dsmini.training.outputs import write_sample
from dsmini.training.start import refuse_oversized_parts
from tests.conftest import SMALL, randomise
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import CPU, exactly, far_apart, held_pieces, new_run, new_trainer
from tests.helpers import folders
from tests.helpers.strategies import model_configs

LARGE: dict[str, Any] = {"dim": 64, "n_layers": 4, "vocab_size": 400, "moe_inter_dim": 64}
SLACK = 20_000
"""Bytes besides the tensors of the model: index tables, and messages between the ranks."""
LAYOUTS = [{"ep": 2}, {"pp": 2}, {"pp": 2, "schedule": "zbv"}, {"zero": 3}, {"ep": 2, "zero": 3}]
SLOW_BUT_ONE = [LAYOUTS[-1], *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS[:-1])]


def made(world: World, parallel: dict[str, Any]) -> tuple[int, int, dict[str, Any], torch.Tensor]:
    """Return the most bytes that were allocated at once while a rank made its trainer, those of its part of the model,
    the pieces that it drew, and the state of its generator then."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        trainer = new_trainer(world, parallel, LARGE, {"grad_accum": 4})
    assert watched.profiler is not None
    results: Any = watched.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(nbytes for _, nbytes in sorted(changes)))
    own = sum(tensor.nbytes for tensor in trainer.tensors()["model"].values())
    return max(held), own, held_pieces(trainer), torch.get_rng_state()


@pytest.mark.parametrize("parallel", SLOW_BUT_ONE, ids=str)
def test_drawn_parts_are_those_of_one_process_and_take_their_memory_alone(parallel: dict[str, Any]) -> None:
    """A rank never holds more than its part and a tensor."""
    _, _, pieces, state = made(World(), {})
    whole = {name: tensor for name, (_, tensor) in pieces.items()}
    sizes = [tensor.nbytes for name, tensor in whole.items() if name.startswith("model/")]
    every = run_ranks(2, made, parallel)
    for peak, own, _, of_rank in every:
        assert own < 0.8 * sum(sizes) and own <= peak < own + max(sizes) + SLACK < sum(sizes)
        assert torch.equal(of_rank, state)
    assert far_apart([held for _, _, held, _ in every], whole, exactly) == []


@settings(max_examples=20)
@given(model_configs())
@example(ModelConfig(**SMALL | {"precision": "fp8", "dim": 23}))
def test_one_process_fills_what_a_constructor_draws(config: ModelConfig) -> None:
    torch.manual_seed(1)
    model = divided_model(config, mesh := Mesh())
    fill(model, mesh, CPU)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    want = Transformer(config).state_dict()
    assert model.state_dict().keys() == want.keys() and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def fp8_folder(place: Path) -> Path:
    """Write the folder of a random model with experts in the last layers and in the MTP block."""
    sizes = {"n_layers": 3, "dim": 136, "inter_dim": 200, "moe_inter_dim": 130, "n_mtp_layers": 1}
    torch.manual_seed(3)
    model = randomise(Transformer(ModelConfig(**SMALL | sizes)))
    tensors = folders.in_fp8(folders.tensors_of(model, torch.float32))[0]
    config = folders.config_json(model.config, quantization_config=folders.QUANTIZED)
    return folders.write(place, tensors, config, shards=3)


def filled_from(world: World, folder: Path, parallel: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the pieces of a folder's model that a rank holds, and the names of the tensors that it read."""
    there = PretrainedTensors(folder)
    mesh = Mesh(ParallelConfig(**parallel), CPU)
    model = divided_model(there.config, mesh)
    real = SafetensorsReader.read
    with mock.patch.object(SafetensorsReader, "read", autospec=True, side_effect=real) as read:
        fill(model, mesh, CPU, there.rows)
    held = [*model.named_parameters(), *model.named_buffers()]
    pieces = {name: (mesh.piece(t), local(t).detach().clone()) for name, t in held}
    return pieces, [call.args[1] for call in read.call_args_list]


@pytest.mark.parametrize("parallel", [SLOW_BUT_ONE[0], *SLOW_BUT_ONE[1:3]], ids=str)
def test_rank_reads_its_rows_of_a_folder_alone(tmp_path: Path, parallel: dict[str, Any]) -> None:
    folder = fp8_folder(tmp_path / "model")
    want = load_pretrained(folder, torch.float32).state_dict()
    every = run_ranks(2, filled_from, folder, parallel)
    for held, names in every:
        assert all(torch.equal(piece.of(want[name]), tensor) for name, (piece, tensor) in held.items())
        assert len(names) == len(set(names))
    experts = [{name for name in names if ".experts." in name} for _, names in every]
    assert experts[0] and experts[1] and not experts[0] & experts[1]


def divided_after_a_part(world: World, zero: int) -> bool:
    """Return whether the gradients of the first part of a batch are divided before the second is computed."""
    trainer, phases = new_trainer(world, {"zero": zero}, {}, {"grad_accum": 2}), dict[str, bool]()
    trainer.phase = lambda name: phases.update({name: any(p.grad is not None for p in trainer.named.values())})
    trainer.step()
    return phases["forward"]


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_are_divided_after_each_part_from_zero_2_on(zero: int) -> None:
    assert run_ranks(2, divided_after_a_part, zero) == [zero == 2] * 2


# --- a model that does not fit


def told_of_memory(world: World, parallel: dict[str, Any], missing: int) -> str:
    """Return what is said where a machine lacks some bytes of the parameters and gradients of both ranks."""
    config = RunConfig(model=ModelConfig(**SMALL | {"n_layers": 4}), parallel=ParallelConfig(**parallel))
    model = divided_model(config.model, Mesh(config.parallel, CPU))
    both = sum(world.gather(2 * sum(local(p).nbytes for p in model.parameters())))
    with mock.patch.object(memory, "free_bytes", return_value=both - missing):
        try:
            refuse_oversized_parts(model, CPU, world)
        except ValueError as error:
            return str(error).replace(f"{both:,}", "BOTH")
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"pp": 2}, {"ep": 2, "zero": 1}], ids=str)
def test_ranks_of_a_machine_share_its_memory(parallel: dict[str, Any]) -> None:
    assert run_ranks(2, told_of_memory, parallel, 0) == ["", ""]
    for said in run_ranks(2, told_of_memory, parallel, 1):
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
