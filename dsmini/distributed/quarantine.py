"""Checkpoints that no attempt survives: found in the event log, and put aside.

A checkpoint may be whole and yet end every attempt that starts from it: a loss that is not finite, an index out of
range, memory that does not suffice. Restarting from it again and again is a crash loop. After `at_most` attempts that
ended in it without a single step it is renamed, and the next attempt takes the one before:

    checkpoints/step-000030   ->   checkpoints/quarantined-step-000030

If none is left the run must end with an error. To start from step 0 instead would throw away all that was trained.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dsmini.atomic import sync
from dsmini.distributed.events import Event, EventLog

AT_MOST = 3
"""Attempts from one checkpoint without a step."""


def crash_loops(events: Iterable[Event], at_most: int = AT_MOST) -> list[int]:
    """Return the steps of the checkpoints from which `at_most` attempts in a row failed before their first step.

    An attempt that was stopped on purpose does not count, nor one from step 0, which has no checkpoint. A checkpoint
    that is saved again, or put in quarantine, starts without a count.

    Args:
        events: of attempts that have ended: read them before the new attempt logs its start.
    """
    if at_most < 1:
        raise ValueError(f"at_most={at_most} attempts for a checkpoint, want 1 or more; the default is {AT_MOST}")
    failures: Counter[int] = Counter()
    attempt: int | None = None
    start: int | None = None  # step of the checkpoint from which this attempt has not got on so far
    for event in events:
        if event.attempt != attempt or event.event == "started":
            failures.update([] if start is None else [start])
            attempt, start = event.attempt, None
        if event.event in ("started", "restored"):
            start = event.step
        elif event.event == "step":
            failures.pop(event.step - 1 if start is None else start, None)
            start = None
        elif event.event in ("stopped", "finished"):
            start = None
        elif event.event in ("saved", "quarantined"):
            failures.pop(event.step, None)
    failures.update([] if start is None else [start])
    return sorted(step for step, count in failures.items() if step > 0 and count >= at_most)


def quarantine(folder: Path, log: EventLog | None = None) -> Path:
    """Rename the folder of a checkpoint so that no attempt starts from it; return the new name.

    Raises: OSError; the checkpoint then has its old name.
    """
    target = folder.with_name(f"quarantined-{folder.name}")
    number = 2
    while os.path.lexists(target):  # the run came to the same step again
        target = folder.with_name(f"quarantined-{folder.name}-{number}")
        number += 1
    os.rename(folder, target)
    sync(folder.parent)
    if log is not None:
        log.write("quarantined", _step(folder), folder=target.name)
    return target


def leave_out_crash_loops(
    run: Path, events: Iterable[Event], log: EventLog | None = None, at_most: int = AT_MOST
) -> list[Path]:
    """Put the checkpoints of crash loops in quarantine; return the folders that this call renamed.

    Raises: ValueError if a run that had checkpoints has none left. It is raised on every later start too.
    """
    bad = set(crash_loops(events, at_most))
    renamed = [quarantine(folder, log) for folder in _folders(run, r"step-\d+") if _step(folder) in bad]
    aside = _folders(run, r"quarantined-step-\d+(-\d+)?")
    if aside and not _folders(run, r"step-\d+"):
        names = ", ".join(folder.name for folder in aside)
        raise ValueError(
            f"{run} has no checkpoint left: {at_most} attempts in a row failed from each of {names}; find the cause in "
            "its logs, then rename one to step-... to continue from it, or start a new run"
        )
    return renamed


def _folders(run: Path, pattern: str) -> list[Path]:
    return sorted(path for path in run.glob("checkpoints/*") if re.fullmatch(pattern, path.name))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
