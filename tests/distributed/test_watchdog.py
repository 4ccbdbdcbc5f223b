"""The watchdog: of ranks in one process with scripted times, and of processes that stop, sleep, wait and die."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch.distributed as dist

from dsmini.distributed import watchdog as watchdogs
from dsmini.distributed.stalls import ENDED, Limits, Stall
from dsmini.distributed.watchdog import STALLED, Watchdog, _Elapsed, place_of, watchdog_store
from tests.distributed.ranks import SECONDS, START, free_port, start, wait_until

HOST = "127.0.0.1"
LIMITS = Limits(timeout=3.0, phases={"starting": 60.0, "saving": 60.0})


# --- scripted


class Ended(BaseException):
    """The end of a process, in place of it."""


def pass_period(dog: Watchdog, behaviour: str) -> None:
    """Do what a watchdog does once in a second."""
    if behaviour == "moves":
        dog.beat(step=14, phase="backward")
    dog._waiting = int(behaviour == "waits")
    dog._still = 0.0 if behaviour == "moves" else dog._still + 1.0
    dog._publish(dog._phase)
    dog._read(1.0)
    dog._judge()
    dog._exchanged += 1


@pytest.mark.parametrize(
    ("behaviours", "found"),
    [
        (("waits", "is stopped", "waits"), ("silent", 1, 0, 4.0)),
        (("waits", "waits", "sleeps"), ("still", 2, 0, 4.0)),
        (("sleeps", "waits", "waits"), ("still", 0, 0, 5.0)),
        (("is stopped", "waits", "waits"), ("silent", 0, 1, 4.0)),
        (("ends", "waits", "is stopped"), ("silent", 2, 1, 4.0)),
        (("is stopped", "is stopped", "moves"), ("silent", 0, 2, 8.0)),
        (("waits", "moves", "saves", "ends"), None),
    ],
    ids=str,
)
def test_stall_is_found_and_told_to_all(
    behaviours: tuple[str, ...], found: tuple[str, int, int, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watchdogs, "GRACE", 1.0)  # nobody hears while another acts
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    store, heard = dist.HashStore(), {rank: list[Stall]() for rank in range(len(behaviours))}
    dogs = [Watchdog(rank, len(behaviours), store, LIMITS, heard[rank].append) for rank in heard]
    for dog, behaviour in zip(dogs, behaviours, strict=True):
        dog.beat(step=14, phase="saving" if behaviour == "saves" else "backward")
        dog._publish(ENDED if behaviour == "ends" else dog._phase)
    living = {rank for rank, behaviour in enumerate(behaviours) if behaviour not in ("is stopped", "ends")}
    statuses: dict[int, int] = {}
    for _ in range(10):
        for rank in sorted(living - statuses.keys()):
            try:
                pass_period(dogs[rank], behaviours[rank])
            except Ended as ended:
                statuses[rank] = ended.args[0]
    if found is None:
        assert statuses == {} and not any(heard.values())
        return
    assert statuses == dict.fromkeys(living, STALLED)
    assert {rank for rank, stalls in heard.items() if stalls} == living
    (stall,) = {stalls[0] for stalls in heard.values() if stalls}
    assert (stall.kind, stall.rank, stall.speaker, stall.seconds) == found
    assert all(len(stalls) <= 1 for stalls in heard.values())
    assert (stall.step, stall.phase, stall.pid) == (14, "backward", os.getpid())


@pytest.mark.parametrize(("clock", "passed"), [((0.0, 1.0), 1.0), ((0.0, 100.0), 3.0)])
def test_time_in_which_the_process_was_stopped_does_not_count(
    clock: tuple[float, float], passed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", iter(clock).__next__)
    assert _Elapsed(1.0).since_last() == passed


# --- processes, of which rank 0 holds the store


def wait_for_ever(watchdog: Watchdog, number: int) -> None:
    watchdog.beat(step=14, phase="backward")
    with watchdog.waiting():
        time.sleep(600)


def come_by_a_signal(watchdog: Watchdog, number: int) -> None:
    """Let a signal come once the others have seen a heartbeat of this process."""
    signs = watchdog._signs
    wait_until(lambda: all((beat := signs[rank].heartbeat) and beat.count > 2 for rank in signs if rank))
    os.kill(os.getpid(), number)


def move_without_a_store(watchdog: Watchdog, number: int) -> None:
    while not watchdog.lost_store:
        watchdog.beat(step=14, phase="backward")
        time.sleep(0.1)


def _rank(rank: int, work: Callable[[Watchdog, int], None], size: int, port: int, number: int, sender: Any) -> None:
    held = dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False) if rank == 0 else None
    store = watchdog_store(HOST, port, "test")
    with Watchdog(rank, size, store, LIMITS, sender.send, period=0.2, store_rank=0) as watchdog:
        work(watchdog, number)
    sender.send(("ended", watchdog.lost_store, held is not None))


@contextmanager
def ranks(number: int, *works: Callable[[Watchdog, int], None]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Start rank 0, to which a signal comes, and others; yield the processes and the pipes that they write to."""
    works, port = (come_by_a_signal, *works), free_port()
    pipes = [START.Pipe(duplex=False) for _ in works]
    processes = [start(_rank, rank, work, len(works), port, number, pipes[rank][1]) for rank, work in enumerate(works)]
    try:
        yield processes, [read for read, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def heard(pipe: Connection) -> Any:
    """Return the next message of a rank."""
    assert wait([pipe], SECONDS), "no message came in time"
    return pipe.recv()


@pytest.mark.slow
def test_stopped_rank_that_holds_the_store_is_named() -> None:
    with ranks(signal.SIGSTOP, wait_for_ever, wait_for_ever) as (processes, pipes):
        for one in map(heard, pipes[1:]):
            assert (one.kind, one.rank) == ("store", 0)
            assert one.sentence.startswith(f"rank 0 (pid {processes[0].pid} on ")


@pytest.mark.slow
def test_end_of_the_store_ends_the_watchdog_quietly() -> None:
    with ranks(signal.SIGKILL, move_without_a_store) as (processes, pipes):
        assert heard(pipes[1]) == ("ended", True, False)
        processes[1].join(SECONDS)
        assert processes[1].exitcode == 0


# --- places


def wait_for_lock(inside: threading.Lock, lock: threading.Lock) -> None:
    inside.release()
    lock.acquire()


def in_file(path: str, source: str) -> Callable[[threading.Lock, threading.Lock], None]:
    """Return the function `f` of a source, as if it were in another file."""
    names: dict[str, Any] = {"outer": wait_for_lock}
    exec(compile(source, path, "exec"), names)
    return names["f"]


DIRECT = "def f(inside, lock): inside.release(); lock.acquire()"
TORCH = "/x/site-packages/torch/"


@pytest.mark.parametrize(
    ("work", "place", "waits"),
    [
        (wait_for_lock, "tests/distributed/test_watchdog.py:", False),
        (in_file(f"{TORCH}distributed/distributed_c10d.py", DIRECT), "test_watchdog.py:", True),
        (in_file(f"{TORCH}distributed/fsdp/_fully_shard/_fsdp_collectives.py", DIRECT), "test_watchdog.py:", True),
        (in_file(f"{TORCH}distributed/tensor/_dispatch.py", DIRECT), "test_watchdog.py:", False),
        (in_file(f"{TORCH}distributed/pipelining/stage.py", "def f(*locks): outer(*locks)"), "wait_for_lock", False),
        (in_file("/home/me/experiment/train.py", DIRECT), "experiment/train.py:1 f", False),
    ],
)
def test_place_is_the_line_outside_libraries(work: Callable[..., None], place: str, waits: bool) -> None:
    inside, lock = threading.Lock(), threading.Lock()

    def run() -> None:
        work(inside, lock)

    inside.acquire()
    with lock:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert inside.acquire(timeout=SECONDS), "the thread has come to its line"
        got = place_of(thread.ident)
        assert place in got[0] and got[1] == waits
    thread.join()
    assert place_of(thread.ident) == ("an unknown place", False)
