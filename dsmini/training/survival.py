"""The survival of a run, and its notes on the way: events, the watchdog, replicas, spikes, injected faults.

TrainingRun calls it at every phase. What each part does is in the files of dsmini/distributed/ that are named here.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dsmini.config import RunConfig
from dsmini.distributed.chaos import ChaosPlan, ChaosRequest
from dsmini.distributed.events import EventLog, log_path, read_events
from dsmini.distributed.faults import Chaos
from dsmini.distributed.quarantine import leave_out_crash_loops
from dsmini.distributed.spikes import Spikes
from dsmini.distributed.stages import ranks_of_stages
from dsmini.distributed.world import World
from dsmini.training.trainer import Trainer


class Survival:
    """The events of one attempt of a run, and the watch over it.

    Args:
        chaos: faults to inject on purpose; None: none.
    """

    def __init__(self, config: RunConfig, world: World, folder: Path, chaos: ChaosRequest | None = None) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.attempt, self.quarantined = world.first(self._look_back)
        self.log = EventLog(log_path(folder, world.rank), self.attempt)
        self.spikes = Spikes()
        self.watchdog: Any = None
        """The Watchdog, where there are other processes."""
        self.chaos: Chaos | None = None
        if chaos is not None:
            last = ranks_of_stages(config.parallel)[-1]
            parts = config.parallel.parts(world.size)
            plan = ChaosPlan.from_seed(
                *(chaos.seed, world.size, config.train.steps, chaos.mean_steps, chaos.kinds),
                with_loss=range(last * parts, (last + 1) * parts),
            )
            self.chaos = Chaos(plan, world.rank, folder, self.log)
        self.step = 0
        self.begun = False

    def _look_back(self) -> tuple[int, list[Path]]:
        """Return the number of this attempt, and the checkpoints that no attempt survived, which are put aside."""
        before = read_events(self.folder)
        attempt = 1 + max((event.attempt for event in before), default=0)
        return attempt, leave_out_crash_loops(self.folder, before, EventLog(log_path(self.folder), attempt))

    def note(self, event: str, step: int, **fields: Any) -> None:
        """Log an event of the whole run, once."""
        if self.world.rank == 0:
            self.log.write(event, step, **fields)

    def begin(self, step: int) -> None:
        """Log the start of this attempt, once, from the checkpoint of a step or from none."""
        self.step = step
        if self.begun:
            return
        self.begun = True
        parallel = self.config.parallel
        dp = parallel.parts(self.world.size) // parallel.ep
        layout = {"pp": parallel.pp, "dp": dp, "ep": parallel.ep}
        self.note("started", step, world_size=self.world.size, layout=layout)

    def phase(self, name: str) -> None:
        """Tell that a phase begins: starting, forward, backward, optimizer, between, validating, save:NAME.

        Raises: whatever fault is due.
        """
        if self.watchdog is not None:
            self.watchdog.beat(step=self.step, phase="saving" if name.startswith("save:") else name)
        if self.chaos is not None:
            self.chaos.at(name, self.step + 1)

    def loss_factor(self) -> float:
        """Return what this rank's loss is multiplied by: 1.0, but for a fault."""
        return 1.0 if self.chaos is None else self.chaos.loss_factor(self.step + 1)

    def after_step(self, trainer: Trainer, seconds: float) -> None:
        """Log a step, inject what is due between two, and compare replicas from time to time.

        Raises: ArithmeticError for replicas that differ.
        """
        self.step = trainer.steps_done
        self.note("step", self.step, seconds=seconds)
        self.phase("between")
        if self.chaos is not None:
            self.chaos.flip(
                self.step + 1, [(name, trainer.ranks.local(p)) for name, p in trainer.model.named_parameters()]
            )
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

        unequal = unequal_replicas(self.world, trainer.replicas())
        if unequal is not None:
            self.note("corrupted", self.step, rank=unequal.ranks)
            raise self.world.told(
                ArithmeticError(
                    f"after step {self.step} {unequal}: a bit flipped in memory; the run continues from its last "
                    f"checkpoint with --resume {self.folder}"
                )
            )

    @contextmanager
    def timed(self, event: str) -> Iterator[None]:
        """Log an event of the last step with the seconds of the block, unless it raises."""
        start = time.perf_counter()
        yield
        self.note(event, self.step, seconds=time.perf_counter() - start)

    def rewound(self, step: int, seconds: float) -> None:
        """Log the return to an earlier step."""
        self.step = step
        self.spikes.rewind(step)
        self.note("rewound", step, seconds=seconds)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch over the processes of the run inside the block."""
        with ExitStack() as stack:
            if self.world.size > 1:
                self.watchdog = stack.enter_context(self._watchdog())
            try:
                yield
            finally:
                self.watchdog = None

    def _watchdog(self) -> Any:
        from dsmini.distributed.stalls import Limits, Stall
        from dsmini.distributed.watchdog import Watchdog, watchdog_store

        def on_stall(stall: Stall) -> None:
            if stall.speaker == self.world.rank or stall.kind == "store":
                self.log.write("stalled", self.step, rank=stall.rank, sentence=stall.sentence, seconds=stall.seconds)
                sentence = f"{stall.sentence}; the run continues from its last checkpoint with --resume"
                print(sentence, file=sys.stderr, flush=True)

        def on_lost() -> None:
            if store_rank is None:
                if self.world.rank == 0:
                    print("the launcher has ended, so the run is saved and stops", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)

        host, port, store_rank = self.world.store_address()
        limits = Limits(timeout=self.config.parallel.timeout)
        prefix = f"attempt {self.world.attempt}"
        store = watchdog_store(host, port, prefix)
        return Watchdog(
            self.world.rank, self.world.size, store, limits, on_stall, on_lost=on_lost, store_rank=store_rank
        )
