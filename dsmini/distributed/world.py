"""The processes of a run, their ranks, and what they agree on.

A run of one process has a `World` too, which has nobody to ask. `joined` makes one of several processes that torchrun
started, or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

An error that all ranks would report is reported once: meeting.py. One that only some meet (a full disk on one machine)
is raised by all of them together, and names the ranks. A rank that dies takes the others with it: no group of gloo or
NCCL survives the loss of a member. Each ends with status 1, and whoever started them starts them all again.
"""

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dsmini.console.command import interruptible
from dsmini.distributed.meeting import TOLD, attempt, held_by_launcher, launched, meet

T = TypeVar("T")
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "Application timeout", "gloo")
"""Parts of the messages of a collective that failed because another rank died or stood still."""


class World:
    """One process. With `joined`, one of several: the same methods then ask the others.

    Every rank must call the methods in the same order.
    """

    rank = 0
    size = 1
    attempt = 0
    """Number of times that the launcher started all processes again."""

    def any(self, flag: bool) -> bool:
        """Return True on all ranks if the flag is True on one."""
        return flag

    def first(self, work: Callable[[], T]) -> T:
        """Run work on rank 0 alone; return its result, or raise its error, on all."""
        return work()

    def together(self, work: Callable[[], T]) -> T:
        """Run work on all ranks; an error of some is raised by all, and names them."""
        return work()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        return [value]

    def store_address(self) -> tuple[str, int, int | None]:
        """Return host and port of the processes' store, and the rank that holds it; None: the launcher does."""
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None if held_by_launcher() else 0

    def fork(self) -> "World":
        """Return the same processes with messages of their own, for another thread. All ranks call it together."""
        return self

    def told(self, error: Exception) -> Exception:
        """Return an error that all ranks raise, marked so that rank 0 alone reports it."""
        error.add_note(TOLD)
        return error


class Joined(World):
    """A process among several, whose default group is initialised.

    Args:
        group: group of all ranks to ask in; None: the default one. A background thread needs its own.
    """

    def __init__(self, attempt: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.attempt, self.group = dist.get_rank(), dist.get_world_size(), attempt, group
        self.device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"

    def any(self, flag: bool) -> bool:
        highest = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        return bool(highest)

    def first(self, work: Callable[[], T]) -> T:
        answer: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            try:
                answer = [(work(), None)]
            except Exception as error:
                answer = [(None, _sendable(error))]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        result, error = answer[0]
        if error is not None:
            raise self.told(error)
        return result  # pyright: ignore[reportReturnType]

    def together(self, work: Callable[[], T]) -> T:
        result, mine = None, None
        try:
            result = work()
        except Exception as error:
            if _tells_of_loss(error):  # nobody is left to ask
                raise
            mine = _sendable(error)
        errors = self.gather(mine)
        if any(error is not None for error in errors):
            raise self.told(_joint(errors))
        return result  # pyright: ignore[reportReturnType]

    def gather(self, value: T) -> list[T]:
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def fork(self) -> World:
        group: Any = dist.new_group(backend="gloo")
        return Joined(self.attempt, group)


def _sendable(error: Exception) -> Exception:
    """Return an error that another process can read: itself, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any kind: it may have arguments that cannot be sent, or that its class does not take
        return _of_kind(error, str(error)).with_traceback(error.__traceback__)
    return error


def _of_kind(error: Exception, words: str) -> Exception:
    """Return an error with other words, whose type says the same to whoever catches it."""
    if isinstance(error, OSError):
        return OSError(error.errno, words)
    with contextlib.suppress(Exception):  # a type may want other arguments, or have words of its own
        same = type(error)(words)
        if str(same) == words:
            return same
    kind = next((kind for kind in (ValueError, ArithmeticError, MemoryError) if isinstance(error, kind)), RuntimeError)
    return kind(words if kind is not RuntimeError else f"{type(error).__name__}: {words}")


def _joint(errors: Sequence[Exception | None]) -> Exception:
    """Return one error for those of some ranks. Ranks with the same words are named together."""
    met = {rank: error for rank, error in enumerate(errors) if error is not None}
    texts = {
        rank: (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        for rank, error in met.items()
    }
    first = next(iter(met.values()))
    if len(met) == len(errors) and len(set(texts.values())) == 1:
        return first
    by_text: dict[str, list[int]] = {}
    for rank, text in texts.items():
        by_text.setdefault(text, []).append(rank)
    return _of_kind(first, "; ".join(f"{_named(ranks)}: {text}" for text, ranks in by_text.items()))


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def world_size() -> int:
    """Return the number of processes that a launcher started; 1 without one."""
    return launched()[1]


def device_of_rank(name: str) -> str:
    """Return the device of this process: each of a machine's processes has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    several = name in ("auto", "cuda")
    return f"cuda:{local}" if local is not None and several and torch.cuda.is_available() else name


def threads_of_rank(threads: int | None) -> int | None:
    """Return the number of threads of this process. The processes of a machine share its CPUs. None: torch's choice."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = max(1, (os.cpu_count() or 1) // local)
    return threads if local == 1 else min(threads or share, share)


@contextlib.contextmanager
def joined(timeout: float = 300.0, backend: str = "gloo", *, longest_wait: float | None = None) -> Iterator[World]:
    """Yield the World of all processes that a launcher started, and leave it at the end; of one process without one.

    Args:
        timeout: seconds in which all must come.
        longest_wait: seconds after which a collective fails in which another rank is missing; None: timeout.

    Raises: ValueError if one does not come, or cannot be reached. A rank that loses another ends here, with status 1.
    """
    if world_size() == 1:
        yield World()
        return
    meet(timeout)
    _connect(timeout, backend, timedelta(seconds=longest_wait or timeout))
    world = Joined(attempt())
    try:
        yield world
    except (Exception, KeyboardInterrupt) as error:
        _end_after(error, world.rank)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect(timeout: float, backend: str, longest_wait: timedelta) -> None:
    """Make the default group. Its store has a prefix for each attempt: addresses of dead processes stay in it."""
    rank, size = launched()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def connect() -> None:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, is_master=False, timeout=longest_wait, wait_for_workers=False
        )
        prefixed = dist.PrefixStore(f"attempt {attempt()}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=longest_wait)

    try:
        interruptible(connect, timeout)
    except (RuntimeError, TimeoutError) as error:
        reason = (str(error).splitlines() or ["no answer"])[0]
        raise ValueError(
            f"the {size} processes came to {host}:{port}, but cannot connect to each other: {reason}; check that the "
            "network lets them through, and name its interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        ) from None


def _end_after(error: BaseException, rank: int) -> None:
    """Leave at once after an error that tells of the loss of another rank, which speaks for itself."""
    if TOLD not in getattr(error, "__notes__", ()) and (reason := _tells_of_loss(error)):
        print(
            f"rank {rank}: lost another process ({reason}); a run of dsmini.train continues with --resume",
            file=sys.stderr,
            flush=True,
        )
        leave(1)


def _tells_of_loss(error: BaseException) -> str | None:
    """Return the words by which an error tells that another rank died or stood still; None for another error."""
    if not isinstance(error, RuntimeError):
        return None
    found = next((part for part in LOST if part in str(error)), None)
    cause = error.__cause__ or error.__context__  # torch's pipeline raises an error of its own
    return found if found or cause is None else _tells_of_loss(cause)


def leave(status: int) -> None:
    """End this process now, without the destructors that wait for, or abort after, a group that is dead."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
