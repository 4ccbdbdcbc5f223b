"""The work of a rank with its part of a model, for tests: load, run, generate, and say what it held and read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import dsmini
from dsmini import ModelConfig, Transformer
from dsmini.checkpoint import load
from dsmini.checkpoint.tensor_files import SafetensorsReader
from dsmini.distributed.decode import Sharing
from dsmini.distributed.world import World
from tests.conftest import SMALL, randomise
from tests.helpers import folders

SIZES: dict[str, Any] = SMALL | {"n_layers": 3, "max_seq_len": 96}
FP8_SIZES: dict[str, Any] = {"dim": 136, "inter_dim": 200, "moe_inter_dim": 130, "n_mtp_layers": 1}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
COPIES = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], [7, 7, 7, 6, 5, 4, 3, 2, 1, 0, 6, 0]]
"""Redundant placements of two layers, some copies on one rank."""


class Part(NamedTuple):
    """The part of a model that a rank has."""

    nbytes: int
    """Bytes of parameters and buffers."""
    read: list[str]
    """Names of the tensors that were read."""
    logits: Tensor
    tokens: dict[str, Tensor]
    """Generated tokens by the way of drawing."""


def new_folder(place: Path, fp8: bool = False, stored: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write the folder of a random model with experts in the last layers and in the MTP blocks."""
    sizes = SIZES | (FP8_SIZES if fp8 else {}) | changes
    torch.manual_seed(3)
    model = randomise(Transformer(ModelConfig(**sizes)))
    tensors, more = folders.tensors_of(model, torch.float32 if fp8 else stored), {}
    if fp8:
        tensors, more = folders.in_fp8(tensors)[0], {"quantization_config": folders.QUANTIZED}
    return folders.write(place, tensors, folders.config_json(model.config, **more), shards=3)


def placement_of(config: ModelConfig, places: Sequence[Sequence[int]] = COPIES) -> list[list[int]]:
    """Return a placement for all layers with experts, from rows that repeat."""
    layers = sum(map(config.is_moe, range(config.n_layers + config.n_mtp_layers)))
    return [list(places[i % len(places)]) for i in range(layers)]


@contextmanager
def reads() -> Iterator[list[str]]:
    """Yield the names of the tensors that are read in a block."""
    names: list[str] = []
    read = SafetensorsReader.read

    def recorded(self: SafetensorsReader, name: str) -> Tensor:
        names.append(name)
        return read(self, name)

    with mock.patch.object(SafetensorsReader, "read", recorded):
        yield names


def part(world: World, folder: Path, fp8: Any, placement: list[list[int]] | None = None) -> Part:
    """Load a part, run it and generate with it."""
    with reads() as names:
        model = load_part(world, folder, torch.float32, fp8, placement)
    held = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return Part(
        nbytes=sum(t.nbytes for t in held.values()),
        read=names,
        logits=logits_of(model),
        tokens=generated(model),
    )


def logits_of(model: Transformer) -> Tensor:
    """Return the logits of a batch."""
    tokens = torch.tensor([[7 * i * i % 61 for i in range(row, row + 20)] for row in range(3)])
    with torch.no_grad():
        return model(tokens)


def generated(model: Transformer) -> dict[str, Tensor]:
    """Return continuations of PROMPTS by 12 tokens, drawn in each way."""
    ways = {
        "greedy": {},
        "speculative": {"speculative": True},
        "drawn": {"temperature": 0.9, "top_p": 0.9},
        "drawn speculatively": {"temperature": 0.9, "speculative": True},
    }
    generators = {name: torch.Generator().manual_seed(5) for name in ways}
    return {
        name: dsmini.generate(model, PROMPTS, 12, generator=generators[name], **options).tokens
        for name, options in ways.items()
    }


def load_part(
    world: World, folder: Path, dtype: Any = None, fp8: Any = "dequantize", placement: Any = None
) -> Transformer:
    """Load a rank's part of a folder's model, as dsmini.generate does."""
    return load_shared(Sharing(world, placement=placement), folder, dtype, fp8)


def load_shared(sharing: Sharing, folder: Path, dtype: Any = None, fp8: Any = "dequantize") -> Transformer:
    """Load the part of a folder's model that a process shares."""
    model = sharing.world.together(lambda: load.load_pretrained(folder, dtype, fp8, holding=sharing.holding))
    sharing.connect(model)
    return model
