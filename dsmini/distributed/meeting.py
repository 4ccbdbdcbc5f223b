"""The meeting of a command's processes before they have a group, and the one sentence about what went wrong.

They meet in the launcher's store, each under its rank, so that those that came can say who is missing. A process that
made a mistake before it came leaves its sentence there, and the others do not wait for it. `tell` prints one sentence,
whoever failed: the lowest rank speaks, and the others wait until it has, because torchrun ends all once one has ended.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from dsmini.console.command import complain, interruptible

if TYPE_CHECKING:  # a command of one process may not need torch
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

TOLD = "all ranks raise this"
"""Note in an error that all ranks raise."""
GRACE = 10.0
"""Longest time in seconds that a rank waits for rank 0 to speak."""
ALONE = 1.0
"""The same for an error that rank 0 may not have met."""
CALL = timedelta(seconds=30)
"""Longest time of a call of the store."""


class UnreachableError(ValueError):
    """The store in which the processes meet does not answer."""


def launched() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes that a launcher started; 0 and 1 without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launcher() -> str:
    """Return the command that starts as many processes as these, to which -m MODULE is added."""
    _, size = launched()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size == 1:
        return "python"
    machines = "--standalone" if local == size else f"--nnodes {size // local}"
    return f"torchrun {machines} --nproc-per-node {local}"


def held_by_launcher() -> bool:
    """Return whether the launcher holds the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def attempt() -> int:
    """Return how many times the launcher has started all processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def meet(seconds: float) -> None:
    """Wait until all processes have come.

    Raises: ValueError, the same on all that came, if one is missing after some seconds, or has made a mistake.
    """
    store = _store(seconds)
    try:
        mistake = _await_all(store, seconds)
    except RuntimeError as error:
        raise _unreachable(error) from None
    if mistake is not None:
        failure = ValueError(mistake)
        failure.add_note(TOLD)
        raise failure


def _await_all(store: "Store", seconds: float) -> str | None:
    """Count this process in, and wait for the others; return what keeps them from meeting."""
    (rank, size), start = launched(), time.monotonic()
    store.set(f"came {rank}", "")
    store.add("came", 1)
    while store.add("came", 0) < size:
        waited = time.monotonic() - start
        if waited > seconds:
            missing = [str(other) for other in range(size) if not store.check([f"came {other}"])]
            ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:8])}{', ...' if missing[8:] else ''}"
            sentence = (
                f"{size - len(missing)} of {size} processes came to {_where()} within {seconds:g} s, without {ranks}; "
                "check that all were started, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
            )
            store.compare_set("mistake", "", sentence)
        if store.check(["mistake"]):
            return store.get("mistake").decode()
        time.sleep(min(0.01 + waited / 20, 0.5))  # rarer with time, for there may be thousands
    return None


def tell(sentence: str, error: BaseException) -> None:
    """Print what is wrong, unless another process of the command does.

    Args:
        error: one with the note TOLD is raised by all ranks.
    """
    rank, size = launched()
    if size == 1:
        complain(sentence)
        return
    own = f"rank {rank}: {sentence}" if rank else sentence
    try:
        if isinstance(error, UnreachableError):
            raise error
        store = _store(GRACE)
    except UnreachableError:
        complain(own)
        return
    told = TOLD in getattr(error, "__notes__", ())
    # KeyboardInterrupt: torchrun ends all once one has ended; RuntimeError: rank 0 held the store, and has ended
    with suppress(KeyboardInterrupt, RuntimeError):
        store.compare_set("mistake", "", own)
        shared = told or store.add("came", 0) < size  # else this rank has failed alone, while the others work
        seconds = GRACE if shared else ALONE
        if rank and not (told and _is_lowest(store, rank)):
            _wait(lambda: store.check(["said"]), seconds)
        if store.add("speakers", 1) == 1:
            complain(sentence if told else own)
            store.set("said", "")
        if rank:
            store.add("heard", 1)
        elif not held_by_launcher():
            _wait(lambda: store.add("heard", 0) >= size - 1, seconds)


def _is_lowest(store: "Store", rank: int) -> bool:
    """Return whether no lower rank came, which would speak."""
    return not any(store.check([f"came {other}"]) for other in range(rank))


def _wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.02)


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _store(seconds: float) -> "Store":
    """Return the store, with keys of this attempt alone, for the store of a launcher outlives one.

    Raises: UnreachableError if it does not answer within some seconds.
    """
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

    rank, _ = launched()
    host, end = os.environ.get("MASTER_ADDR", ""), time.monotonic() + seconds
    try:
        port = _port()
        if rank or held_by_launcher():  # here, because a client of the store would hear no signal while it waits
            while not _answers(host, port):
                if time.monotonic() > end:
                    raise ValueError(f"nobody answers within {seconds:g} s")
                time.sleep(0.1)
        holds = rank == 0 and not held_by_launcher()
        client = interruptible(lambda: _connected(host, port, holds), seconds)  # another service never answers
        return PrefixStore(f"meeting {attempt()}", client)
    except (ValueError, RuntimeError, TimeoutError) as error:
        raise _unreachable(error) from None


def _port() -> int:
    text = os.environ.get("MASTER_PORT", "")
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise ValueError(f"MASTER_PORT is {text[:20]!r}, not a port from 1 to 65535")
    return int(text)


def _unreachable(error: Exception) -> UnreachableError:
    reason = (str(error).splitlines() or ["no answer"])[0]
    return UnreachableError(
        f"cannot join the {launched()[1]} processes at {_where()}: {reason}; check that all were started with the same "
        "MASTER_ADDR and MASTER_PORT, and that the network lets them through"
    )


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@cache
def _connected(host: str, port: int, holds: bool) -> "Store":
    """Return a client of the store. Where this process holds the store, it does so to its end."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore(host, port, None, holds, timeout=CALL, wait_for_workers=False)
