"""The event log of a run: one line of JSON for everything that happened to it, appended and never rewritten.

runs/NAME/events.jsonl              the log of rank 0, from which goodput.py and quarantine.py read
runs/NAME/events-rank-0003.jsonl    what another rank has to say, such as a fault that was injected into it

A line holds the event, the wall time, the attempt and the step; other fields depend on the event. A restarted run
appends to the same file, with the next attempt. A reader ignores a torn line, which a kill or a full disk leaves.

| event | fields |
| --- | --- |
| started | step it resumes from (0: a new run), world_size, layout |
| restored | step, seconds |
| step | step, seconds |
| saved | step, seconds that training was blocked, background: seconds in which it was written meanwhile |
| validated, plotted | step, seconds |
| rewound | step it returned to, seconds |
| quarantined | step of the checkpoint |
| stalled | step, rank, sentence, seconds |
| corrupted | step, rank |
| fault | step, rank, kind, phase: a fault that was injected on purpose |
| stopped, failed, finished | step; one of them ends an attempt, unless it was killed |

`seconds` ends where its event is written, or, for a save, where its time in the background begins.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmini.console.printable import printable
from dsmini.reading import is_there, open_regular, parse_json

EVENTS = (
    *("started", "restored", "step", "saved", "validated", "plotted", "rewound", "quarantined", "stalled"),
    *("corrupted", "fault", "stopped", "failed", "finished"),
)
"""Names of all events."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line of an event log."""

    event: str
    """One of EVENTS."""
    time: float
    """Wall time in seconds since 1970; it may step back where a clock was set."""
    attempt: int
    """Number of the attempt, from 1."""
    step: int
    """Number of steps done."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the line."""

    def seconds(self, name: str = "seconds") -> float:
        """Return a duration among the fields; 0 where it is missing or not a duration."""
        value = self.fields.get(name)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            return 0.0
        return float(value)


def log_path(run: Path, rank: int = 0) -> Path:
    """Return the log of a rank in the folder of a run."""
    return run / ("events.jsonl" if rank == 0 else f"events-rank-{rank:04d}.jsonl")


class EventLog:
    """Appends events to a log. Each line is one system call, so that a kill tears at most the last one.

    The log matters less than the run: `write` reports the first error of the system and does not raise it.

    Args:
        path: see `log_path`.
        attempt: number of this attempt, the same on all ranks; None for one more than the log has.
        say: told once that the log cannot be written; prints to stderr by default.
    """

    def __init__(self, path: Path, attempt: int | None = None, say: Callable[[str], None] | None = None) -> None:
        self.path, self.say = path, say or _to_stderr
        self.attempt = 1 + max((event.attempt for event in read_log(path)), default=0) if attempt is None else attempt
        """Number of this attempt."""
        self.failed = False
        """True once a line could not be written."""

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Append an event. Fields that are not finite become null.

        Raises: ValueError for an event that is not one of EVENTS.
        """
        if event not in EVENTS:
            raise ValueError(f"event={event!r} is unknown; want one of {', '.join(EVENTS)}")
        line = {"event": event, "time": time.time(), "attempt": self.attempt, "step": step} | _plain(fields)
        try:
            _append(self.path, json.dumps(line, default=str).encode() + b"\n")
        except OSError as error:
            if not self.failed:
                self.failed = True
                self.say(
                    f"cannot write {self.path}: {error.strerror or error}; training continues, some events are lost"
                )


def read_events(run: Path, rank: int = 0) -> list[Event]:
    """Return the events of a run as a rank wrote them, in the order of the log; none if there is no log."""
    return read_log(log_path(run, rank))


def read_log(path: Path) -> list[Event]:
    """Return the events of a log, without lines that are torn or that no event log has."""
    events = []
    if not is_there(path):
        return events
    with open_regular(path) as file:
        for line in file:
            with suppress(ValueError):
                events.append(_event(parse_json(line.decode(errors="replace"), path.name)))
    return events


def _event(row: Any) -> Event:
    wanted = {"event": str, "time": int | float, "attempt": int, "step": int}
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in wanted.items()):
        raise ValueError(f"{row!r} is not an event")
    if row["event"] not in EVENTS:
        raise ValueError(f"{row['event']!r} is not an event of this version")
    return Event(
        event=row["event"],
        time=float(row["time"]),
        attempt=row["attempt"],
        step=row["step"],
        fields={name: value for name, value in row.items() if name not in wanted},
    )


def _append(path: Path, line: bytes) -> None:
    """Append a line in one call; end a torn line before it. Raises: OSError, also if only a part was written."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError("the disk is full")
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _to_stderr(sentence: str) -> None:
    with suppress(OSError):
        print(printable(sentence), file=sys.stderr, flush=True)
