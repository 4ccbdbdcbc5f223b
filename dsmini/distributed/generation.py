"""Several processes of dsmini.generate share the experts of one model, the prompts, and the end.

All run the same command. Rank 0 reads the prompts and shows the texts; the others compute the visits to their experts.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsmini.checkpoint.run_folder import is_model_folder
from dsmini.checkpoint.trained_model import model_checkpoint
from dsmini.config.fields import require
from dsmini.distributed.decode import Agreement, ExpertShare
from dsmini.distributed.meeting import launched, told
from dsmini.distributed.world import World, device_of_rank, joined, threads_of_rank
from dsmini.machine import pick_device
from dsmini.nn import Transformer
from dsmini.reading import brief, read_json

TIMEOUT = 300.0
"""Seconds after which a process that does not answer ends the others."""
LONGEST_WAIT = 24 * 3600.0
"""The same in a conversation, where all wait for a person."""
Signals = Callable[[], contextlib.AbstractContextManager[Any]]
"""Hears signals for the time of a block; its `numbers` are those that came."""


@dataclass(kw_only=True)
class Shared:
    """A process of dsmini.generate: alone, or one of several that share a model."""

    world: World = field(default_factory=World)
    device: str
    """Device of this process."""
    share: ExpertShare | None = None
    agree: Agreement | None = None
    """Compares the tokens of each step; None for a single process."""
    signals: Signals

    def load(self, path: Path, average: bool, say: Callable[[str], None], load: Callable[..., Any]) -> Any:
        """Return load(path, holding=..., verified=...), of whose result the first is a model. Its experts are divided.

        Args:
            say: told about each damaged checkpoint that is passed over.
        """
        share, world = self.share, self.world
        if share is None:
            return load(path)

        def whole_folder() -> Path:  # compared with its checksums once
            return path if is_model_folder(path) else model_checkpoint(path, average=average, say=say).folder

        whole = world.first(whole_folder)
        loaded = world.together(lambda: load(whole, holding=share, verified=True))
        model: Transformer = loaded[0]
        share.connect(model)
        return loaded

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Let a signal to any process end a generation on all of them, after the same step."""
        if self.agree is None:
            yield
            return
        with self.signals() as asked:
            self.agree.stop = lambda: bool(asked.numbers)
            yield


@contextlib.contextmanager
def sharing(
    command: object, device: str, placement: Path | None, signals: Signals, *, waits: bool = False
) -> Iterator[Shared]:
    """Join the processes that a launcher started, and yield what they share; without a launcher, a process alone.

    Args:
        command: must be equal on all.
        device: as dsmini.generate takes it.
        placement: file for `read_placement`.
        waits: a person is asked meanwhile.

    Raises: ValueError if the processes cannot be reached, or were started with unequal commands.
    """
    if launched()[1] == 1:
        require(
            placement is None,
            f"--placement {placement} divides experts among processes, and there is one; start torchrun "
            "--nproc-per-node 2 -m dsmini.generate, or leave it out",
        )
        yield Shared(device=device, signals=signals)
        return
    device = device_of_rank(device)
    if threads := threads_of_rank(None):
        torch.set_num_threads(threads)
    with joined(TIMEOUT, pick_device(device), longest_wait=LONGEST_WAIT if waits else None) as world:
        try:
            commands = world.gather(repr(command))
            unequal = [rank for rank, other in enumerate(commands) if other != commands[0]]
            require(
                not unequal,
                f"rank {unequal[0] if unequal else 0} was started with other flags than rank 0; start all processes "
                "with the same command",
            )
            experts = None if placement is None else world.first(lambda: read_placement(placement))
            share = ExpertShare(world, experts)
            agree = Agreement(world, share, lambda: False)
            yield Shared(world=world, device=device, share=share, agree=agree, signals=signals)
        except ValueError as error:  # of the model, the prompts and the flags, which are the same on all
            raise told(error) from None


def read_placement(path: Path) -> list[list[int]]:
    """Read the expert at each place, [layers, places], from a JSON file: this table, or an object with it as "experts".

    Raises: ValueError for anything else.
    """
    content = read_json(path)
    table: Any = content.get("experts") if isinstance(content, dict) else content
    good = isinstance(table, list) and all(
        isinstance(row, list) and all(type(expert) is int for expert in row) for row in table
    )
    require(good, f"{path} holds {brief(table)}, want a list of layers, each a list of experts' numbers")
    return table
