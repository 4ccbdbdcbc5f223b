"""The heartbeat: a thread in each process tells the others every second that it lives, and ends a run that stalls.

gloo and NCCL name nobody when a rank stops: the others wait until the time-out of the group. Here each rank puts a
heartbeat into the store: the step, the phase, and the line that its main thread is at. Two rules find the culprit:

    a rank is silent          the next rank notices, each watching the one before it
    all ranks stand still     rank 0 notices. The culprit is a rank that waits for no other, if there is one; else the
                              one with the fewest steps, then the one whose place in the code is the rarest

A rank moves if its main thread enters a phase, or if the stack of that thread, or of the one that saves, has changed
since the last heartbeat. So the watch needs no help from reading, validating or saving, and a phase may take as long as
it likes: a single call may not. As long as one rank moves there is no alarm.

Then every process prints its stacks and ends by os._exit, so that torchrun can start all again: no exception can end a
main thread that waits in C++. Nor does one hear there that another rank has failed, so its heartbeat ends it too.
Times are durations that each process measures on its own: clocks of different hosts are never compared.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch

from dsmini.console.command import interruptible
from dsmini.distributed.failure import STALLED, say_failure, say_lost, write
from dsmini.distributed.meeting import GRACE, held_by_launcher, is_told, store_client
from dsmini.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

LONG_PHASES, LONG = ("compiling", "saving"), 900.0
"""Phases with single calls that take long: a compiler, and a file that is forced to the disk. They may take this
number of seconds, or the time-out if that is more."""
SAVING = "saving"
"""Name of the thread that writes a checkpoint while the main thread takes steps."""
ENDED = "ended"
"""Phase of a rank that does not watch any more."""


class Beat(NamedTuple):
    """One rank's message to the others."""

    rank: int
    who: str
    """The rank, with its process and host, for people."""
    count: int
    """Number of this message: a new one is a sign of life."""
    step: int
    phase: str
    still: float
    """Seconds since the main thread last moved."""
    waits: bool
    """The main thread waits for other ranks."""
    where: str
    """Place of the main thread, as FILE:LINE FUNCTION."""

    @property
    def at(self) -> str:
        """Its place in words."""
        return f"step {self.step}, {self.phase}, in {self.where}"


@dataclass(eq=False)
class Heartbeat:
    """The watch of one rank over the others. Its thread runs inside `with`."""

    rank: int
    size: int
    store: "Store"
    """A client that nobody else uses, for a call in it may wait."""
    timeout: float
    """Seconds without a sign of life, or without a move, that are a stall."""
    on_stall: Callable[[int, float, str], None]
    """Told of a stall by the rank that found it: the culprit, its seconds, and a sentence for people."""
    on_lost: Callable[[], None] = lambda: None
    """Told that the process that holds the store has ended."""
    computed: Callable[[], bool] = lambda: True
    """Says whether the GPU of this process has finished its work, with that of other ranks in it."""
    period: float = 1.0
    """Seconds between two heartbeats."""
    step: int = 0
    phase: str = "starting"
    moves: int = 0
    seen: object = None
    """Number of moves and stack of the main thread at the last heartbeat."""
    count: int = 0
    still: float = 0.0
    silent: float = 0.0
    last: Beat | None = None
    """The newest message of the rank before this one."""
    lost: float = 0.0
    """Seconds since another rank has failed."""

    def __post_init__(self) -> None:
        self.main: int | None = threading.main_thread().ident
        self.who: str = f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()})"
        self.closed: threading.Event = threading.Event()
        self.thread: threading.Thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        """Tell that the main thread has moved, and to which step and phase."""
        self.step, self.phase, self.moves = step, phase, self.moves + 1

    def __enter__(self) -> "Heartbeat":
        self._publish(self.phase)  # from the start, so that a rank that is stopped at once is known
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closed.set()
        if error is not None:
            say_failure(error)  # before the store, which may not answer
        with suppress(RuntimeError):  # the store has ended
            if error is not None and self.store.check(["stall"]):  # another process has ended for it just before
                self.thread.join(timeout=10 * self.period)  # it may be about to show the stacks
                self._leave()
            if error is not None and not is_told(error) and not self.store.check(["failed"]):
                self.store.set("failed", f"rank {self.rank} has failed")
        self.thread.join(timeout=5 * self.period)

    def _run(self) -> None:
        """Exchange heartbeats once a period."""
        last = time.monotonic()
        try:
            while not self.closed.wait(self.period):
                now = time.monotonic()
                passed, last = min(now - last, 3 * self.period), now  # not the time in which this process was stopped
                longest = self.timeout + 10 * self.period  # more than the grace of `_end`
                interruptible(lambda passed=passed: self.exchange(passed), longest)
            self._publish(ENDED)
        except TimeoutError:
            words = f"the store, held by rank 0 or the launcher, has not answered for {self.timeout:.0f} s"
            self.on_stall(0, self.timeout, f"{words}; its process was stopped, or is cut off")
            self._leave()
        except RuntimeError:
            if not self.closed.is_set():
                self.on_lost()

    def exchange(self, passed: float) -> None:
        """Publish a heartbeat, read those of others, and end all processes of a run that stands still."""
        saving = [thread.ident for thread in threading.enumerate() if thread.name.startswith(SAVING)]
        seen = self.moves, *map(stack_of, [self.main, *saving])
        self.still = 0.0 if seen != self.seen else self.still + passed
        self.seen = seen
        self._publish(self.phase)
        if self.store.check(["stall"]):
            self.store.add("heard", 1)
            self._leave()
        if self.store.check(["failed"]):
            self.lost += passed
            if self.lost > GRACE:  # else the main thread has met it, and ended this process
                say_lost(self.rank, self.store.get("failed").decode())
                os._exit(1)
            return
        before = (self.rank - 1) % self.size
        beat = self._read(before)
        self.silent = 0.0 if beat != self.last else self.silent + passed
        self.last = beat
        if self.silent > self.timeout and not (beat and beat.phase == ENDED):
            who, after = (beat.who, f" after {beat.at}") if beat else (f"rank {before}", "")
            words = f"{who} has given no sign of life for {self.silent:.0f} s; it was stopped or killed{after}"
            self._end(before, self.silent, words)
        if self.rank == 0:
            self._judge([self._read(rank) for rank in range(self.size)])

    def _publish(self, phase: str) -> None:
        where, waits = place_of(self.main)
        self.count += 1
        waits = waits or not self.computed()  # NCCL's collectives are only started; a later copy waits for them
        beat = Beat(self.rank, self.who, self.count, self.step, phase, self.still, waits, where)
        self.store.set(str(self.rank), json.dumps(beat))

    def _read(self, rank: int) -> Beat | None:
        there = self.store.check([str(rank)])
        return Beat(*json.loads(self.store.get(str(rank)))) if there else None

    def _judge(self, read: list[Beat | None]) -> None:
        """End a run of which every rank stands still."""
        beats = [beat for beat in read if beat is not None and beat.phase != ENDED]
        limits = dict.fromkeys(LONG_PHASES, max(self.timeout, LONG))
        if None in read or not beats or any(beat.still <= limits.get(beat.phase, self.timeout) for beat in beats):
            return
        places = Counter(beat.where for beat in beats)
        odd = min(beats, key=lambda beat: (beat.waits, beat.step, places[beat.where], -beat.still))
        words = f"{odd.who} has stood still for {odd.still:.0f} s: {odd.at}; the others wait for it"
        if odd.waits:
            still = min(beat.still for beat in beats)
            words = f"all ranks have waited inside a collective for {still:.0f} s; {odd.who} is the odd one: {odd.at}"
        self._end(odd.rank, odd.still, words)

    def _end(self, culprit: int, seconds: float, words: str) -> None:
        """Tell of a stall, and end this process once the others have heard: else they only see it close its pipes."""
        try:
            if self.store.add("stalls", 1) == 1:
                self.on_stall(culprit, seconds, words)
                self.store.set("stall", "")
                end = time.monotonic() + 5 * self.period
                while time.monotonic() < end and self.store.add("heard", 0) < self.size - 1:
                    time.sleep(0.05)
        finally:
            self._leave()

    def _leave(self) -> NoReturn:
        """Show where all threads of this rank are, and end its process."""
        threads = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"{threads.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        ]
        write(f"stacks of rank {self.rank}, innermost last\n{''.join(stacks)}")
        os._exit(STALLED)


@contextmanager
def watched(world: World, timeout: float, device: torch.device) -> Iterator[None]:
    """Watch over the processes of a run inside the block; a single one has nobody to watch.

    A stall is told on the standard error, and to `world.on_stall`. Once the launcher has ended, this process is asked
    to stop; once rank 0 has, where that held the store, it ends too.

    Args:
        timeout: as that of a Heartbeat.
        device: of this process.
    """
    if world.size == 1:
        yield
        return

    def on_stall(rank: int, seconds: float, sentence: str) -> None:
        world.on_stall(rank, seconds, sentence)
        more = "the run continues from its last checkpoint with --resume; --parallel.timeout allows more time"
        write(f"{sentence}; {more}")

    def on_lost() -> None:
        if held_by_launcher():
            if world.rank == 0:
                print("the launcher has ended, so the run is saved and stops", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        elif not heartbeat.closed.wait(GRACE):  # else the main thread has met it, and ended this process
            say_lost(world.rank, "rank 0, which held the store, has ended")
            os._exit(1)

    def computed() -> bool:
        try:
            return device.type != "cuda" or torch.cuda.default_stream(device).query()
        except RuntimeError:  # the GPU has failed, which the main thread will meet
            return True

    store = store_client("heartbeat", timeout)
    with Heartbeat(world.rank, world.size, store, timeout, on_stall, on_lost, computed) as heartbeat:
        world.beat = heartbeat.beat
        yield


def stack_of(thread: int | None) -> tuple[tuple[str, str, int, str, int], ...]:
    """Return module, file, line, function and instruction of each frame of a thread, the innermost first."""
    frame, frames = sys._current_frames().get(thread or -1), []
    while frame is not None:
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        frames.append((module, code.co_filename, frame.f_lineno, code.co_name, frame.f_lasti))
        frame = frame.f_back
    return tuple(frames)


def place_of(thread: int | None) -> tuple[str, bool]:
    """Return where a thread is, as FILE:LINE FUNCTION, and whether it waits in a collective of torch.

    The place is the innermost line outside torch and Python's library, or the innermost of all.
    """
    stack = stack_of(thread)
    if not stack:
        return "an unknown place", False
    others = {"torch", *sys.stdlib_module_names}
    _, file, line, name, _ = next((of for of in stack if of[0].partition(".")[0] not in others), stack[0])
    inner = next((of[0] for of in stack if of[0] != "torch._ops"), "")
    waits = inner.startswith("torch.distributed.") and not inner.startswith("torch.distributed.tensor.")
    return f"{'/'.join(file.split(os.sep)[-3:])}:{line} {name}", waits
