"""The end of a process of several: what it says, and with which status it ends.

    what happened                       who says it                         the group      status
    all ranks raise an error (`told`)   one of them, a sentence             is destroyed   of the command: 2 or 1
    one rank fails                      it does: a sentence, or the trace   is left        of the command: 2 or 1
    another rank was lost               each, a sentence                    is left        1
    the run stands still                the rank that finds it a sentence,  is left        STALLED
                                        each its stacks

A rank that fails says so first and then ends at once, so that the others and the launcher hear of it. A group that is
destroyed waits on NCCL for its ranks, which may stand in a collective and wait for this one.
"""

import os
import re
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from dsmini.console.command import complain, leave, outcome_of, speaks
from dsmini.distributed.meeting import (
    GRACE,
    UnreachableError,
    held_by_launcher,
    is_told,
    launched,
    store_client,
    wait_for,
)

STALLED = 75
"""Exit status of every process of a run that stood still: a temporary failure, as sysexits.h has it."""
LOST = (
    *("closed by peer", "reset by peer", "broken pipe", "timed out", "application timeout", "wait timeout after"),
    *("got 0 bytes", "remote process exit", "operation timeout", "communicator was aborted"),
)
"""Parts of the messages of gloo, NCCL and the store about a rank that died or stood still, in small letters."""
SAID = "this rank has said so"
"""Note in an error that need not be said again."""


def fail(error: BaseException) -> NoReturn:
    """Say an error of this rank alone, and end its process."""
    say_failure(error)
    leave(outcome_of(error)[1])


def say_failure(error: BaseException) -> None:
    """Say an error of one rank of several, once, and before anything that may wait for another rank."""
    rank, size = launched()
    if size == 1 or is_told(error) or SAID in getattr(error, "__notes__", ()):
        return
    from torch.distributed import DistError  # torch is there once a group is: --help is instant without it

    sentence, _ = outcome_of(error)
    if lost := words_of_loss(error):
        say_lost(rank, lost)
    elif isinstance(error, DistError):
        write(f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}")
    elif sentence is None:
        write(f"rank {rank} failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
    elif sentence:
        tell(sentence, error)
    error.add_note(SAID)


def say_lost(rank: int, reason: str) -> None:
    """Say that another rank is gone."""
    write(f"rank {rank}: lost another process ({reason}); a run of dsmini.train continues with --resume")


def write(words: str) -> None:
    """Print a line in one write, as other ranks write too, and past the lock of print, which a hung thread may hold."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"{words}\n".encode(errors="replace"))


def tell(sentence: str, error: BaseException) -> None:
    """Print what is wrong, unless another process of the command does: torchrun ends all once one has ended.

    Args:
        error: one that was `told` is raised by all ranks.
    """
    rank, size = launched()
    if isinstance(error, KeyboardInterrupt):  # of them all
        if speaks():
            complain(sentence, error)
        return
    own = f"rank {rank}: {sentence}" if rank else sentence
    try:
        if size == 1 or isinstance(error, UnreachableError):
            raise UnreachableError
        store = store_client("meeting", GRACE)
    except UnreachableError:
        complain(own)
        return
    words = sentence if is_told(error) else own
    # KeyboardInterrupt: torchrun ends all once one has ended; RuntimeError: rank 0 held the store, and has ended
    with suppress(KeyboardInterrupt, RuntimeError):
        store.set(f"rank {rank}", words)
        if rank:  # rank 0 may be about to say the same
            wait_for(store, ["said"], GRACE / 4)
        if store.add("speakers", 1) == 1:
            complain(words)
            store.set("said", "")
        wait_for(store, ["said"], GRACE)
        store.set(f"heard {rank}", "")
        if rank == 0 and not held_by_launcher():
            wait_for(store, [f"heard {other}" for other in range(size)], GRACE)


def words_of_loss(error: BaseException) -> str:
    """Return what an error says of another rank that died or stood still, "" for nothing.

    gloo's and NCCL's have no types for it. torch's pipeline raises an error of its own on top.
    """
    if not isinstance(error, RuntimeError):
        return ""
    words = " ".join(str(error).split())
    if any(part in words.lower() for part in LOST):
        return re.sub(r"^\[\S+\] ", "", words).partition(". This is typically")[0]  # without gloo's file and advice
    cause = error.__cause__ or error.__context__
    return "" if cause is None else words_of_loss(cause)
