"""Save the state of a run in checkpoints. All ranks write into the same files.

    rank 0    makes the hidden folder, and in it each file: its header, and room for all tensors
    all       write their own rows at their place in the file
    rank 0    finds in the files what each rank had in memory, computes the checksums, writes the manifest, renames the
              folder, removes old checkpoints

No rank holds more than its own pieces. The files are those that one process would write, bit for bit, so any layout
of ranks, and one process, reads them. All ranks must see the same folder. An error of one rank is raised by all, and
then the folder is removed.
"""

import errno
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dsmini.atomic import as_json, finish_folder, partial_folder, remove_leftovers, sync
from dsmini.checkpoint.tensor_files import Entry, begin_safetensors, bytes_of, write_at
from dsmini.checkpoint.training_state import RunState, Tensors, checkpoint_folder, prune, write_manifest
from dsmini.config import RunConfig
from dsmini.distributed.heartbeat import SAVING
from dsmini.distributed.meeting import told
from dsmini.distributed.mesh import Pieces
from dsmini.distributed.world import World
from dsmini.machine import random_state
from dsmini.training.record import METRICS, History
from dsmini.training.trainer import Trainer


def save_pieces(
    world: World,
    folder: Path,
    held: Pieces,
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
            if world.size > 1:
                _refuse_lost(partial, written)
            write_manifest(partial, [*(f"{part}.safetensors" for part in plan), *texts])
            finish_folder(partial, folder, replace=True)

        partial, places = world.first(begin)
        written = world.gather(world.together(lambda: _write_all(partial, my_part, places, noted=world.size > 1)))
        world.first(finish)


def _plan(world: World, held: Pieces) -> tuple[dict[str, list[Entry]], Pieces]:
    """Return the entries of each file, of all ranks, and the pieces that this rank writes.

    Ranks that hold the same piece take turns: the first piece is written by the first of them, and so on. A rank that
    holds no rows of a tensor, of fewer experts than ranks that divide them, has no turn.
    """
    mine = {part: {name: (t.dtype, piece) for name, (piece, t) in of.items()} for part, of in held.items()}
    files: dict[str, dict[str, Entry]] = {part: {} for part in held}  # all ranks have the same parts; one may be empty
    holders: dict[tuple[str, str, int], list[int]] = {}
    for rank, of_rank in enumerate(world.gather(mine)):
        for part, named in of_rank.items():
            for name, (dtype, piece) in named.items():
                files[part][name] = Entry(name, dtype, piece.shape, lambda: torch.empty(0))
                if piece.rows:
                    holders.setdefault((part, name, piece.first), []).append(rank)
    writers = {key: ranks[turn % len(ranks)] for turn, (key, ranks) in enumerate(sorted(holders.items()))}
    my_part = {
        part: {n: pair for n, pair in of.items() if pair[0].rows and writers[part, n, pair[0].first] == world.rank}
        for part, of in held.items()
    }
    return {part: list(entries.values()) for part, entries in files.items()}, my_part


class Written(NamedTuple):
    """A piece as a rank had it in memory: its file, first byte, number of bytes, and CRC-32."""

    part: str
    first: int
    nbytes: int
    crc: int


def _write_all(folder: Path, held: Pieces, places: Mapping[str, Mapping[str, int]], *, noted: bool) -> list[Written]:
    """Write pieces into files that are there, force them to the disk, and return them if they are to be noted."""
    written = []
    for part, named in held.items():
        file = os.open(folder / f"{part}.safetensors", os.O_WRONLY)
        try:
            for name, (piece, tensor) in named.items():
                data, first = bytes_of(tensor), places[part][name] + piece.elements[0] * tensor.element_size()
                write_at(file, data, first)
                if noted:
                    written.append(Written(part, first, data.nbytes, zlib.crc32(data)))
            os.fsync(file)
        finally:
            os.close(file)
    return written


def _refuse_lost(folder: Path, written: Sequence[Sequence[Written]]) -> None:
    """Raise OSError for a piece that a network file system has lost: its rows would be zeros with a valid checksum."""
    for rank, of_rank in enumerate(written):
        for part, first, nbytes, crc in of_rank:
            name = f"{part}.safetensors"
            if nbytes and zlib.crc32(np.memmap(folder / name, mode="r", offset=first, shape=nbytes).data) != crc:
                raise OSError(errno.EIO, f"the file system has lost what rank {rank} wrote into {name}")


# --- the state of a run


class NotSavedError(OSError):
    """A checkpoint could not be written; the earlier ones are still there."""


@dataclass(eq=False)
class Saver:
    """Saves the state of a run: its Trainer, its History and the random number generators."""

    config: RunConfig
    """With the run's folder `out`."""
    trainer: Trainer
    history: History
    world: World
    """The processes of the run, which save together."""
    on_saved: Callable[[int], None] = lambda step: None
    """Told the step of each checkpoint, once its files are on the disk."""
    say: Callable[[str], None] = lambda line: None
    """Told of old checkpoints that could not be removed."""
    saved_at: int | None = None
    """Step of the last checkpoint."""
    _behind: World | None = None
    _writing: Future[None] | None = None

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, SAVING)

    def save(self, *, background: bool = False) -> None:
        """Save the state after the last step; NotSavedError names the newest checkpoint. No save is in the background.

        Args:
            background: copy the tensors, and let a thread write them; `finish` waits for it, and raises its error.
        """
        tensors, state = {**self.trainer.tensors(), "rng": random_state(self.trainer.device)}, self._state()
        if not background:
            self._write(tensors, state, self.world)
            return
        if self._behind is None:  # the thread's messages must not mix with those of the steps
            self._behind = self.world.fork()
        staged = {
            part: {name: t.detach().to("cpu", copy=True) for name, t in of.items()} for part, of in tensors.items()
        }
        self._writing = self._thread.submit(self._write, staged, state, self._behind)

    def finish(self) -> None:
        """Wait for a save in the background; raise NotSavedError if it failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, tensors: Tensors, state: RunState, world: World) -> None:
        """Write a checkpoint of these tensors, with those of the other processes; then remove old ones."""
        config, held = self.config, self.trainer.pieces(tensors)
        assert config.out is not None
        metrics = config.out / METRICS
        try:
            # the lines before the state's own must not be lost after it, and a file that is gone must not fail the save
            world.first(lambda: metrics.exists() and sync(metrics))
            texts = {"config.toml": config.to_toml(), "state.json": as_json(asdict(state))}
            save_pieces(world, checkpoint_folder(config, state.step), held, texts, {"step": str(state.step)})
        except OSError as error:
            kept = self.saved_at is not None and checkpoint_folder(config, self.saved_at).is_dir()
            there = f"step {self.saved_at} is still there" if kept else "no earlier one is there"
            sentence = f"cannot save {config.out}'s checkpoint of step {state.step}: {error.strerror or error}; {there}"
            raise told(NotSavedError(sentence)) from None
        before, self.saved_at = self.saved_at, state.step
        self.on_saved(state.step)
        if world.rank == 0:
            try:
                prune(config, state, before)
            except OSError as error:  # the state is saved all the same
                reason = error.strerror or error
                self.say(f"cannot remove old checkpoints in {config.out}: {reason}; training continues, they stay")

    def _state(self) -> RunState:
        trainer, history = self.trainer, self.history
        return RunState(
            step=trainer.steps_done,
            sequences=trainer.sequences,
            average_updates=0 if trainer.average is None else trainer.average.updates,
            skipped_in_a_row=history.skipped_in_a_row,
            rewinds=history.rewinds,
            corpus_sha256=trainer.corpus.sha256,
            row=dict(history.records[-1]),
        )
