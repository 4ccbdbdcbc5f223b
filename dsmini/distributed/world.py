"""The processes of a run, and what they agree on. `joined` makes the group of all that a launcher started.

An error that all ranks would report is reported once: meeting.py. One that only some meet (a full disk on one machine)
is raised by all of them together, and names the ranks. A rank that dies takes the others with it: no group of gloo or
NCCL survives the loss of a member. Whoever started them starts them all again. failure.py says how a process ends, and
heartbeat.py finds one that stops without an end.
"""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dsmini.config.fields import plain
from dsmini.console.command import interruptible
from dsmini.distributed.failure import fail, words_of_loss
from dsmini.distributed.meeting import is_told, launched, meet, store_client, told
from dsmini.machine import cores, pick_device
from dsmini.reading import UnreadableError, refusing

T = TypeVar("T")
SHARED_WITHIN = 90.0
"""Seconds in which a new file must be seen on all machines: NFS may take a minute to look again."""
KINDS = (OSError, UnreadableError, ValueError, ArithmeticError, MemoryError)
"""Errors that keep their type on the way to other ranks; any other becomes a RuntimeError."""


@dataclass(kw_only=True)
class World:
    """All processes of a run. They call its methods in the same order. One process has nobody to ask."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Group to ask in; None: the default one. A background thread needs its own."""
    beat: Callable[[int, str], None] = lambda step, phase: None
    """Told of each step and phase that this process enters."""
    on_stall: Callable[[int, float, str], None] = lambda rank, seconds, sentence: None
    """Told of a stall by the process that finds it: the culprit, its seconds, and a sentence for people."""

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

    def share_cores(self, threads: int | None) -> None:
        """Set the number of threads of this process, at most its share of the cores that others may use too.

        Args:
            threads: the number that was asked for; None: torch's choice for a single process, else the share.
        """
        if self.size > 1:
            allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
            mine = socket.gethostname(), allowed  # a launcher may have given each process cores of its own
            share = max(1, cores() // self.gather(mine).count(mine))
            threads = min(threads or share, share)
        if threads is not None:
            torch.set_num_threads(threads)

    def refuse_unshared(self, folder: Path) -> None:
        """Refuse processes that do not see one folder: rank 0 writes a file into it, and all look for it.

        Args:
            folder: folder of the run; where it is still to be made, the nearest one above it is tried.

        Raises: ValueError on all, naming those that do not find it.
        """
        if self.size == 1:
            return

        places = (folder, *folder.parents)

        def leave_a_file() -> tuple[int, Path]:
            level = next(level for level, place in enumerate(places) if place.is_dir())
            with refusing(f"cannot write into {places[level]}", "choose another with --out"):
                return level, Path(tempfile.mkstemp(prefix=".seen-by-all-", dir=places[level])[1])

        level, seen = self.first(leave_a_file)
        end = time.monotonic() + SHARED_WITHIN
        while not (found := (places[level] / seen.name).exists()) and time.monotonic() < end:
            time.sleep(0.1)
        where = self.gather(None if found else socket.gethostname())
        self.first(seen.unlink)
        if any(where):
            ranks = ", ".join(f"{rank} (on {host})" for rank, host in enumerate(where) if host)
            sentence = (
                f"{seen.parent} of rank 0 is not there for rank {ranks}; all processes write its checkpoints, so "
                "name a folder with --out that all machines share"
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
        if words_of_loss(error):  # nobody is left to ask
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


def own_device(device: str) -> torch.device:
    """Return the device of this process. Each of several has a GPU of its own.

    Raises: ValueError for several processes on Apple's GPU, for one without a GPU of its own, and for several on GPUs
        without LOCAL_RANK.
    """
    local = os.environ.get("LOCAL_RANK")
    several = launched()[1] > 1
    named = device == "cuda" or (several and device.startswith("cuda:"))  # several cannot have the GPU of one number
    on_gpu = (named or device == "auto") and torch.cuda.is_available()
    if several and on_gpu and local is None:  # each would take the first GPU
        raise ValueError(
            "LOCAL_RANK is not set, so no process knows its GPU; start all with torchrun, or set it to the number of "
            "each process on its machine, from 0"
        )
    if local is not None and on_gpu:
        device, there = f"cuda:{local}", torch.cuda.device_count()
        if int(local) >= there:
            raise ValueError(
                f"LOCAL_RANK={local} has no GPU of its own: this process sees {there}; start a process for each GPU, "
                "or, where the launcher shows each process its own alone, set LOCAL_RANK=0"
            )
    found = pick_device(device)
    if several and found.type == "mps":
        if device != "auto":
            raise ValueError("several processes cannot train on mps: torch sends no tensors of it; use the device cpu")
        return torch.device("cpu")
    return found


@contextlib.contextmanager
def joined(
    timeout: float = 300.0, device: torch.device | None = None, *, longest_wait: float | None = None
) -> Iterator[World]:
    """Yield the World of all processes that a launcher started, and leave it at the end; of one process without one.

    Args:
        timeout: seconds in which all must come.
        device: of this process; on a GPU, tensors on it are sent by NCCL, and those on the CPU by gloo.
        longest_wait: seconds after which a collective fails in which another rank is missing; None: timeout.

    Raises: ValueError if one does not come, or cannot be reached. A rank with an error of its own ends here.
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
    except BaseException as error:
        if not is_told(error):
            fail(error)  # this process ends here
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
