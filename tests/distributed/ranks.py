"""Run a function in several processes on the loopback interface, as torchrun does, with an end in any case."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsmini.console.command import run
from dsmini.distributed.meeting import tell
from dsmini.distributed.world import joined

SECONDS = 60.0
"""Time limit of a group of processes."""
START = multiprocessing.get_context("forkserver")
PRELOADED = [
    *("tests.distributed.ranks", "tests.distributed.faulty", "dsmini.train", "dsmini.training.start"),
    *("dsmini.distributed.watchdog", "dsmini.distributed.checkpoint", "dsmini_kernels.cpu", "torch._dynamo"),
]
START.set_forkserver_preload(PRELOADED)  # torch and what else takes long is imported once


class RankError(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(n: int, work: Callable[..., Any], *args: Any, seconds: float = SECONDS, timeout: float = 20.0) -> list:
    """Return the results of work(world, *args) on n ranks; raise RankError with the trace of those that failed.

    Args:
        work: a function of a module, since the processes import it.
        timeout: seconds of a collective.
    """
    with _started(n, work, args, timeout, new_store(), 0) as (_, receivers):
        return _results(receivers, time.monotonic() + seconds)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one rank."""

    status: int | None
    """Exit status, or minus the number of the signal; None for one that was stopped, or did not end in time."""
    value: Any
    """The result of a rank that returned."""
    failure: str
    """The trace of a rank that raised; empty for one that returned, or ended without a word."""


def outcomes(
    n: int,
    work: Callable[..., Any],
    *args: Any,
    seconds: float = SECONDS,
    timeout: float = 20.0,
    store: Any = None,
    attempt: int = 0,
    late: float = 0.0,
) -> list[Outcome]:
    """Return how work(world, *args) ended on n ranks, which may die. Ranks that SIGSTOP stopped are not waited for.

    Args:
        store: that of an earlier attempt, as a launcher keeps it; None: a new one.
        attempt: number of restarts so far.
        late: seconds by which the last rank joins after the others.
    """
    until = time.monotonic() + seconds
    answers: dict[int, tuple[bool, Any]] = {}
    with _started(n, work, args, timeout, store or new_store(), attempt, late) as (processes, receivers):
        unread = dict(zip(receivers, range(n), strict=True))
        living = {process.sentinel: process for process in processes}
        while living and time.monotonic() < until and not all(_is_stopped(one.pid) for one in living.values()):
            for ready in wait([*unread, *living], 0.2):
                if isinstance(ready, Connection):
                    answers |= _answer(ready, unread.pop(ready))
                else:
                    living.pop(ready).join()  # pyright: ignore[reportArgumentType, reportCallIssue]
        for receiver, rank in unread.items():
            if receiver.poll():
                answers |= _answer(receiver, rank)
        statuses = [None if process.sentinel in living else process.exitcode for process in processes]
    ends = [(status, *answers.get(rank, (False, ""))) for rank, status in enumerate(statuses)]
    return [Outcome(status=s, value=v if good else None, failure="" if good else v) for s, good, v in ends]


def _answer(receiver: Connection, rank: int) -> dict[int, tuple[bool, Any]]:
    try:
        return {rank: pickle.loads(receiver.recv_bytes())}
    except EOFError:
        return {}


def _is_stopped(pid: int | None) -> bool:
    """Return whether SIGSTOP has stopped a process, as far as the system tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def new_store() -> Any:
    """Return a store that listens on the loopback interface, as a launcher has it."""
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


@contextmanager
def _started(
    n: int,
    work: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    store: Any,
    attempt: int,
    late: float = 0.0,
) -> Iterator[tuple[list[Any], list[Connection]]]:
    """Start the ranks; yield them and the ends of the pipes that their results come from. Kill them at the end."""
    pairs = [START.Pipe(duplex=False) for _ in range(n)]
    processes = [
        START.Process(
            target=_rank,
            args=(rank, n, store.port, timeout, attempt, late if rank == n - 1 else 0.0, sender, work, args),
            daemon=True,
        )
        for rank, (_, sender) in enumerate(pairs)
    ]
    try:
        for process, (_, sender) in zip(processes, pairs, strict=True):
            process.start()
            sender.close()
        yield processes, [receiver for receiver, _ in pairs]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _results(receivers: list[Connection], until: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_ends = {receiver: rank for rank, receiver in enumerate(receivers)}
    while open_ends and (left := until - time.monotonic()) > 0:
        for receiver in wait(list(open_ends), left):
            assert isinstance(receiver, Connection)
            rank = open_ends.pop(receiver)
            try:
                good, value = pickle.loads(receiver.recv_bytes())
                (results if good else failures)[rank] = value
            except EOFError:
                failures[rank] = "died"
    failures |= dict.fromkeys(open_ends.values(), "did not end in time")
    if failures:
        raise RankError("\n".join(f"rank {rank}: {words}" for rank, words in sorted(failures.items())))
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    rank: int,
    n: int,
    port: int,
    timeout: float,
    attempt: int,
    late: float,
    sender: Connection,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Be one rank: join the others, work, and send the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    time.sleep(late)
    os.environ |= {
        **{"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RESTART_COUNT": str(attempt)},
    }
    try:
        if work in (command, speaking):  # they join the others themselves
            work(*args)
        with joined(timeout) as world:
            result = (True, work(world, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(result))  # whole: `send` would share the memory of tensors, which ends with this
    sender.close()
    if not result[0]:
        sys.exit(1)


def command(*args: str, name: str = "train") -> None:
    """Be python -m dsmini.NAME with these arguments, as a launcher starts it on each rank. For `outcomes`."""
    sys.argv = [f"dsmini.{name}", *args]
    try:
        run(import_module(f"dsmini.{name}").main, tell)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def speaking(
    folder: Path, name: str, lines: Sequence[Sequence[str] | None], environment: Mapping[str, str], signal_after: float
) -> None:
    """Be python -m dsmini.NAME with this rank's line of arguments, and write its words into files. For `outcomes`.

    Args:
        lines: the arguments of each rank; None for one that is missing.
        environment: changes of what the launcher sets.
        signal_after: seconds after which SIGTERM comes; 0: never.
    """
    rank = int(os.environ["RANK"])
    line = lines[rank]
    if line is None:
        os._exit(0)
    for descriptor, name_of_file in ((1, f"output-{rank}"), (2, f"said-{rank}")):
        with (folder / name_of_file).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= environment
    if signal_after:
        threading.Timer(signal_after, os.kill, (os.getpid(), signal.SIGTERM)).start()
    command(*line, name=name)


def spoken(
    folder: Path,
    *lines: Sequence[str] | None,
    name: str = "train",
    environment: Mapping[str, str] | None = None,
    signal_after: float = 0.0,
) -> tuple[list[int | None], list[str]]:
    """Return the exit status of each rank of a command, and what each wrote to the standard error."""
    ends = outcomes(len(lines), speaking, folder, name, lines, environment or {}, signal_after, seconds=50)
    said = [folder / f"said-{rank}" for rank in range(len(lines))]
    return [end.status for end in ends], [file.read_text() if file.exists() else "" for file in said]


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
