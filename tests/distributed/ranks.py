"""Run a function in several processes on the loopback interface, as torchrun does, with an end in any case."""

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from dsmini.distributed.world import joined

SECONDS = 60.0
"""Time limit of a group of processes."""
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["tests.distributed.ranks", "dsmini.training.run"])  # torch is imported once


class RankError(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(n: int, work: Callable[..., Any], *args: Any, seconds: float = SECONDS, timeout: float = 20.0) -> list:
    """Return the results of work(world, *args) on n ranks; raise RankError with the trace of those that failed.

    Args:
        work: a function of a module, since the processes import it.
        timeout: seconds of a collective.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)
    pairs = [START.Pipe(duplex=False) for _ in range(n)]
    processes = [
        START.Process(target=_rank, args=(rank, n, store.port, timeout, sender, work, args), daemon=True)
        for rank, (_, sender) in enumerate(pairs)
    ]
    try:
        for process, (_, sender) in zip(processes, pairs, strict=True):
            process.start()
            sender.close()
        return _results([receiver for receiver, _ in pairs], time.monotonic() + seconds)
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
    rank: int, n: int, port: int, timeout: float, sender: Connection, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Be one rank: join the others, work, and send the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(n)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"GLOO_SOCKET_IFNAME": "lo"},
    }
    try:
        with joined(timeout) as world:
            result = (True, work(world, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(result))  # whole: `send` would share the memory of tensors, which ends with this
    sender.close()


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
