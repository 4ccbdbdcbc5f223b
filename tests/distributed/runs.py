"""Training steps and whole runs in any layout of ranks: with faults, stopped, started again, and compared."""

import dataclasses
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.checkpoint.training_state import checkpoint_folders
from dsmini.config import DataConfig
from dsmini.config.run import ParallelConfig
from dsmini.data.corpus import Corpus
from dsmini.distributed.heartbeat import watched
from dsmini.distributed.mesh import HeldRows, Mesh, divided_model, fill
from dsmini.distributed.world import World
from dsmini.training.record import Event, read_events
from dsmini.training.run import TrainingRun, newest_checkpoint
from dsmini.training.trainer import StepResult, Trainer
from tests.conftest import MODELS, SMALL
from tests.distributed.faults import Fault, inject
from tests.distributed.ranks import Outcome
from tests.helpers.runs import asked_after, saved, untimed
from tests.helpers.tolerances import FP32_MODEL

CPU = torch.device("cpu")
TRAIN = TrainConfig(gate_lr=None, **MODELS["train_ranks"])
"""Halley's iteration magnifies the order of sums more than the bounds of layouts allow."""
RECIPE = MODELS["train_ranks_whole"]
"""The train config of whole runs."""
STEPS: int = RECIPE["steps"]
MOVES = 2.0 * TRAIN.lr
"""Most that AdamW moves an element in a step: lr times at most 2 in the first steps."""
KILLED = -signal.SIGKILL


# --- steps


class Trained(NamedTuple):
    """The state of a rank after some steps."""

    steps: list[StepResult]
    pieces: dict[str, tuple[HeldRows, Tensor]]
    """All tensors that this rank holds: model, optimizer and average."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, (_, tensor) in self.pieces.items()}

    @property
    def losses(self) -> Tensor:
        """[steps, 3]: main, MTP and balance loss."""
        return torch.tensor([[s.loss, s.mtp_loss, s.balance_loss] for s in self.steps], dtype=torch.float64)


def new_trainer(
    world: World, parallel: dict[str, Any], model: dict[str, Any], train: dict[str, Any], out: Path | None = None
) -> Trainer:
    recipe = dataclasses.replace(TRAIN, **train)
    config = RunConfig(model=ModelConfig(**(SMALL | model)), train=recipe, parallel=ParallelConfig(**parallel), out=out)
    config.parallel.check(config.model, config.train, world.size)
    text = np.frombuffer(bytes(7 * i * i % 61 for i in range(3000)), np.uint8)
    corpus = Corpus(train=text[:2700], val=text[2700:], source="", files=1, split="", sha256="")
    torch.manual_seed(config.train.seed)
    dtype = getattr(torch, config.train.dtype)
    if world.size == 1:
        return Trainer(Transformer(config.model, compute_dtype=dtype), corpus, config, CPU)
    mesh = Mesh(config.parallel, CPU)
    divided = divided_model(config.model, mesh)
    divided.compute_dtype = dtype
    fill(divided, mesh, CPU)
    return Trainer(divided, corpus, config, CPU, mesh)


def train(
    world: World,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    steps: int = 5,
) -> Trained:
    """Take steps in a layout."""
    trainer = new_trainer(world, parallel or {}, model or {}, train or {})
    return Trained([trainer.step() for _ in range(steps)], held_pieces(trainer))


def held_pieces(trainer: Trainer) -> dict[str, tuple[HeldRows, Tensor]]:
    """Return copies of all tensors that a rank holds, with their places in the whole."""
    pieces = trainer.pieces(trainer.tensors())
    return {f"{part}/{n}": (piece, t.detach().clone()) for part, of in pieces.items() for n, (piece, t) in of.items()}


def far_apart(
    ranks: Sequence[dict[str, tuple[HeldRows, Tensor]]], want: dict[str, Tensor], allowed: Callable[[Tensor], float]
) -> list[str]:
    """Return the tensors of which a rank holds other values than one process, or of which no rank holds a row.

    Args:
        allowed: the largest difference for a tensor of one process; 0 compares bits.
    """
    found = [name for of in ranks for name in of.keys() - want.keys()]
    for name, whole in want.items():
        held = [of[name] for of in ranks if name in of]
        rows = {row for piece, _ in held for row in range(piece.first, piece.first + piece.rows)}
        good = rows == set(range(len(whole) if whole.dim() else 1))
        for piece, got in held:
            same = piece.shape == whole.shape and got.dtype == whole.dtype
            good &= same and _near(got.view(piece.of(whole).shape), piece.of(whole), allowed(whole))
        found += [] if good else [name]
    return found


def _near(got: Tensor, want: Tensor, allowed: float) -> bool:
    return torch.equal(got, want) or (allowed > 0 and (got.double() - want.double()).abs().max().item() <= allowed)


def exactly(_: Tensor) -> float:
    return 0.0


def up_to_sums(steps: int) -> Callable[[Tensor], float]:
    """Return what other orders of sums may change in some steps, relative to a tensor or to a move of AdamW."""
    return lambda whole: FP32_MODEL * steps * max(whole.double().abs().max().item(), MOVES)


# --- runs


def new_run(
    world: World,
    folder: Path,
    parallel: dict[str, Any] | None = None,
    faults: Sequence[Fault] = (),
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainingRun:
    """Make a run in a folder, and restore it if it has a checkpoint; faults that have come do not come again."""
    trainer = new_trainer(world, parallel or {}, model or {}, RECIPE | changes, folder)
    folder.mkdir(exist_ok=True)
    if world.rank == 0:
        (folder / "config.toml").write_text(trainer.config.to_toml())
    said = Console(file=(folder / f"said-{world.rank}").open("a"), width=1000)
    training = TrainingRun(trainer.config, trainer, said, world)
    if world.first(lambda: bool(checkpoint_folders(folder))):
        training.resume(newest_checkpoint(trainer.config, world, str))
    inject(training, faults)
    return training


def run(
    world: World,
    folder: Path,
    parallel: dict[str, Any] | None = None,
    faults: Sequence[Fault] = (),
    until: int = 0,
    **changes: Any,
) -> bool:
    """Train; return whether the run came to its end, before a signal came to the last rank in step `until`."""
    training = new_run(world, folder, parallel, faults, **changes)
    if world.rank == world.size - 1:
        asked_after(training, until - 1)
    with watched(world, training.config.parallel.timeout, CPU):
        return training.train()


def statuses(ends: Sequence[Outcome]) -> list[int | None]:
    return [end.status for end in ends]


# --- what runs leave


def events(folder: Path, name: str, rank: int = 0) -> list[Event]:
    """Return the events of one name."""
    return [event for event in read_events(folder, rank) if event["event"] == name]


def assert_near(got: Path, want: Path) -> None:
    """Compare the last checkpoints of two runs up to the order of sums."""
    tensors, wanted = saved(got), saved(want)
    assert tensors.keys() == wanted.keys()
    allowed = up_to_sums(STEPS)
    assert [name for name, w in wanted.items() if not _near(tensors[name], w, allowed(w))] == []
    assert len(untimed(got)) == len(untimed(want)) == STEPS


def manifest_of_rewritten(world: World, folder: Path, parallel: dict[str, Any], step: int, **changes: Any) -> str:
    """Load the last checkpoint, of a step, save it again, and return its manifest."""
    training = new_run(world, folder, parallel, **changes)
    place = folder / "checkpoints" / f"step-{step:06d}"
    training.saver.config = RunConfig.from_file(place / "config.toml")
    training.saver.saved_at = None
    training.saver.save()
    return world.first(lambda: (place / "manifest.json").read_text())


# --- runs of the command


def small_config(folder: Path) -> Path:
    """Write the config of a run of the command with 6 steps, and its text."""
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(400)))
    data = DataConfig(path=folder / "text.txt")
    config = RunConfig(
        model=ModelConfig(**SMALL | {"vocab_size": 256}), train=TrainConfig(**MODELS["train_six"]), data=data
    )
    (folder / "small.toml").write_text(config.to_toml())
    return folder / "small.toml"
