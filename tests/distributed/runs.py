"""Whole training runs in any layout of ranks: started, stopped, resumed, and compared."""

import os
import signal
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from dsmini import ModelConfig, RunConfig, TrainConfig
from dsmini.checkpoint.safetensors_reader import SafetensorsReader
from dsmini.checkpoint.training_state import checkpoint_folders, last_checkpoint
from dsmini.config import DataConfig
from dsmini.config.parallel import ParallelConfig
from dsmini.distributed.world import World
from dsmini.training.run import TrainingRun
from tests.conftest import SMALL
from tests.distributed.training import new_trainer

RECIPE: dict[str, Any] = {
    **{"steps": 8, "eval_every": 3, "eval_tokens": 64, "save_every": 2, "keep": 3, "ema_decay": 0.9},
    **{"optimizer": "muon", "batch_size": 12, "sample_tokens": 0},
}


def new_run(world: World, folder: Path, parallel: dict[str, Any] | None = None, **changes: Any) -> TrainingRun:
    """Make a run in a folder, and restore it if it has a checkpoint."""
    trainer = new_trainer(ParallelConfig(**(parallel or {})), {}, RECIPE | changes, world, folder)
    if world.rank == 0:
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(trainer.config.to_toml())
    training = TrainingRun(trainer.config, trainer, Console(quiet=True), world)
    if world.first(lambda: bool(checkpoint_folders(folder))):
        saver, share = training.saver, (world.rank, world.size)
        said: list[str] = []
        training.resume(last_checkpoint(folder, saver.parts, saver.fits, said.append, world.together, share))
    return training


def run(world: World, folder: Path, parallel: dict[str, Any] | None = None, until: int = 8, **changes: Any) -> bool:
    """Train until a step, after which a signal comes to the last rank; return whether it came to the end."""
    training = new_run(world, folder, parallel, **changes)
    real = training.trainer.step

    def step() -> Any:
        if training.trainer.steps_done == until - 1 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real()

    if until < training.config.train.steps:
        training.trainer.step = step
    return training.train()


def saved(folder: Path, step: int) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    parts = (folder / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")
    return {
        f"{path.stem}/{name}": tensor
        for path in sorted(parts)
        for name, tensor in SafetensorsReader(path).read_all().items()
    }


def small_config(folder: Path) -> Path:
    """Write the config of a run of the command with 6 steps, and its text."""
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(400)))
    train = TrainConfig(
        **{"steps": 6, "batch_size": 4, "seq_len": 16, "dtype": "float32", "device": "cpu", "optimizer": "adamw"},
        **{"save_every": 1, "eval_every": 6, "eval_tokens": 64, "sample_tokens": 8},
    )
    model = ModelConfig(**(SMALL | {"vocab_size": 256}))
    config = RunConfig(model=model, train=train, data=DataConfig(path=folder / "text.txt"))
    (folder / "small.toml").write_text(config.to_toml())
    return folder / "small.toml"
