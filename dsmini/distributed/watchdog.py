"""The watchdog of a rank: it tells the others every second that the rank lives, and ends a run that stands still.

gloo and NCCL name nobody when a rank stops: the others wait until the time-out of the group, half an hour by default.
Here a thread in each process puts a heartbeat into a store: the step, the phase, and the line that the main thread is
at. The lowest rank that lives reads all of them, and stalls.py finds the rank that the others wait for. Then every
process says so to its `on_stall`, and ends itself by os._exit, so that torchrun can start all again: no exception can
end a main thread that waits in C++.

The store must be a client that nobody else uses, for a call in it may wait. Its host is one of the processes: where
that one is stopped the store stops answering, which a second thread notices.

    with Watchdog(rank, world_size, watchdog_store(host, port, "attempt-2"), limits, on_stall) as watchdog:
        watchdog.beat(step=14, phase="backward")        # in the main thread, as it moves
        with watchdog.waiting():                        # inside it the main thread waits for other ranks
            work.wait()
"""

import atexit
import os
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from dsmini.distributed.stalls import ENDED, Heartbeat, Limits, SignOfLife, Stall, find_stall, has_ended, is_silent

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

STALLED = 75
"""Exit status of every process of a run that stood still: a temporary failure, as sysexits.h has it."""
GRACE = 5.0
"""Longest time that the rank that found a stall waits for the others to hear of it, in seconds."""
PACKAGE = Path(__file__).parents[1]
LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", sysconfig.get_path("stdlib") + os.sep)
"""Parts of the paths of libraries, whose frames do not say where a training is."""


def watchdog_store(host: str, port: int, prefix: str) -> "Store":
    """Return a store of its own for a watchdog: another client of the store that listens there.

    Args:
        prefix: differs for each attempt, for the store may outlive one.
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    return PrefixStore(f"watchdog/{prefix}", client)


class Watchdog:
    """Watches over a run from one of its ranks. Threads run from `start`, or inside `with`, to `close`.

    Args:
        store: a client for this watchdog alone, such as `watchdog_store`.
        limits: the same on all ranks.
        on_stall: told once about a stall, in a thread, before the process ends without flushing its files.
            `stall.speaker` is the rank that should tell people; where the store is silent, each rank speaks.
        on_lost: told once, in a thread, that the store has ended, and the watch with it.
        period: seconds between two heartbeats.
        store_rank: the rank whose process holds the store; None for a process outside the run.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: "Store",
        limits: Limits,
        on_stall: Callable[[Stall], None],
        *,
        on_lost: Callable[[], None] = lambda: None,
        period: float = 1.0,
        status: int = STALLED,
        store_rank: int | None = 0,
    ) -> None:
        self.rank, self.world_size, self.store, self.limits = rank, world_size, store, limits
        self.on_stall, self.on_lost = on_stall, on_lost
        self.period, self.status, self.store_rank = period, status, store_rank
        self.lost_store = False
        """True once the store has ended, and the watchdog with it."""
        self._step, self._phase, self._moves, self._waiting = 0, "starting", 0, 0
        self._signs = {other: SignOfLife(heartbeat=None, silent=0.0) for other in range(world_size)}
        self._exchanged = 0
        self._still = 0.0
        self._main = threading.main_thread().ident
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=work, name=f"watchdog {name}", daemon=True)
            for name, work in (("exchange", self._exchange), ("store", self._watch_store))
        ]

    def beat(self, *, step: int | None = None, phase: str | None = None) -> None:
        """Tell that the main thread has moved, and to which step and phase."""
        self._step = self._step if step is None else step
        self._phase = self._phase if phase is None else phase
        self._moves += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the block as one that waits for other ranks. Collectives called by torch's functions are seen anyway."""
        self._waiting += 1
        self._moves += 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._moves += 1

    def start(self) -> None:
        """Start to watch."""
        atexit.register(self.close)  # a thread inside the store would abort the interpreter at its end
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop to watch; the others will not miss this rank."""
        atexit.unregister(self.close)
        self._closed.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=GRACE)

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _exchange(self) -> None:
        """Publish, read and judge, once a period; the first thread."""
        try:
            moves, elapsed = -1, _Elapsed(self.period)
            while not self._closed.is_set():
                passed = elapsed.since_last()
                self._still = 0.0 if moves != self._moves else self._still + passed
                moves = self._moves
                self._publish(self._phase)
                self._read(passed)
                self._judge()
                self._exchanged += 1
                self._closed.wait(self.period)
            self._publish(ENDED)
        except RuntimeError:  # the process that holds the store has ended
            self.lost_store = True
            if not self._closed.is_set():
                self.on_lost()

    def _publish(self, phase: str) -> None:
        where, waits = place_of(self._main)
        beat = Heartbeat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            count=self._exchanged,
            step=self._step,
            phase=phase,
            still=self._still,
            waiting=self._waiting > 0 or waits,
            where=where,
        )
        self._signs[self.rank] = SignOfLife(heartbeat=beat, silent=0.0)
        self.store.set(str(self.rank), beat.to_json())

    def _read(self, passed: float) -> None:
        """Read the heartbeats of the ranks below, up to the first that lives; of all ranks if none does."""
        for other in range(self.rank):
            self._look_at(other, passed)
            if self._lives(other):
                return
        for other in range(self.rank + 1, self.world_size):
            self._look_at(other, passed)

    def _look_at(self, other: int, passed: float) -> None:
        old = self._signs[other]
        new = Heartbeat.from_json(self.store.get(str(other))) if self.store.check([str(other)]) else None
        silent = old.silent + passed if new == old.heartbeat else 0.0
        self._signs[other] = SignOfLife(heartbeat=new, silent=silent)

    def _lives(self, other: int) -> bool:
        sign = self._signs[other]
        return not has_ended(sign) and not is_silent(sign, self.limits)

    def _is_speaker(self) -> bool:
        return not any(self._lives(other) for other in range(self.rank))

    def _judge(self) -> None:
        if self.store.check(["stall"]):
            stall = Stall.from_json(self.store.get("stall"))
            self.store.set(f"heard-{self.rank}", "")
            self._end(stall)
        elif self._is_speaker() and (stall := find_stall(self._signs, self.limits, self.rank)):
            self.store.set("stall", stall.to_json())
            self._end(stall)

    def _watch_store(self) -> None:
        """Notice that a call of the store does not return while the main thread stands still; the second thread."""
        exchanged, moves, silent, still, elapsed = -1, -1, 0.0, 0.0, _Elapsed(self.period)
        while not self._closed.wait(self.period) and not self.lost_store:
            passed = elapsed.since_last()
            silent = 0.0 if exchanged != self._exchanged else silent + passed
            still = 0.0 if moves != self._moves else still + passed
            exchanged, moves = self._exchanged, self._moves
            stalled = silent > self.limits.timeout and still > self.limits.of(self._phase)
            if stalled and self.store_rank is not None:
                self._end(self._store_stall(self.store_rank, silent))

    def _store_stall(self, rank: int, silent: float) -> Stall:
        last = self._signs[rank].heartbeat
        if last is None:
            return Stall(kind="store", rank=rank, seconds=silent, speaker=self.rank)
        return Stall(kind="store", rank=rank, host=last.host, pid=last.pid, seconds=silent, speaker=self.rank)

    def _end(self, stall: Stall) -> None:
        """Tell about a stall and end this process once the others have heard: else they only see it close its pipes."""
        if not self._ending.acquire(blocking=False) or self._closed.is_set():
            return
        try:
            teller = threading.Thread(target=self.on_stall, args=(stall,), daemon=True)
            teller.start()
            teller.join(timeout=GRACE)  # the main thread may hold a lock that it needs, such as that of a file
            if stall.kind != "store":
                self._wait_for_others(stall)
        finally:
            os._exit(self.status)

    def _wait_for_others(self, stall: Stall) -> None:
        knowing = (self.rank, stall.speaker)
        others = [rank for rank, sign in self._signs.items() if rank not in knowing and not has_ended(sign)]
        there = [f"heard-{rank}" for rank in others if stall.kind != "silent" or rank != stall.rank]
        until = time.monotonic() + GRACE
        with suppress(RuntimeError):
            while time.monotonic() < until and not self.store.check(there):
                time.sleep(0.05)


class _Elapsed:
    """Time since the last look, without the time in which this process itself was stopped."""

    def __init__(self, period: float) -> None:
        self.most, self.last = 3 * period, time.monotonic()

    def since_last(self) -> float:
        now = time.monotonic()
        passed, self.last = min(now - self.last, self.most), now
        return passed


def place_of(thread: int | None) -> tuple[str, bool]:
    """Return where a thread is, as FILE:LINE FUNCTION, and whether it waits in a collective of torch.

    The place is the innermost line outside torch and other libraries, or the innermost of all.
    """
    frame = sys._current_frames().get(thread if thread is not None else -1)
    if frame is None:
        return "an unknown place", False
    frames = [frame]
    while frames[-1].f_back is not None:
        frames.append(frames[-1].f_back)
    ours = next((one for one in frames if _is_ours(one)), frame)
    return _in_words(ours), _waits(frames)


def _waits(frames: list[FrameType]) -> bool:
    """Return whether the innermost frame is one of torch.distributed; a DTensor computes in its own, too."""
    inner = next((one.f_code.co_filename for one in frames if not one.f_code.co_filename.endswith("torch/_ops.py")), "")
    return f"torch{os.sep}distributed{os.sep}" in inner and f"distributed{os.sep}tensor{os.sep}" not in inner


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    foreign = name.startswith("<") or any(part in name for part in LIBRARIES)
    return name.startswith(f"{PACKAGE}{os.sep}") or not foreign


def _in_words(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    inside = path.is_relative_to(PACKAGE.parent)
    short = path.relative_to(PACKAGE.parent) if inside else Path(*path.parts[-2:])
    return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
