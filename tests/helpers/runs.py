"""Small training runs that can be stopped anywhere, resumed, and compared."""

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.data.corpus import Corpus
from dsmini.distributed.world import World
from dsmini.training.record import Row, rows_of
from dsmini.training.run import TrainingRun, newest_checkpoint
from dsmini.training.trainer import Trainer
from tests.conftest import MODELS, SMALL
from tests.helpers.folders import different

TRAIN = TrainConfig(gate_lr=None, **MODELS["train"])
RICH = MODELS["train_rich"]
TIMING = {"seconds", "tokens_per_s", "data_wait", "memory", "spread", "busiest", "binds", "binds_share"}


class Killed(BaseException):
    """Exception that no handler expects, so that nothing is cleaned up."""


def new_run(
    folder: Path, nan_at: Sequence[int] = (), model: dict[str, Any] | None = None, **changes: Any
) -> TrainingRun:
    """Start a run of a small model that draws noise in every forward, so that the random state matters.

    Args:
        nan_at: steps, counted from 0, whose gradient is not finite.
        model: changes to the model.
    """
    config = RunConfig(
        model=ModelConfig(**SMALL | (model or {})), train=dataclasses.replace(TRAIN, **changes), out=folder
    )
    text = np.frombuffer(bytes(7 * i * i % 61 for i in range(1000)), np.uint8)
    corpus = Corpus(train=text[:900], val=text[900:], source="", files=1, split="", sha256="")
    torch.manual_seed(0)
    whole = Transformer(config.model)
    whole.embed.register_forward_hook(lambda m, _, out: out + 1e-3 * torch.randn_like(out) if m.training else out)
    trainer = Trainer(whole, corpus, config, torch.device("cpu"))
    if nan_at:
        whole.head.weight.register_hook(lambda grad: grad * torch.nan if trainer.steps_done in nan_at else grad)
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(config.to_toml())
    return TrainingRun(config, trainer, Console(quiet=True))


def resumed(folder: Path, said: list[str] | None = None, **options: Any) -> TrainingRun:
    """Resume the run of a folder."""
    training = new_run(folder, **options)
    torch.manual_seed(99)  # another random state than the stored one
    say = (lambda line: None) if said is None else said.append
    training.resume(newest_checkpoint(training.config, World(), say))
    return training


def read_records(folder: Path) -> list[Row]:
    """Return the rows of metrics.jsonl."""
    return [*rows_of(folder)]


def untimed(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what differs from run to run."""
    return [_untimed(row) for row in read_records(folder)]


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMING}


def saved(folder: Path, step: int = TRAIN.steps) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    parts = (folder / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")
    return {f"{path.stem}/{name}": tensor for path in sorted(parts) for name, tensor in load_file(path).items()}


def differences(got: Path, want: Path, step: int = TRAIN.steps) -> list[str]:
    """Return what two runs do not have alike at a step: tensors by name, `state` and `rows`."""
    found = sorted(different(saved(got, step), saved(want, step)))
    files = [folder / "checkpoints" / f"step-{step:06d}" / "state.json" for folder in (got, want)]
    states = [json.loads(file.read_text()) for file in files]
    rows = [untimed(folder) for folder in (got, want)]
    for state in states:
        state["row"] = _untimed(state["row"])
    return found + ["state"] * (states[0] != states[1]) + ["rows"] * (rows[0] != rows[1])


def die(
    training: TrainingRun,
    owner: Any,
    name: str,
    step: int,
    number: int = 0,
    after: bool = False,
    error: type[BaseException] = Killed,
) -> bool:
    """Train, and be killed before or after a call of owner.name; return False if the run made no such call.

    Args:
        step: number of steps that are done then.
        number: of the call among those after this many steps, counted from 0.
        error: raised in place of a death.
    """
    real, count = getattr(owner, name), itertools.count()

    def dying(*args: Any, **kwargs: Any) -> Any:
        now = training.trainer.steps_done == step and next(count) == number
        if now and not after:
            raise error
        result = real(*args, **kwargs)
        if now:
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch, suppress(error):
        patch.setattr(owner, name, dying)
        training.train()
        return False
    return True


def asked_after(training: TrainingRun, steps: int) -> None:
    """Ask the run to stop, as by Ctrl-C, in the step after this number of steps."""
    real = training.trainer.step

    def step() -> Any:
        if training.trainer.steps_done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return real()

    training.trainer.step = step
