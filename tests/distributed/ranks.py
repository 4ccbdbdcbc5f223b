"""Run functions in several processes on the loopback interface, as torchrun does, with an end in any case.

A server that has imported all that they need forks them, in a few hundredths of a second each.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dsmini.console.command import run
from dsmini.distributed.failure import tell, words_of_loss
from dsmini.distributed.world import joined

SECONDS = 200.0
"""Time limit of a work, against hangs alone."""
TIMEOUT = 60.0
"""Seconds of a collective, against hangs alone."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one rank."""

    status: int | None
    """Exit status, or minus the number of the signal; None for one that was stopped, or did not end in time."""
    value: Any = None
    """The result of a rank that returned."""
    failure: str = ""
    """The trace of a rank that raised; empty for one that returned, or ended without a word."""


def outcomes(
    n: int,
    work: Callable[..., Any],
    *args: Any,
    timeout: float | None = TIMEOUT,
    store: Any = None,
    attempt: int = 0,
    **options: Any,
) -> list[Outcome]:
    """Return how work(world, *args, **options) ended on n ranks, which may die, or be stopped by SIGSTOP.

    Args:
        work: a function of a module, since the processes import it.
        timeout: seconds of a collective; None: the work joins the others itself, and is not given a world.
        store: that of an earlier attempt, as a launcher holds it; None: a new one.
    """
    store, call = store or new_store(), pickle.dumps((work, args, options, timeout))
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder, f"{rank}") for rank in range(n)]
        processes = [start(_rank, rank, n, store.port, attempt, call, answer) for rank, answer in enumerate(answers)]
        end = time.monotonic() + SECONDS
        try:
            while (living := [p for p in processes if p.exitcode is None]) and time.monotonic() < end:
                if not wait([process.sentinel for process in living], 0.2) and all(map(_is_stopped, living)):
                    break
            statuses = [process.exitcode for process in processes]
            if living and time.monotonic() >= end:
                for process in living:  # it says on stderr where it stands
                    os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1.0)
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = [torch.load(answer, weights_only=False) if answer.exists() else {} for answer in answers]
    return [Outcome(status=status, **words) for status, words in zip(statuses, said, strict=True)]


def run_ranks(n: int, work: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """Return the results of work(world, *args, **options) on n ranks, with the options of `outcomes` too.

    Raises: AssertionError with the traces of failures, if a rank raised, died or did not end in time.
    """
    ends = outcomes(n, work, *args, **options)
    words = {rank: end.failure or "died, or did not end in time" for rank, end in enumerate(ends) if end.status != 0}
    assert not words, "\n".join(f"rank {rank}: {failure}" for rank, failure in words.items())
    return [end.value for end in ends]


def _is_stopped(process: Any) -> bool:
    """Return whether SIGSTOP has stopped a process, as far as the system tells."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended
        return False


def _rank(rank: int, n: int, port: int, attempt: int, call: bytes, answer: Path) -> None:
    """Be one rank: join the others, do the work, and write its result, which is there whole or not at all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # it needs no GIL
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"GLOO_SOCKET_IFNAME": LOOPBACK, "TORCHELASTIC_RESTART_COUNT": str(attempt)},
    }

    def tell_it(**result: Any) -> None:
        torch.save(result, partial := answer.with_suffix(".partial"))
        partial.rename(answer)

    work, args, options, timeout = pickle.loads(call)
    if timeout is None:
        tell_it(value=work(*args, **options))
        return
    with joined(timeout) as world:
        try:
            value = work(world, *args, **options)
        except BaseException as error:
            if not words_of_loss(error):  # an error of its own, for which `joined` ends this process
                tell_it(failure=traceback.format_exc())
            raise
    tell_it(value=value)


# --- commands


class Said(NamedTuple):
    """The end of a command in several processes: what each returned and wrote."""

    statuses: list[int | None]
    outputs: list[str]
    errors: list[str]


def spoken(
    folder: Path,
    *lines: Sequence[str] | None,
    name: str = "train",
    environment: Mapping[str, str] | None = None,
    store: Any = None,
    prepare: Callable[[], object] | None = None,
) -> Said:
    """Return what the processes of python -m dsmini.NAME said. A subfolder of `folder` holds pid-RANK meanwhile.

    Args:
        lines: the arguments of each rank; None for one that is missing.
        environment: changes of what the launcher sets.
        prepare: called in each process before the command.
    """
    place, n = Path(tempfile.mkdtemp(dir=folder)), len(lines)
    ends = outcomes(n, _speak, place, name, lines, environment or {}, prepare, timeout=None, store=store)
    words = [[(place / f"{kind}-{rank}").read_text() for rank in range(n)] for kind in ("output", "error")]
    return Said([end.status for end in ends], *words)


def _speak(
    folder: Path,
    name: str,
    lines: Sequence[Sequence[str] | None],
    environment: Mapping[str, str],
    prepare: Callable[[], object] | None,
) -> None:
    rank = int(os.environ["RANK"])
    for descriptor, kind in ((1, "output"), (2, "error")):
        with (folder / f"{kind}-{rank}").open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    line = lines[rank]
    if line is None:
        os._exit(0)
    main = import_module(f"dsmini.{name}").main
    if prepare is not None:
        prepare()
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
