"""Memory that training takes on a rank, by the part of the model that it holds."""

import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import nn

from dsmini import accounting
from dsmini.accounting import Bytes
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.config import ModelConfig, RunConfig
from dsmini.distributed.data_parallel import local
from dsmini.distributed.drawing import ModelPart
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.world import World
from dsmini.nn import Transformer
from dsmini.nn.block import Block
from dsmini.nn.moe import Experts, MoE
from dsmini.training.optim import is_inner_matrix


def part_bytes(config: RunConfig, part: ModelPart) -> Bytes:
    """Return the bytes that a rank holds at the end of a forward in training, a lower bound as training_bytes is.

    It is training_bytes for a single process. Parameters, gradients and the optimizer's state are counted tensor by
    tensor. Activations are those of the own layers for one part of the batch. Not in it: parameters that ZeRO
    gathers, and the further parts of the batch that are in a pipeline at the same time.

    Args:
        part: may be on the meta device.
    """
    train = config.train
    dtype = "float32" if train.dtype == "float32" else "bfloat16"
    own, rows = _own_layers(part.model), train.batch_size // train.grad_accum // part.mesh.parts
    activations = accounting.activation_bytes(
        own, batch_size=max(1, rows), seq_len=config.seq_len, dtype=dtype, recompute=train.recompute
    )
    copies = accounting.saved_weight_bytes(own, dtype).by_part
    experts = next((len(m.w1) for m in part.model.modules() if isinstance(m, Experts)), 0)  # of each layer, here
    share = {True: experts / own.n_routed_experts, False: 1.0}
    heads = (1 + own.n_mtp_layers) * own.vocab_size * own.dim if list(part.model.head.parameters()) else 0
    tensors = [*part.model.parameters(), *part.model.buffers()]
    return Bytes.of(
        [
            ("parameters", sum(local(t).nbytes for t in tensors)),
            ("gradients", sum(local(p).nbytes for p in part.model.parameters())),
            ("optimizer", sum(_optimizer_bytes(config, part))),
            ("activations", activations.total),
            *(("weights kept for backward", n * share[name.endswith("routed experts")]) for name, n in copies.items()),
            ("the head's gradient", 4 * heads),
        ]
    )


def refuse_oversized(
    config: RunConfig, device: torch.device, part: ModelPart | None = None, world: World | None = None
) -> None:
    """Raise ValueError if what the ranks hold of a run at least does not fit into memory. All ranks call it together.

    Ranks of one machine share its memory on a CPU. Each has a GPU of its own.

    Args:
        part: of this rank; None: the whole model, in one process.
        world: the ranks; None: this process.
    """
    part, world = part or ModelPart.divided(config.model, Mesh()), world or World()
    needed = world.gather(int(part_bytes(config, part).total))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" and world.size > 1 else 1
    first = world.rank // here * here
    what = "training this model with such a batch"
    world.together(lambda: refuse_too_large(sum(needed[first : first + here]), what, device))


def _own_layers(model: Transformer) -> ModelConfig:
    """Return the config of a model of the layers that are left of a divided one."""
    main, mtp = ([m for m in of.modules() if isinstance(m, Block)] for of in (model.layers, model.mtp))
    dense = sum(not isinstance(block.ffn, MoE) for block in [*main, *mtp])
    return dataclasses.replace(model.config, n_layers=len(main), n_mtp_layers=len(mtp), n_dense_layers=dense)


def _optimizer_bytes(config: RunConfig, part: ModelPart) -> Iterator[int]:
    """Yield the bytes that the optimizers store for each parameter that they move on this rank."""
    train = config.train
    named = list(part.model.named_parameters())
    by_muon: list[nn.Parameter] = [p for name, p in named if train.optimizer == "muon" and is_inner_matrix(name, p)]
    yield from (local(p).nbytes for p in part.mesh.owned(by_muon))
    moments = 2 * getattr(torch, train.moments).itemsize
    yield from (moments * local(p).numel() + 4 for p in {p for _, p in named} - set(by_muon))
