"""The launcher, and the meeting of a command's processes before they have a group.

They meet in the launcher's store. Each sets a key of its own, so those that came can say who is missing. A process that
made a mistake before it came sets its key to its sentence (failure.py), and the others do not wait for it.
"""

import os
import socket
import time
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from dsmini.console.command import interruptible

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]


TOLD = "all ranks raise this"
"""Note in an error that all ranks raise."""
GRACE = 10.0
"""Longest time in seconds that a process which failed waits for the others."""


class UnreachableError(ValueError):
    """The store in which the processes meet does not answer."""


def launched() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes that a launcher started; 0 and 1 without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launcher() -> str:
    """Return the command that starts the same number of processes, to which -m MODULE is added."""
    _, size = launched()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size == 1:
        return "python"
    machines = "--standalone" if local == size else f"--nnodes {size // local}"
    return f"torchrun {machines} --nproc-per-node {local}"


def held_by_launcher() -> bool:
    """Return whether the launcher holds the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def told(error: Exception) -> Exception:
    """Return an error that all ranks raise, marked so that one of them reports it."""
    error.add_note(TOLD)
    return error


def is_told(error: BaseException) -> bool:
    """Return whether all ranks raise an error."""
    return TOLD in getattr(error, "__notes__", ())


def meet(seconds: float) -> None:
    """Wait until all processes have come. Each sets a key of its own: to nothing, or to what is wrong.

    Raises: ValueError on all that came, if one is missing after some seconds, or has made a mistake.
    """
    rank, size = launched()
    store = store_client("meeting", seconds)
    keys = [f"rank {other}" for other in range(size)]
    try:
        store.set(keys[rank], "")
        wait_for(store, keys, seconds)
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        wrong = [words for key in keys if store.check([key]) and (words := store.get(key).decode())]
    except RuntimeError as error:
        raise _unreachable(error) from None
    if missing and not wrong:
        ranks = f"rank{'s' if missing[1:] else ''} {', '.join(missing[:8])}{', ...' if missing[8:] else ''}"
        wrong = [
            f"{size - len(missing)} of {size} processes came to {_where()} within {seconds:g} s, without {ranks}; "
            "check that all were started, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
        ]
    if wrong:
        raise told(ValueError(wrong[0]))


def wait_for(store: "Store", keys: list[str], seconds: float) -> None:
    """Wait some seconds for keys. The store's own wait hears no signal, and prints warnings of a time-out."""
    end = time.monotonic() + seconds
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.02)


def store_client(prefix: str, seconds: float) -> "Store":
    """Return a new client of the store, with keys of this attempt alone, for the store of a launcher outlives one.

    Raises: UnreachableError if it does not answer within some seconds.
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, begin = os.environ.get("MASTER_ADDR", ""), time.monotonic()

    def connected() -> TCPStore:
        port = int(os.environ.get("MASTER_PORT", ""))
        if launched()[0] == 0 and not held_by_launcher():
            _held(host, port)
        while True:  # a client of the store would say a lot about waiting
            try:
                socket.create_connection((host, port), timeout=5).close()
                return TCPStore(host, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
            except OSError as error:
                if (
                    held_by_launcher()
                    and isinstance(error, ConnectionRefusedError)
                    and time.monotonic() > begin + GRACE
                ):
                    raise ValueError("its launcher has ended") from None  # whose store was there before this process
                if time.monotonic() > begin + seconds:
                    raise ValueError(f"nobody answers within {seconds:g} s") from None
                time.sleep(0.1)

    try:
        client = interruptible(connected, seconds + 0.5)  # a client hears no signal, and another service never answers
    except (ValueError, OverflowError, RuntimeError, TimeoutError) as error:
        raise _unreachable(error) from None
    return PrefixStore(f"{prefix} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)


@cache
def _held(host: str, port: int) -> "Store":
    """Hold the store in this process, to its end."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore(host, port, None, True, wait_for_workers=False)


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def _unreachable(error: Exception) -> UnreachableError:
    reason = (str(error).splitlines() or ["no answer"])[0]
    return UnreachableError(
        f"cannot join the {launched()[1]} processes at {_where()}: {reason}; check that all were started with the same "
        "MASTER_ADDR and MASTER_PORT, and that the network lets them through"
    )
