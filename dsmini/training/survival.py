"""The survival of a run: its events, the watch over its processes, and the comparison of what they hold alike."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dsmini.config import RunConfig
from dsmini.distributed.heartbeat import Heartbeat
from dsmini.distributed.meeting import held_by_launcher, store_client, told
from dsmini.distributed.world import World
from dsmini.training.events import EventLog, log_path, put_aside_crash_loops, read_events
from dsmini.training.spikes import Spikes
from dsmini.training.trainer import Trainer


class Survival:
    """The events of one attempt of a run, and the watch over it."""

    def __init__(self, config: RunConfig, world: World) -> None:
        assert config.out is not None
        self.config, self.world, self.folder = config, world, config.out
        self.attempt, self.quarantined = world.first(self._look_back)
        self.log = EventLog(log_path(self.folder, world.rank), self.attempt)
        self.spikes = Spikes()
        self.heartbeat: Heartbeat | None = None
        self.step = 0
        self.begun = False

    def _look_back(self) -> tuple[int, list[Any]]:
        """Return the number of this attempt, and the checkpoints that no attempt survived, which are put aside."""
        before = read_events(self.folder)
        attempt = 1 + max((event["attempt"] for event in before), default=0)
        return attempt, put_aside_crash_loops(self.config, EventLog(log_path(self.folder), attempt), before)

    def note(self, event: str, step: int, **fields: Any) -> None:
        """Log an event of the whole run, once."""
        if self.world.rank == 0:
            self.log.write(event, step, **fields)

    def begin(self, step: int) -> None:
        """Log the start of this attempt, once, from the checkpoint of a step or from none."""
        self.step = step
        if not self.begun:
            self.begun, parallel = True, self.config.parallel
            dp = parallel.parts(self.world.size) // parallel.ep
            layout = {"pp": parallel.pp, "dp": dp, "ep": parallel.ep}
            self.note("started", step, world_size=self.world.size, layout=layout)

    def phase(self, name: str) -> None:
        """Tell the others that the main thread moved: forward, backward, optimizer, between, validating, saving."""
        if self.heartbeat is not None:
            self.heartbeat.beat(self.step, name)

    def after_step(self, trainer: Trainer, seconds: float) -> None:
        """Log a step, and compare replicas from time to time.

        Raises: ArithmeticError for replicas that differ.
        """
        self.step = trainer.steps_done
        self.note("step", self.step, seconds=seconds)
        self.phase("between")
        every = self.config.parallel.check_replicas
        if every and self.step % every == 0:
            self.check_replicas(trainer)

    def check_replicas(self, trainer: Trainer) -> None:
        """Compare what several ranks hold alike, bit for bit.

        Raises: ArithmeticError on all ranks, naming those that differ.
        """
        if self.world.size == 1:
            return
        from dsmini.distributed.replicas import unequal_replicas

        ranks, words = unequal_replicas(self.world, trainer.held_alike())
        if words:
            self.note("corrupted", self.step, rank=ranks)
            raise told(
                ArithmeticError(
                    f"after step {self.step} {words}: a bit flipped in memory; the run continues from its last "
                    f"checkpoint with --resume {self.folder}"
                )
            )

    def rewound(self, step: int) -> None:
        """Log the return to an earlier step."""
        self.step = step
        self.spikes.rewind(step)
        self.note("rewound", step)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch over the processes of the run inside the block."""
        if self.world.size == 1:
            yield
            return

        def on_stall(rank: int, seconds: float, sentence: str) -> None:
            self.log.write("stalled", self.step, rank=rank, sentence=sentence, seconds=seconds)
            words = f"{sentence}; the run continues from its last checkpoint with --resume\n"
            os.write(sys.stderr.fileno(), words.encode())  # the main thread may hold the lock of print

        def on_lost() -> None:
            if held_by_launcher():
                if self.world.rank == 0:
                    print("the launcher has ended, so the run is saved and stops", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)

        timeout, store = self.config.parallel.timeout, store_client("heartbeat", self.config.parallel.timeout)
        with Heartbeat(self.world.rank, self.world.size, store, timeout, on_stall, on_lost) as self.heartbeat:
            try:
                yield
            finally:
                self.heartbeat = None
