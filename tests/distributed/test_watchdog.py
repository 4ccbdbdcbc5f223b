"""The watchdog with real processes that stop, sleep, wait and die; only a store on the loopback joins them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
from torch.distributed import TCPStore

from dsmini.distributed.stalls import Limits, Stall
from dsmini.distributed.watchdog import STALLED, Watchdog, place_of, watchdog_store

HOST = "127.0.0.1"
LIMITS = Limits(timeout=2.5, phases={"starting": 30.0, "saving": 30.0})
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed"])


def sleep_for_ever(watchdog: Watchdog) -> None:
    watchdog.beat(step=14, phase="backward")
    time.sleep(600)


def wait_for_ever(watchdog: Watchdog) -> None:
    watchdog.beat(step=14, phase="backward")
    with watchdog.waiting():
        time.sleep(600)


def stop(watchdog: Watchdog) -> None:
    watchdog.beat(step=14, phase="optimizer")
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGSTOP)


def die(watchdog: Watchdog) -> None:
    watchdog.beat(step=14, phase="optimizer")
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_a_while(watchdog: Watchdog) -> None:
    watchdog.beat(step=14, phase="backward")
    with watchdog.waiting():
        time.sleep(6)


def move_slowly(watchdog: Watchdog) -> None:
    for _ in range(6):
        watchdog.beat(step=14, phase="backward")
        time.sleep(1)


def save_slowly(watchdog: Watchdog) -> None:
    watchdog.beat(step=14, phase="saving")
    time.sleep(6)


def end_at_once(watchdog: Watchdog) -> None:
    watchdog.beat(step=14, phase="between")


def _rank(rank: int, work: Callable[[Watchdog], None], size: int, port: int, store_rank: int | None, c: Any) -> None:
    held = TCPStore(HOST, port, is_master=True, wait_for_workers=False) if rank == store_rank else None
    store = watchdog_store(HOST, port, "test")
    watchdog = Watchdog(rank, size, store, LIMITS, c.send, period=0.2, store_rank=store_rank)
    with watchdog:
        work(watchdog)
    c.send(("ended", watchdog.lost_store, held is not None))


@contextmanager
def ranks(*works: Callable[[Watchdog], None], store_rank: int | None = None) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the processes and the ends of pipes that they write to; kill what is left at the end."""
    held = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    port = held.port
    if store_rank is not None:
        del held
    pipes = [PROCESSES.Pipe(duplex=False) for _ in works]
    arguments = [(i, work, len(works), port, store_rank, pipes[i][1]) for i, work in enumerate(works)]
    processes = [PROCESSES.Process(target=_rank, args=one, daemon=True) for one in arguments]
    try:
        for process in processes:
            process.start()
        for _, write in pipes:
            write.close()
        yield processes, [read for read, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def heard(pipe: Connection, timeout: float = 40) -> Any:
    """Return the next message of a rank."""
    assert wait([pipe], timeout), "no message came in time"
    return pipe.recv()


def stalls(pipes: list[Connection], of: list[int]) -> list[Stall]:
    got = [heard(pipes[rank]) for rank in of]
    assert all(isinstance(one, Stall) for one in got), got
    return got


def test_stopped_rank_is_named_and_the_others_end() -> None:
    with ranks(wait_for_ever, stop, wait_for_ever) as (processes, pipes):
        first, second = stalls(pipes, [0, 2])
        assert first == second, "all have the same finding"
        assert (first.kind, first.rank, first.speaker, first.pid) == ("silent", 1, 0, processes[1].pid)
        assert (first.step, first.phase) == (14, "optimizer")
        assert 2.5 < first.seconds < 15
        for rank in (0, 2):
            processes[rank].join(20)
            assert processes[rank].exitcode == STALLED


def test_sleeping_rank_is_named_with_its_line() -> None:
    with ranks(wait_for_ever, wait_for_ever, sleep_for_ever) as (processes, pipes):
        found = stalls(pipes, [0, 1, 2])
        assert {(one.kind, one.rank, one.speaker) for one in found} == {("still", 2, 0)}
        assert found[0].sentence.startswith(f"rank 2 (pid {processes[2].pid} on ")
        assert "step 14, backward, in tests/distributed/test_watchdog.py:" in found[0].sentence
        assert found[0].where.endswith(" sleep_for_ever")
        for process in processes:
            process.join(20)
            assert process.exitcode == STALLED, "the stalled one too"


def test_sleeping_rank_0_tells_on_itself() -> None:
    with ranks(sleep_for_ever, wait_for_ever, wait_for_ever) as (_, pipes):
        assert {(one.kind, one.rank, one.speaker) for one in stalls(pipes, [0, 1, 2])} == {("still", 0, 0)}


def test_lowest_rank_that_lives_names_rank_0() -> None:
    with ranks(stop, wait_for_ever, wait_for_ever) as (_, pipes):
        assert {(one.kind, one.rank, one.speaker) for one in stalls(pipes, [1, 2])} == {("silent", 0, 1)}


def test_next_rank_watches_once_rank_0_has_ended() -> None:
    with ranks(end_at_once, wait_for_ever, stop) as (_, pipes):
        assert [(one.kind, one.rank, one.speaker) for one in stalls(pipes, [1])] == [("silent", 2, 1)]


def test_killed_rank_is_named() -> None:
    with ranks(wait_for_ever, die) as (_, pipes):
        assert [(one.kind, one.rank) for one in stalls(pipes, [0])] == [("silent", 1)]


def test_slow_saving_or_ended_rank_gives_no_alarm() -> None:
    """The first waits more than twice the time-out: for a rank that moves, and for one that saves."""
    with ranks(wait_a_while, move_slowly, save_slowly, end_at_once) as (processes, pipes):
        assert [heard(pipe) for pipe in pipes] == [("ended", False, False)] * 4
        for process in processes:
            process.join(20)
            assert process.exitcode == 0


def test_stopped_rank_that_holds_the_store_is_named() -> None:
    with ranks(stop, wait_for_ever, wait_for_ever, store_rank=0) as (processes, pipes):
        for one in stalls(pipes, [1, 2]):
            assert (one.kind, one.rank) == ("store", 0)
            assert one.sentence.startswith(f"rank 0 (pid {processes[0].pid} on ")


def test_end_of_the_store_ends_the_watchdog_quietly() -> None:
    with ranks(die, move_slowly, store_rank=0) as (processes, pipes):
        assert heard(pipes[1]) == ("ended", True, False)
        processes[1].join(20)
        assert processes[1].exitcode == 0


def in_file(path: str, source: str) -> Callable[[threading.Lock], None]:
    """Return the function `f` of a source, as if it were in another file."""
    names: dict[str, Any] = {"outer": wait_for_lock}
    exec(compile(source, path, "exec"), names)
    return names["f"]


def wait_for_lock(lock: threading.Lock) -> None:
    lock.acquire()


DIRECT = "def f(lock): lock.acquire()"
TORCH = "/x/site-packages/torch/"


@pytest.mark.parametrize(
    ("work", "place", "waits"),
    [
        (wait_for_lock, "tests/distributed/test_watchdog.py:", False),
        (in_file(f"{TORCH}distributed/distributed_c10d.py", DIRECT), "test_watchdog.py:", True),
        (in_file(f"{TORCH}distributed/fsdp/_fully_shard/_fsdp_collectives.py", DIRECT), "test_watchdog.py:", True),
        (in_file(f"{TORCH}distributed/tensor/_dispatch.py", DIRECT), "test_watchdog.py:", False),
        (in_file(f"{TORCH}distributed/pipelining/stage.py", "def f(lock): outer(lock)"), "wait_for_lock", False),
        (in_file("/home/me/experiment/train.py", DIRECT), "experiment/train.py:1 f", False),
    ],
)
def test_place_is_the_line_outside_libraries(work: Callable[[threading.Lock], None], place: str, waits: bool) -> None:
    lock = threading.Lock()

    def run() -> None:
        work(lock)

    with lock:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        until = time.monotonic() + 10
        while place not in place_of(thread.ident)[0]:
            assert time.monotonic() < until, place_of(thread.ident)
        time.sleep(0.05)  # it may still be on its way to the lock
        got = place_of(thread.ident)
        assert place in got[0] and got[1] == waits
    thread.join()
    assert place_of(thread.ident) == ("an unknown place", False)
