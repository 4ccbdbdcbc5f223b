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


def test_events_are_read_as_written(tmp_path: Path) -> None:
    log = EventLog(log_path(tmp_path))
    log.write("started", 0, world_size=4, layout={"pp": 2, "dp": 2})
    log.write("step", 1, seconds=0.5)
    started, step = read_events(tmp_path)
    assert (started.event, started.attempt, started.step) == ("started", 1, 0)
    assert started.fields == {"world_size": 4, "layout": {"pp": 2, "dp": 2}}
    assert step.seconds() == 0.5
    assert started.time <= step.time


def test_next_attempt_appends_to_the_log(tmp_path: Path) -> None:
    for _ in range(3):
        EventLog(log_path(tmp_path)).write("started", 0)
    assert [event.attempt for event in read_events(tmp_path)] == [1, 2, 3]


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
    whole = path.read_bytes()
    left = whole[: min(cut, len(whole))]
    path.write_bytes(left + garbage)
    EventLog(path, attempt=9).write("started", 3)
    read = read_log(path)
    complete = left.count(b"\n")
    assert [event.step for event in read[:complete]] == [1, 2, 3][:complete]
    assert read[-1].attempt == 9, "what follows a torn line is read"
    assert len(read) <= complete + 2, "the torn line at most"


def test_lines_of_other_programs_are_ignored(tmp_path: Path) -> None:
    log_path(tmp_path).write_text('[]\n{"event": "step"}\n{"event": 3, "time": 1, "attempt": 1, "step": 1}\n\n\x00\n')
    assert read_events(tmp_path) == []


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    EventLog(log_path(tmp_path)).write("step", 1, seconds=math.nan, losses=[1.0, math.inf], path=tmp_path)
    (event,) = read_events(tmp_path)
    assert event.fields == {"seconds": None, "losses": [1.0, None], "path": str(tmp_path)}
    assert event.seconds() == 0


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
        assert len(said) == 1
    log.write("step", 3)
    assert [event.step for event in read_events(tmp_path)] == [1, 3]
    assert "training continues" in said[0]


def test_missing_folder_does_not_stop_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    EventLog(log_path(tmp_path / "gone"), say=said.append).write("step", 1)
    assert len(said) == 1 and "No such file" in said[0]


def test_unknown_event_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="event='stepped' is unknown; want one of started"):
        EventLog(log_path(tmp_path)).write("stepped", 1)
    assert len(set(EVENTS)) == len(EVENTS)
