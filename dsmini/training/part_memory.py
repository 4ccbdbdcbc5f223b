"""Memory that a run takes at least: one that cannot fit is refused before its model has any."""

import os

import torch

from dsmini import accounting
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.config import RunConfig
from dsmini.distributed.data_parallel import local
from dsmini.distributed.drawing import ModelPart
from dsmini.distributed.world import World


def least_bytes(config: RunConfig, part: ModelPart | None = None) -> int:
    """Return bytes that training takes at least in a process.

    They are those at the end of a forward (accounting.training_bytes), or of a part of a model on a rank: its
    parameters and gradients alone.

    Args:
        part: may be on the meta device; None: the whole model, in one process.
    """
    if part is not None and part.mesh.size > 1:
        return 2 * sum(local(p).nbytes for p in part.model.parameters())
    train = config.train
    needed = accounting.training_bytes(
        config.model,
        batch_size=train.batch_size // train.grad_accum,
        seq_len=config.seq_len,
        dtype="float32" if train.dtype == "float32" else "bfloat16",
        optimizer=train.optimizer,
        moments=train.moments,
        recompute=train.recompute,
        dsa_stage=train.dsa_stage,
    )
    return int(needed.total)


def refuse_oversized(
    config: RunConfig, device: torch.device, part: ModelPart | None = None, world: World | None = None
) -> None:
    """Raise ValueError if what the ranks hold of a run at least does not fit into memory. All ranks call it together.

    Ranks of one machine share its memory on a CPU. Each has a GPU of its own.

    Args:
        part: of this rank; None: the whole model, in one process.
        world: the ranks; None: this process.
    """
    world = world or World()
    needed = world.gather(least_bytes(config, part))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" and world.size > 1 else 1
    first = world.rank // here * here
    what = "training this model with such a batch"
    world.together(lambda: refuse_too_large(sum(needed[first : first + here]), what, device))
