"""The event log: what is written is read, whatever a kill or a full disk left."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmini.distributed.events import EVENTS, EventLog, log_path, read_events, read_log


def test_events_are_read_as_written_and_the_next_attempt_appends(tmp_path: Path) -> None:
    log = EventLog(log_path(tmp_path))
    log.write("started", 0, world_size=4, layout={"pp": 2, "dp": 2})
    log.write("step", 1, seconds=0.5, losses=[1.0, math.inf], loss=math.nan, path=tmp_path)
    EventLog(log_path(tmp_path)).write("started", 1, seconds=math.nan)
    started, step, again = read_events(tmp_path)
    assert (started.event, started.attempt, started.step) == ("started", 1, 0)
    assert started.fields == {"world_size": 4, "layout": {"pp": 2, "dp": 2}}
    assert step.fields == {"seconds": 0.5, "losses": [1.0, None], "loss": None, "path": str(tmp_path)}
    assert (step.seconds(), again.seconds()) == (0.5, 0) and again.attempt == 2
    assert started.time <= step.time


def test_other_ranks_have_logs_of_their_own(tmp_path: Path) -> None:
    EventLog(log_path(tmp_path, 3), attempt=5).write("fault", 7, kind="kill")
    assert (tmp_path / "events-rank-0003.jsonl").exists()
    assert read_events(tmp_path) == []
    assert [event.attempt for event in read_events(tmp_path, rank=3)] == [5]


@given(cut=st.integers(0, 400), garbage=st.binary(max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torn_line_costs_only_itself(tmp_path: Path, cut: int, garbage: bytes) -> None:
    path = log_path(tmp_path)
    path.unlink(missing_ok=True)
    log = EventLog(path)
    for step in range(1, 4):
        log.write("step", step, seconds=1.0)
    left = path.read_bytes()[:cut]
    path.write_bytes(left + garbage)
    EventLog(path, attempt=9).write("started", 3)
    read, complete = read_log(path), left.count(b"\n")
    assert [event.step for event in read[:complete]] == [1, 2, 3][:complete]
    assert read[-1].attempt == 9, "what follows a torn line is read"
    assert len(read) <= complete + 2, "the torn line at most"


def test_lines_of_other_programs_are_ignored(tmp_path: Path) -> None:
    log_path(tmp_path).write_text('[]\n{"event": "step"}\n{"event": 3, "time": 1, "attempt": 1, "step": 1}\n\n\x00\n')
    assert read_events(tmp_path) == []


def test_full_disk_is_said_once_and_torn_line_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log, write = EventLog(log_path(tmp_path), say=said.append), os.write
    log.write("step", 1)

    def short(descriptor: int, line: bytes) -> int:
        return write(descriptor, line[:10])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in (short, full, short):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", broken)
            log.write("step", 2)
    log.write("step", 3)
    assert [event.step for event in read_events(tmp_path)] == [1, 3]
    assert len(said) == 1 and "training continues" in said[0]


def test_missing_folder_does_not_stop_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    EventLog(log_path(tmp_path / "gone"), say=said.append).write("step", 1)
    assert len(said) == 1 and "No such file" in said[0]


def test_unknown_event_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="event='stepped' is unknown; want one of started"):
        EventLog(log_path(tmp_path)).write("stepped", 1)
    assert len(set(EVENTS)) == len(EVENTS)
