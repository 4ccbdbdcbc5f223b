"""save_pretrained on several ranks: each writes the experts that it holds, and a share of all else.

    all       plan the whole folder from their part of the model: the same files, tensors and places
    rank 0    makes the hidden folder, and each file with its header and room for all tensors
    all       write their own tensors at their places, one at a time
    rank 0    writes config.json and the index, copies the small files, renames the folder

The files are those that one process would write, bit for bit. No rank holds the model. All ranks must see the same
folder.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsmini.atomic import finish_folder, partial_folder
from dsmini.checkpoint.export import (
    METADATA,
    PlannedFolder,
    Saved,
    made,
    not_finite,
    parse_size,
    plan_folder,
    refuse_filled,
)
from dsmini.checkpoint.safetensors_file import Entry, begin_safetensors, write_entries
from dsmini.console.messages import rate
from dsmini.console.progress import Progress
from dsmini.distributed.shared_tokens import holders_of
from dsmini.distributed.world import World
from dsmini.nn import Transformer


def save_pretrained(
    world: World,
    model: Transformer,
    path: str | Path,
    fp8: bool = False,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    files: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Saved:
    """Write a model of which each rank holds a part as one folder that transformers loads. All ranks call it together.

    Args:
        model: as `load_pretrained` or `load_run` of this room gave it.
        say: told by rank 0 alone.
        The others are as in dsmini.save_pretrained.

    Warns: as dsmini.save_pretrained, on rank 0.

    Raises: ValueError or OSError on all ranks, naming those that met it. There is no folder then.
    """
    path, limit = Path(path), parse_size(shard_size)
    world.first(lambda: refuse_filled(path))
    planned = world.together(lambda: plan_folder(model, fp8, dtype, limit))
    mine = _mine(world, model, planned)
    with ExitStack() as stack:

        def begin() -> tuple[Path, dict[str, dict[str, int]]]:
            folder = stack.enter_context(made(path, partial_folder))
            return folder, {n: begin_safetensors(folder / n, of, METADATA) for n, of in planned.shards.items()}

        folder, places = world.first(begin)
        total = sum(entry.nbytes for entries in mine.values() for entry in entries)
        console = Console(stderr=True, quiet=world.rank > 0)
        with Progress(console, total, f"writing {path.name}", unit="bytes") as progress, torch.no_grad():

            def write() -> None:
                for name, entries in mine.items():
                    write_entries(folder / name, entries, places[name], progress.add)

            world.together(write)

        def finish() -> None:
            planned.write_beside(folder, files or {}, config or {})
            finish_folder(folder, path)

        world.first(finish)
    damaged = [name for name in world.gather(planned.plan.not_finite) if name is not None]
    if world.rank == 0:
        if damaged:
            first = min(damaged, key=list(planned.plan.weight_of).index)
            warnings.warn(not_finite(path, first), stacklevel=2)
        if say is not None:
            say(rate("wrote", planned.nbytes, progress.seconds))
    return Saved(planned.nbytes, progress.seconds, list(planned.shards))


def _mine(world: World, model: Transformer, planned: PlannedFolder) -> dict[str, list[Entry]]:
    """Return the tensors of each file that this rank writes: experts by one that holds them, all else in turns.

    A weight and its scales are written by one rank, which computes the scales first.
    """
    holders, weight_of = holders_of(model), planned.plan.weight_of
    turns = {weight: turn % world.size for turn, weight in enumerate(dict.fromkeys(weight_of.values()))}

    def writer(entry: Entry) -> int:
        weight = weight_of[entry.name]
        divided = holders.get(weight.name.rpartition(".")[0])
        return turns[weight] if weight.expert is None or divided is None else divided.writer(weight.expert)

    return {file: [e for e in entries if writer(e) == world.rank] for file, entries in planned.shards.items()}
