"""The event log of a run: one line of JSON for everything that happened to it, appended and never rewritten.

runs/NAME/events.jsonl              the log of rank 0
runs/NAME/events-rank-0003.jsonl    what another rank has to say, such as a stall that it found

A line holds the event, the wall time, the attempt and the step: started (from step 0 or a checkpoint), restored, step,
saved (its files are on the disk), validated, plotted, rewound, quarantined, stalled, corrupted, and stopped, failed or
finished, one of which ends an attempt, unless it was killed. Other fields depend on the event. A restarted run appends
with the next attempt. A reader ignores a torn line, which a kill or a full disk leaves.

Two things follow from it: which checkpoints no attempt survives, and how much of the time went into steps that count.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsmini.atomic import sync
from dsmini.checkpoint.training_state import checkpoint_folder, checkpoint_folders
from dsmini.config import RunConfig
from dsmini.console.printable import printable
from dsmini.reading import read_rows

Event = Mapping[str, Any]
"""A line of the log."""
AT_MOST = 3
"""Attempts from one checkpoint without a step, after which it is put aside."""


def log_path(run: Path, rank: int = 0) -> Path:
    """Return the log of a rank in the folder of a run."""
    return run / ("events.jsonl" if rank == 0 else f"events-rank-{rank:04d}.jsonl")


class EventLog:
    """Appends events to a log. Each line is one system call, so that a kill tears at most the last one.

    The log matters less than the run: the first error of the system is told, and none is raised.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self.path, self.attempt, self.failed = path, attempt, False

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append an event."""
        row = {"event": event, "time": time.time(), "attempt": self.attempt, "step": step, **fields}
        try:
            _append(self.path, json.dumps(row, default=str).encode() + b"\n")
        except OSError as error:
            if not self.failed:
                self.failed, reason = True, error.strerror or error
                words = f"cannot write {self.path}: {reason}; training continues, some events are lost"
                with suppress(OSError):
                    print(printable(words), file=sys.stderr, flush=True)


def _append(path: Path, line: bytes) -> None:
    """Append a line in one call; end a torn line before it. Raises: OSError, also if only a part was written."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError("the disk is full")
    finally:
        os.close(descriptor)


def read_events(run: Path, rank: int = 0) -> list[Event]:
    """Return the events of a run as a rank wrote them, without torn lines; none if there is no log."""
    kinds = {"event": str, "time": int | float, "attempt": int, "step": int}
    rows = read_rows(log_path(run, rank))
    return [row for row in rows if all(isinstance(row.get(name), kind) for name, kind in kinds.items())]


# --- crash loops


def crash_loops(events: Sequence[Event]) -> list[int]:
    """Return the steps of the checkpoints from which AT_MOST attempts in a row failed before their first step.

    A checkpoint may be whole and yet end every attempt that starts from it: a loss that is not finite, memory that does
    not suffice. An attempt that was stopped on purpose does not count, nor one from step 0, which has no checkpoint. A
    checkpoint that is saved again, or put aside, starts without a count.

    Args:
        events: of attempts that have ended.
    """
    failures: Counter[int] = Counter()
    start: int | None = None  # the checkpoint from which this attempt has not got on so far
    for event in [*events, {"event": "started", "step": 0}]:
        name, step = event["event"], event["step"]
        if name == "started" and start is not None:
            failures[start] += 1
        if name in ("started", "restored"):
            start = step
        elif name == "step":
            failures.pop(step - 1 if start is None else start, None)
            start = None
        elif name in ("stopped", "finished"):
            start = None
        elif name in ("saved", "quarantined"):
            failures.pop(step, None)
    return sorted(step for step, count in failures.items() if step > 0 and count >= AT_MOST)


def put_aside_crash_loops(config: RunConfig, log: EventLog, events: Sequence[Event]) -> list[Path]:
    """Rename the checkpoints of crash loops, so that the next attempt takes the one before; return the new names.

    The last one stays in any case: a machine that ends every attempt early says nothing about its checkpoints.
    """
    assert config.out is not None
    there, renamed = config.out / "checkpoints", []
    for folder in (checkpoint_folder(config, step) for step in reversed(crash_loops(events))):
        if folder.is_dir() and len(checkpoint_folders(config.out)) > 1:
            names = (f"quarantined-{folder.name}{end}" for end in ("", *(f"-{n}" for n in range(2, 1000))))
            target = next(there / name for name in names if not os.path.lexists(there / name))
            os.rename(folder, target)
            sync(there)
            log.write("quarantined", int(folder.name.removeprefix("step-")), folder=target.name)
            renamed.append(target)
    return renamed


# --- time


def time_of_run(events: Sequence[Event]) -> dict[str, float]:
    """Return the number of attempts, the seconds from the first event to the last, and those in steps that count.

    A step counts once: a restart or a rewind takes back the steps after the checkpoint that it returns to.
    """
    counted: dict[int, float] = {}
    for event in events:
        if event["event"] in ("started", "restored", "rewound"):
            counted = {step: seconds for step, seconds in counted.items() if step <= event["step"]}
        elif event["event"] == "step":
            counted[event["step"]] = float(event.get("seconds") or 0.0)
    total = events[-1]["time"] - events[0]["time"] if events else 0.0
    attempts = len({event["attempt"] for event in events})
    return {"attempts": max(1, attempts), "seconds": max(total, 0.0), "counted": sum(counted.values())}
