"""Training steps of a small model in any layout of ranks, and what they leave, as one process has it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config.parallel import ParallelConfig
from dsmini.data.corpus import Corpus
from dsmini.distributed.drawing import ModelPart
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.pieces import joined_pieces
from dsmini.distributed.world import World
from dsmini.training.trainer import StepResult, Trainer
from tests.conftest import SMALL

TRAIN = TrainConfig(
    steps=50, batch_size=8, seq_len=16, optimizer="adamw", gate_lr=None, lr=1e-2, bias_speed=0.01, dtype="float32"
)
CPU = torch.device("cpu")


class Trained(NamedTuple):
    """What some steps leave: the results of each, and all tensors, whole."""

    steps: list[StepResult]
    tensors: dict[str, Tensor]

    @property
    def losses(self) -> Tensor:
        """[steps, 3]: main, MTP and balance loss."""
        return torch.tensor([[s.loss, s.mtp_loss, s.balance_loss] for s in self.steps], dtype=torch.float64)


def new_trainer(
    parallel: ParallelConfig, model: dict[str, Any], train: dict[str, Any], world: World, out: Path | None = None
) -> Trainer:
    recipe = dataclasses.replace(TRAIN, **train)
    config = RunConfig(model=ModelConfig(**(SMALL | model)), train=recipe, parallel=parallel, out=out)
    parallel.check(config.model, config.train, world.size)
    text = np.frombuffer(bytes(7 * i * i % 61 for i in range(3000)), np.uint8)
    corpus = Corpus(train=text[:2700], val=text[2700:], source="", files=1, skipped=0, split="", sha256="")
    torch.manual_seed(0)
    dtype = getattr(torch, config.train.dtype)
    if world.size == 1:
        return Trainer(Transformer(config.model, compute_dtype=dtype), corpus, config, CPU)
    part = ModelPart.divided(config.model, Mesh(parallel, CPU))
    part.model.compute_dtype = dtype
    part.fill(CPU)
    return Trainer(part.model, corpus, config, CPU, part.ranks)


def train(
    world: World,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    steps: int = 5,
) -> Trained:
    """Take steps in a layout; every rank returns the same."""
    trainer = new_trainer(ParallelConfig(**(parallel or {})), model or {}, train or {}, world)
    done = [trainer.step() for _ in range(steps)]
    return Trained(done, whole_tensors(world, trainer))


def whole_tensors(world: World, trainer: Trainer) -> dict[str, Tensor]:
    """Return all tensors of all ranks, joined."""
    tensors = trainer.tensors()
    pieces = trainer.pieces(tensors)
    mine = {f"{part}/{n}": (pieces[part][n], t.detach().clone()) for part, of in tensors.items() for n, t in of.items()}
    everyone = world.gather(mine)
    names = {name for of_rank in everyone for name in of_rank}
    return {name: joined_pieces([of[name] for of in everyone if name in of]) for name in sorted(names)}
