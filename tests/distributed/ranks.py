"""Run functions in several processes on the loopback interface, as torchrun does, with an end in any case.

`run_ranks` gives its work to processes that stay for the next work of the same file, and join the others again for it.
`outcomes` starts processes for one work, in which they may die.
"""

import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
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

SECONDS = 200.0
"""Time limit of a work, against hangs alone."""
TIMEOUT = 60.0
"""Seconds of a collective, against hangs alone."""
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["tests.distributed.preloaded"])


def start(work: Callable[..., None], *args: Any) -> Any:
    """Start a process that does work(*args), and ends with this one."""
    process = START.Process(target=work, args=args, daemon=True)
    process.start()
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


def new_store() -> Any:
    """Return a store that listens on the loopback interface, as a launcher has it."""
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class RankError(AssertionError):
    """A rank raised, died or did not end in time."""


class Ranks:
    """Processes that wait for work.

    Args:
        store: that of an earlier attempt, as a launcher holds it; None: a new one.
    """

    def __init__(self, n: int, store: Any = None) -> None:
        self.store, self.works = store or new_store(), 0
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(n):
            ours, theirs = START.Pipe()
            self.pipes.append(ours)
            self.processes.append(start(_rank, rank, n, self.store.port, theirs))
            theirs.close()

    def give(self, *work: Any, attempt: int | None = None) -> None:
        """Send a function, its arguments and a time-out to all ranks; without an attempt, the next one."""
        self.works += 1
        message = pickle.dumps((*work, self.works if attempt is None else attempt))
        for pipe in self.pipes:
            pipe.send_bytes(message)

    def answers(self, seconds: float) -> dict[int, tuple[bool, Any]]:
        """Return (True, result) or (False, trace) of each rank that answers in time, unless the others are stopped."""
        found: dict[int, tuple[bool, Any]] = {}
        unread, end = {pipe: rank for rank, pipe in enumerate(self.pipes)}, time.monotonic() + seconds
        while unread and time.monotonic() < end:
            ready = wait(list(unread), 0.2)
            if not ready and self.are_stopped():
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = unread.pop(pipe)
                with suppress(EOFError, ConnectionResetError):  # it died
                    found[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        return found

    def are_stopped(self) -> bool:
        """Return whether SIGSTOP has stopped all that live, as far as the system tells."""
        living = [process.pid for process in self.processes if process.exitcode is None]
        return bool(living) and all(map(_is_stopped, living))

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def _rank(rank: int, n: int, port: int, pipe: Connection) -> None:
    """Be one rank: join the others for each work, and send its result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            work, args, options, timeout, attempt = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.set_num_threads(1)
        os.environ |= {
            **{"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
            **{"GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RESTART_COUNT": str(attempt)},
        }
        try:
            if timeout is None:
                result = True, work(*args, **options)
            else:
                with joined(timeout) as world:
                    result = True, work(world, *args, **options)
        except BaseException:
            result = False, traceback.format_exc()
        written = io.BytesIO()
        torch.save(result, written)  # all tensors at once; `send` would share memory that ends with this process
        pipe.send_bytes(written.getbuffer())
        if not result[0]:
            sys.exit(1)


_waiting: dict[int, Ranks] = {}
"""Ranks that wait for the next work, by their number."""


def run_ranks(n: int, work: Callable[..., Any], *args: Any, seconds: float = SECONDS, **options: Any) -> list[Any]:
    """Return the results of work(world, *args, **options) on n ranks; raise RankError with the traces of failures.

    Args:
        work: a function of a module, since the processes import it. It leaves the process as it was.
    """
    ranks = _waiting.pop(n, None) or Ranks(n)
    try:
        ranks.give(work, args, options, TIMEOUT)
        answers = ranks.answers(seconds)
        words = {rank: answers.get(rank, (False, "died, or did not end in time")) for rank in range(n)}
        if failures := [f"rank {rank}: {value}" for rank, (good, value) in words.items() if not good]:
            raise RankError("\n".join(failures))
    except BaseException:
        ranks.close()
        raise
    _waiting[n] = ranks
    return [answers[rank][1] for rank in range(n)]


def end_waiting_ranks() -> None:
    while _waiting:
        _waiting.popitem()[1].close()


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
    timeout: float | None = TIMEOUT,
    store: Any = None,
    attempt: int = 0,
    **options: Any,
) -> list[Outcome]:
    """Return how work(world, *args, **options) ended on n ranks, which may die, or be stopped by SIGSTOP.

    Args:
        timeout: seconds of a collective; None: the work joins the others itself, and is not given a world.
        store: that of an earlier attempt, as a launcher holds it; None: a new one.
    """
    with closing(Ranks(n, store)) as ranks:
        ranks.give(work, args, options, timeout, attempt=attempt)
        end = time.monotonic() + seconds
        answers = ranks.answers(seconds)
        for pipe in ranks.pipes:
            pipe.close()  # no more work
        while (living := [p.sentinel for p in ranks.processes if p.exitcode is None]) and time.monotonic() < end:
            if ranks.are_stopped():
                break
            wait(living, 0.2)
        statuses = [process.exitcode for process in ranks.processes]
    ends = [(status, *answers.get(rank, (False, ""))) for rank, status in enumerate(statuses)]
    return [Outcome(status=s, value=v if good else None, failure="" if good else v) for s, good, v in ends]


# --- commands


class Speech:
    """The words of a command's processes, each of which writes into files of a folder."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = folder, n
        self.statuses: list[int | None] = []
        """Exit statuses, at the end."""

    def read(self, name: str) -> list[str]:
        """Return a text of each rank: its pid, its output or its error (the standard error)."""
        files = [self.folder / f"{name}-{rank}" for rank in range(self.n)]
        return [file.read_text() if file.exists() else "" for file in files]

    @property
    def outputs(self) -> list[str]:
        return self.read("output")

    @property
    def errors(self) -> list[str]:
        return self.read("error")


def spoken(
    folder: Path,
    *lines: Sequence[str] | None,
    name: str = "train",
    environment: Mapping[str, str] | None = None,
    store: Any = None,
    meanwhile: Callable[[Speech], None] = lambda speech: None,
    faults: Sequence[Any] = (),
) -> Speech:
    """Return what the processes of python -m dsmini.NAME said.

    Args:
        lines: the arguments of each rank; None for one that is missing.
        environment: changes of what the launcher sets.
        meanwhile: called while they run.
        faults: to inject into a run of dsmini.train.
    """
    speech = Speech(Path(tempfile.mkdtemp(dir=folder)), len(lines))
    other = threading.Thread(target=meanwhile, args=(speech,))
    other.start()
    work = (_speak, speech.folder, name, lines, environment or {}, faults)
    speech.statuses = [end.status for end in outcomes(len(lines), *work, timeout=None, store=store)]
    other.join()
    return speech


def _speak(
    folder: Path,
    name: str,
    lines: Sequence[Sequence[str] | None],
    environment: Mapping[str, str],
    faults: Sequence[Any],
) -> None:
    rank = int(os.environ["RANK"])
    line = lines[rank]
    if line is None:
        os._exit(0)
    main = import_module(f"dsmini.{name}").main
    if faults:
        import_module("tests.distributed.faults").inject_into_command(faults)
    for descriptor, written in ((1, f"output-{rank}"), (2, f"error-{rank}")):
        with (folder / written).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    wait_until(lambda: len(list(folder.glob("pid-*"))) == len(lines) - lines.count(None))  # none is late on a busy CPU
    os.environ |= environment
    sys.argv = [f"dsmini.{name}", *line]
    try:
        run(main, tell)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
