"""Small training runs that can be stopped anywhere, resumed, and compared whole."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.checkpoint.run_folder import read_metrics
from dsmini.checkpoint.training_state import Checkpoint, last_checkpoint
from dsmini.data.corpus import Corpus
from dsmini.measure.machine import random_state
from dsmini.training.run import TrainingRun
from dsmini.training.trainer import Trainer
from tests.conftest import SMALL

TRAIN = TrainConfig(
    steps=8,
    batch_size=4,
    seq_len=16,
    eval_every=3,
    eval_tokens=64,
    save_every=2,
    optimizer="adamw",
    lr=1e-2,
    gate_lr=None,
    weight_decay=0.1,
    dtype="float32",
    device="cpu",
)
TIMING = {"seconds", "tokens_per_s", "data_wait", "memory"}


class Killed(BaseException):
    """What no handler expects, so that nothing is put right on the way out."""


def new_run(folder: Path, nan_at: tuple[int, ...] = (), **changes: Any) -> TrainingRun:
    """A run of a small model that draws a little noise in every forward, so that the random state matters too.

    Args:
        nan_at: steps, counted from 0, whose gradient is not finite.
    """
    config = RunConfig(model=ModelConfig(**SMALL), train=dataclasses.replace(TRAIN, **changes), out=folder)
    text = np.frombuffer(bytes(7 * i * i % 61 for i in range(1000)), np.uint8)
    corpus = Corpus(train=text[:900], val=text[900:], source="", files=1, skipped=0, split="", sha256="")
    torch.manual_seed(0)
    model = Transformer(config.model)
    model.embed.register_forward_hook(lambda m, _, out: out + 1e-3 * torch.randn_like(out) if m.training else out)
    trainer = Trainer(model, corpus, config, torch.device("cpu"))
    model.head.weight.register_hook(lambda grad: grad * torch.nan if trainer.steps_done in nan_at else grad)
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(config.to_toml())
    return TrainingRun(config, trainer, Console(quiet=True))


def resumed(
    folder: Path,
    change: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint,
    said: list[str] | None = None,
    **options: Any,
) -> TrainingRun:
    """The run in that folder, ready to go on; with whatever a test changes in what is loaded."""
    training = new_run(folder, **options)
    torch.manual_seed(99)  # whatever this process has drawn
    say = (lambda line: None) if said is None else said.append
    training.resume(change(last_checkpoint(folder, training.parts, training.fits, say)))
    return training


def whole(training: TrainingRun) -> dict[str, Any]:
    """All that a run consists of, but for times."""
    trainer = training.trainer
    tensors = {
        f"{part}/{name}": tensor.clone()
        for part, named in {**trainer.tensors(), "rng": random_state(trainer.device)}.items()
        for name, tensor in named.items()
    }
    rows = [{key: v for key, v in row.items() if key not in TIMING} for row in read_metrics(training.folder)]
    return {
        **tensors,
        "steps": trainer.steps_done,
        "sequences": trainer.sequences,
        "average updates": trainer.average and trainer.average.updates,
        "skipped": (training.skipped, training.skipped_in_a_row),
        "best": training.best,
        "rows": json.dumps(rows),
        "rows held": len(training.rows),
    }


def unequal(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """What is not the same, bit for bit."""
    both = {key for key in a.keys() & b.keys() if _same(a[key], b[key])}
    return (a.keys() | b.keys()) - both


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    return a == b
