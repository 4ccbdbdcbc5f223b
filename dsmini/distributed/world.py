"""The processes of a run, and what they agree on. `joined` makes the group of all that a launcher started.

An error that all ranks would report is reported once: meeting.py. One that only some meet (a full disk on one machine)
is raised by all of them together, and names the ranks. A rank that dies takes the others with it: no group of gloo or
NCCL survives the loss of a member. Each ends with status 1, and whoever started them starts them all again.

The heartbeat is a thread in each process that tells the others every second that it lives, and ends a run that stands
still.

gloo and NCCL name nobody when a rank stops: the others wait until the time-out of the group. Here each rank puts a
heartbeat into the store: the step, the phase, and the line that its main thread is at. Two rules find the culprit:

    a rank is silent          the next rank notices, each watching the one before it
    all ranks stand still     rank 0 notices. The culprit is a rank outside a collective, if there is one; else the one
                              with the fewest steps, then the one whose place in the code is the rarest

Then every process ends by os._exit, so that torchrun can start all again: no exception can end a main thread that waits
in C++. As long as one rank moves, or is in a phase that may take long, there is no alarm. Times are durations that each
process measures on its own: clocks of different hosts are never compared.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dsmini.config.fields import plain
from dsmini.console.command import interruptible
from dsmini.distributed.meeting import TOLD, held_by_launcher, launched, meet, store_client, told
from dsmini.machine import cores, pick_device
from dsmini.reading import UnreadableError

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "Application timeout", "gloo")
"""Parts of the messages of gloo, whose errors have no type, for a rank that died or stood still."""
KINDS = (OSError, UnreadableError, ValueError, ArithmeticError, MemoryError)
"""Errors that keep their type on the way to other ranks; any other becomes a RuntimeError."""


@dataclass(kw_only=True)
class World:
    """All processes of a run. They call its methods in the same order. One process has nobody to ask."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Group to ask in; None: the default one. A background thread needs its own."""

    def any(self, flag: bool) -> bool:
        """Return True on all ranks if the flag is True on one."""
        if self.size == 1:
            return flag
        highest = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        return bool(highest)

    def first(self, work: Callable[[], T]) -> T:
        """Run work on rank 0 alone; return its result, or raise its error, on all."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [_outcome(work) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        result, error = outcome[0]
        if error is not None:
            raise told(error)
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Run work on all ranks; an error of some is raised by all, and names them."""
        if self.size == 1:
            return work()
        result, mine = _outcome(work)
        errors = self.gather(mine)
        if any(errors):
            raise told(_joint(errors))
        return result

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        values: list[T] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def refuse_unequal(self, options: Mapping[str, object]) -> None:
        """Refuse processes that were started with other options than rank 0."""
        first, *others = self.gather({name: plain(value) for name, value in options.items()})
        for rank, own in enumerate(others, 1):
            if unequal := [f"{name} ({own[name]}, not {first[name]})" for name in own if own[name] != first[name]]:
                sentence = (
                    f"rank {rank} was started with another {', '.join(unequal)} than rank 0; start all processes with "
                    "the same command, where they see the same files"
                )
                raise told(ValueError(sentence))

    def fork(self) -> "World":
        """Return the same processes with messages of their own, for another thread. All ranks call it together."""
        return self if self.size == 1 else replace(self, group=dist.new_group(backend="gloo"))


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return the result of work, and the error that it raised in a form for other ranks."""
    try:
        return work(), None
    except Exception as error:
        if tells_of_loss(error):  # nobody is left to ask
            raise
        return None, _portable(error)


def _words(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _portable(error: Exception, words: str = "") -> Exception:
    """Return an error that any process can read: of a type in KINDS or a RuntimeError, with its words or others."""
    kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
    words = words or _words(error)
    if kind is RuntimeError and type(error) is not RuntimeError:
        words = f"{type(error).__name__}: {words}"
    return OSError(getattr(error, "errno", None), words) if kind is OSError else kind(words)


def _joint(errors: Sequence[Exception | None]) -> Exception:
    """Return one error for those of some ranks. Ranks with the same words are named together."""
    by_words: dict[str, list[int]] = {}
    for rank, error in enumerate(errors):
        if error is not None:
            by_words.setdefault(_words(error), []).append(rank)
    first = next(error for error in errors if error is not None)
    if len(by_words[_words(first)]) == len(errors):
        return first
    named = (f"rank{'s' if ranks[1:] else ''} {', '.join(map(str, ranks))}: {w}" for w, ranks in by_words.items())
    return _portable(first, "; ".join(named))


def own_share(device: str, threads: int | None) -> torch.device:
    """Return the device of this process, and set the number of its threads; None: torch's choice.

    The processes of a machine share its CPUs. Each has a GPU of its own.
    """
    local, processes = os.environ.get("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local is not None and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    if processes > 1:
        share = max(1, cores() // processes)
        threads = min(threads or share, share)
    if threads is not None:
        torch.set_num_threads(threads)
    return pick_device(device)


@contextlib.contextmanager
def joined(
    timeout: float = 300.0, device: torch.device | None = None, *, longest_wait: float | None = None
) -> Iterator[World]:
    """Yield the World of all processes that a launcher started, and leave it at the end; of one process without one.

    Args:
        timeout: seconds in which all must come.
        device: of this process; on a GPU, tensors on it are sent by NCCL, and those on the CPU by gloo.
        longest_wait: seconds after which a collective fails in which another rank is missing; None: timeout.

    Raises: ValueError if one does not come, or cannot be reached. A rank that loses another ends here, with status 1.
    """
    rank, size = launched()
    if size == 1:
        yield World()
        return
    meet(timeout)
    backend = "gloo"
    if device is not None and device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    _connect(backend, timeout, longest_wait or timeout)
    try:
        yield World(rank=rank, size=size)
    except (Exception, KeyboardInterrupt) as error:
        if TOLD not in getattr(error, "__notes__", ()) and (reason := tells_of_loss(error)):
            words = f"rank {rank}: lost another process ({reason}); a run of dsmini.train continues with --resume"
            print(words, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # without the destructors that wait for, or abort after, a group that is dead
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect(backend: str, timeout: float, longest_wait: float) -> None:
    """Make the default group. Its store has a prefix for each attempt: addresses of dead processes stay in it."""
    rank, size = launched()
    longest = timedelta(seconds=longest_wait)

    def connect() -> None:
        store = store_client("group", timeout)
        store.set_timeout(longest)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longest)

    try:
        interruptible(connect, timeout)
    except (RuntimeError, TimeoutError) as error:
        reason = (str(error).splitlines() or ["no answer"])[0]
        raise ValueError(
            f"the {size} processes met, but cannot connect to each other: {reason}; check that the network lets them "
            "through, and name its interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        ) from None


def tells_of_loss(error: BaseException) -> str | None:
    """Return the words by which an error tells that another rank died or stood still; None for another error."""
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error, dist.DistError):  # of NCCL, or of the store
        return type(error).__name__
    found = next((part for part in LOST if part in str(error)), None)
    cause = error.__cause__ or error.__context__  # torch's pipeline raises an error of its own
    return found if found or cause is None else tells_of_loss(cause)


# --- the heartbeat


STALLED = 75
"""Exit status of every process of a run that stood still: a temporary failure, as sysexits.h has it."""
LONG_PHASES: tuple[str, ...] = ("starting", "saving", "validating")
LONG = 900.0
"""Seconds that the main thread may stand still in one of these phases; in any other it is the time-out."""
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
    """The main thread is inside a collective."""
    where: str
    """Place of the main thread, as FILE:LINE FUNCTION."""

    @property
    def at(self) -> str:
        """Its place in words."""
        return f"step {self.step}, {self.phase}, in {self.where}"


class Heartbeat:
    """The watch of one rank over the others. Its thread runs inside `with`.

    Args:
        store: a client that nobody else uses, for a call in it may wait.
        timeout: seconds without a sign of life, or in one phase, that are a stall.
        on_stall: told of a stall by the rank that found it: the culprit, its seconds, and a sentence for people.
        on_lost: told that the process that holds the store has ended.
        period: seconds between two heartbeats.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: "Store",
        timeout: float,
        on_stall: Callable[[int, float, str], None],
        on_lost: Callable[[], None] = lambda: None,
        period: float = 1.0,
    ) -> None:
        self.rank, self.size, self.store, self.timeout, self.period = rank, size, store, timeout, period
        self.on_stall, self.on_lost = on_stall, on_lost
        self.step, self.phase, self.moves, self.seen = 0, "starting", 0, -1
        self.count, self.still, self.silent = 0, 0.0, 0.0
        self.last: Beat | None = None
        """The newest message of the rank before this one."""
        self.main = threading.main_thread().ident
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def beat(self, step: int, phase: str) -> None:
        """Tell that the main thread has moved, and to which step and phase."""
        self.step, self.phase = step, phase
        self.moves += 1

    def __enter__(self) -> "Heartbeat":
        self._publish(self.phase)  # from the start, so that a rank that is stopped at once is known
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closed.set()
        with suppress(RuntimeError):  # the store has ended
            if error is not None and self.store.check(["stall"]):  # another process has ended for it just before
                os._exit(STALLED)
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
            os._exit(STALLED)
        except RuntimeError:
            if not self.closed.is_set():
                self.on_lost()

    def exchange(self, passed: float) -> None:
        """Publish a heartbeat, read those of others, and end all processes of a run that stands still."""
        self.still = 0.0 if self.moves != self.seen else self.still + passed
        self.seen = self.moves
        self._publish(self.phase)
        if self.store.check(["stall"]):
            self.store.add("heard", 1)
            os._exit(STALLED)
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
        who = f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()})"
        beat = Beat(self.rank, who, self.count, self.step, phase, self.still, waits, where)
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
            os._exit(STALLED)


@contextmanager
def watched(world: World, timeout: float, log: Callable[[int, float, str], None]) -> Iterator[Heartbeat | None]:
    """Watch over the processes of a run inside the block; a single one has nobody to watch.

    A stall is logged and told on the standard error. Once the launcher has ended, this process is asked to stop.

    Args:
        timeout, log: as timeout and on_stall of a Heartbeat.
    """
    if world.size == 1:
        yield None
        return

    def on_stall(rank: int, seconds: float, sentence: str) -> None:
        log(rank, seconds, sentence)
        words = f"{sentence}; the run continues from its last checkpoint with --resume\n"
        os.write(sys.stderr.fileno(), words.encode())  # the main thread may hold the lock of print

    def on_lost() -> None:
        if held_by_launcher():
            if world.rank == 0:
                print("the launcher has ended, so the run is saved and stops", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    store = store_client("heartbeat", timeout)
    with Heartbeat(world.rank, world.size, store, timeout, on_stall, on_lost) as heartbeat:
        yield heartbeat


def place_of(thread: int | None) -> tuple[str, bool]:
    """Return where a thread is, as FILE:LINE FUNCTION, and whether it waits in a collective of torch.

    The place is the innermost line outside torch and other libraries, or the innermost of all.
    """
    frame = sys._current_frames().get(thread or -1)
    frames = []
    while frame is not None:
        frames.append((Path(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    if not frames:
        return "an unknown place", False
    libraries = {"site-packages", "dist-packages", Path(sysconfig.get_path("stdlib")).name}
    ours = next((one for one in frames if one[0].is_absolute() and not libraries & {*one[0].parts}), frames[0])
    inner = next(one[0].parts for one in frames if one[0].name != "_ops.py")
    waits = "distributed" in inner and "torch" in inner and "tensor" not in inner  # a DTensor computes in its own
    return f"{'/'.join(ours[0].parts[-3:])}:{ours[1]} {ours[2]}", waits
