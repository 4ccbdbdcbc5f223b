"""Save a checkpoint from all ranks, or the only one: every rank writes its pieces into the same files.

    rank 0    makes the hidden folder, and in it each file: its header, and room for all tensors
    all       write their own rows at their place in the file
    rank 0    computes the checksums, writes the manifest, renames the folder, removes old checkpoints

No rank holds more than its own pieces. The files are those that one process would write, bit for bit, so any layout
of ranks, and one process, reads them. All ranks must see the same folder. An error of one rank is raised by all, and
then the folder is removed.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from dsmini.atomic import finish_folder, partial_folder, remove_leftovers
from dsmini.checkpoint.safetensors_files import Entry, begin_safetensors, bytes_of, write_at
from dsmini.checkpoint.training_state import write_manifest
from dsmini.distributed.pieces import HeldRows
from dsmini.distributed.world import World

Held = Mapping[str, Mapping[str, tuple[HeldRows, Tensor]]]
"""The pieces of a rank by the stem of their file, and by name."""


def save_pieces(
    world: World,
    folder: Path,
    held: Held,
    texts: Mapping[str, str],
    metadata: Mapping[str, str],
) -> None:
    """Write a folder with the tensors that all ranks hold, whole or not at all. All ranks call it together.

    Args:
        texts: further files.
        metadata: texts in the header of every tensor file.

    Raises: OSError on all ranks, naming those that met one. The folder is as before.
    """
    plan, my_part = _plan(world, held)
    with ExitStack() as stack:

        def begin() -> tuple[Path, dict[str, dict[str, int]]]:
            remove_leftovers(folder.parent)
            partial = stack.enter_context(partial_folder(folder))
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            files = {part: partial / f"{part}.safetensors" for part in plan}
            return partial, {part: begin_safetensors(files[part], plan[part], metadata) for part in plan}

        def finish() -> None:
            write_manifest(partial, [*(f"{part}.safetensors" for part in plan), *texts])
            finish_folder(partial, folder, replace=True)

        partial, places = world.first(begin)
        world.together(lambda: _write_all(partial, my_part, places))
        world.first(finish)


def _plan(world: World, held: Held) -> tuple[dict[str, list[Entry]], Held]:
    """Return the entries of each file, of all ranks, and the pieces that this rank writes.

    Ranks that hold the same piece take turns: the first piece is written by the first of them, and so on.
    """
    mine = {part: {name: (t.dtype, piece) for name, (piece, t) in of.items()} for part, of in held.items()}
    files: dict[str, dict[str, Entry]] = {part: {} for part in held}  # all ranks have the same parts; one may be empty
    holders: dict[tuple[str, str, int], list[int]] = {}
    for rank, of_rank in enumerate(world.gather(mine)):
        for part, named in of_rank.items():
            for name, (dtype, piece) in named.items():
                files[part][name] = Entry(name, dtype, piece.shape, lambda: torch.empty(0))
                holders.setdefault((part, name, piece.first), []).append(rank)
    writers = {key: ranks[turn % len(ranks)] for turn, (key, ranks) in enumerate(sorted(holders.items()))}
    my_part = {
        part: {name: pair for name, pair in of.items() if writers[part, name, pair[0].first] == world.rank}
        for part, of in held.items()
    }
    return {part: list(entries.values()) for part, entries in files.items()}, my_part


def _write_all(folder: Path, held: Held, places: Mapping[str, Mapping[str, int]]) -> None:
    """Write pieces into files that are there."""
    for part, named in held.items():
        _write(folder / f"{part}.safetensors", named, places[part])


def _write(path: Path, named: Mapping[str, tuple[HeldRows, Tensor]], places: Mapping[str, int]) -> None:
    """Write pieces into a file that is there, and force them to the disk."""
    file = os.open(path, os.O_WRONLY)
    try:
        for name, (piece, tensor) in named.items():
            write_at(file, bytes_of(tensor), places[name] + piece.elements[0] * tensor.element_size())
        os.fsync(file)
    finally:
        os.close(file)
