"""Inject faults into the ranks of a run, each once in a run, however often the run is restarted.

A fault is noted in faults-rank-0003.log in the run's folder before it is done: else a restarted run would die of it
again and again. `inject` puts a run's faults where its steps and saves pass; nothing in dsmini knows of them.
"""

import ctypes
import dataclasses
import errno
import math
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsmini.distributed.mesh import local
from dsmini.training import saving
from dsmini.training.run import TrainingRun

SAVE_CALLS = {
    "save_pieces": ("staged", ""),
    "_write_all": ("writing", "written"),
    "finish_folder": ("before_rename", "renamed"),
    "prune": ("before_prune", "pruned"),
}
"""Functions of dsmini.training.saving, and the phases of a save, as save:NAME, before and after their calls."""
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}
ERRNO = {"full_disk": errno.ENOSPC, "io_error": errno.EIO}
LOSS = {"nan": math.nan, "infinite": math.inf, "spike": 1000.0}
"""Factors of a rank's loss."""


class Fault(NamedTuple):
    """One fault of a rank, during a step from 1, or at the first save from that step on."""

    kind: str
    rank: int
    step: int
    phase: str
    """forward, backward, optimizer or between; or save: and a phase of SAVE_CALLS."""


class Faults:
    """The faults of one rank that are still to come."""

    def __init__(self, faults: Sequence[Fault], training: TrainingRun) -> None:
        self.training, rank = training, training.world.rank
        self.path = training.folder / f"faults-rank-{rank:04d}.log"
        done = self.path.read_text().splitlines() if self.path.exists() else []
        self.left = [fault for fault in faults if fault.rank == rank and str(fault) not in done]
        self.saving = 0
        """Step of the state that is saved, while steps continue if that is in the background."""

    def take(self, phase: str, of_loss: bool = False) -> Fault | None:
        """Return a fault of the loss, or any other, that is due, after it was noted."""
        step = 1 + (self.saving if phase.startswith("save:") else self.training.trainer.steps_done)
        for fault in self.left:
            if fault.step <= step and fault.phase == phase and (fault.kind in LOSS) == of_loss:
                self.left.remove(fault)
                with self.path.open("a") as file:
                    file.write(f"{fault}\n")
                return fault
        return None

    def at(self, phase: str) -> None:
        """Do what is due in a phase."""
        while fault := self.take(phase):
            if fault.kind == "flip":
                flip_a_bit([local(p) for p in self.training.trainer.model.parameters()], str(fault))
            else:
                do(fault)


def do(fault: Fault) -> None:
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.kind])
    elif fault.kind in ERRNO:
        raise OSError(ERRNO[fault.kind], os.strerror(ERRNO[fault.kind]), "a fault")
    elif fault.kind == "exception":
        raise RuntimeError(f"{fault}")
    elif fault.kind in ("hang", "alone"):
        if fault.kind == "alone":  # in a collective that the others never join
            dist.broadcast(torch.zeros(1), src=0)
        while True:
            time.sleep(3600)
    else:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file
        os.abort() if fault.kind == "abort" else ctypes.string_at(0)


def flip_a_bit(tensors: Sequence[Tensor], seed: str) -> None:
    """Flip a bit of the mantissa of a weight."""
    draw = random.Random(seed)
    flat = draw.choice([t for t in tensors if t.numel()]).detach().view(-1)
    flat.view(torch.int32)[draw.randrange(len(flat))] ^= 1 << draw.randrange(20)


REAL: dict[str, Callable[..., Any]] = {name: getattr(saving, name) for name in SAVE_CALLS}


def inject(training: TrainingRun, faults: Sequence[Fault]) -> None:
    """Let a run meet faults. The saves of this process, which pass through functions of a module, are this run's."""
    mine, trainer = Faults(faults, training), training.trainer
    real_phase, real_parts, real_write = training.phase, trainer.train_parts, training.saver._write

    def phase(name: str) -> None:
        real_phase(name)
        mine.at(name)

    def train_parts(batch: Any) -> Any:
        fault = mine.take("forward", of_loss=True)
        factor = 1.0 if fault is None else LOSS[fault.kind]
        return real_parts(dataclasses.replace(batch, parts=batch.parts / factor))

    def write(tensors: Any, state: Any, world: Any) -> None:
        mine.saving = state.step
        real_write(tensors, state, world)

    training.phase = trainer.phase = phase
    trainer.train_parts, training.saver._write = train_parts, write
    for name, phases in SAVE_CALLS.items():

        def call(*args: Any, name: str = name, phases: tuple[str, str] = phases, **kwargs: Any) -> Any:
            mine.at(f"save:{phases[0]}")
            result = REAL[name](*args, **kwargs)
            mine.at(f"save:{phases[1]}")
            return result

        setattr(saving, name, call)


def parsed(text: str) -> list[Fault]:
    """Return the faults of a text, each KIND:RANK:STEP:PHASE, separated by commas."""
    split = [one.split(":", 3) for one in filter(None, text.split(","))]
    return [Fault(kind, int(rank), int(step), phase) for kind, rank, step, phase in split]
