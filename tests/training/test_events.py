"""The event log: what is written is read, whatever a kill or a full disk left."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmini.training.record import EventLog, log_path, read_events


def test_events_are_read_as_written(tmp_path: Path) -> None:
    log = EventLog(log_path(tmp_path))
    log.write("started", 0, world_size=4)
    log.write("saved", 1, path=tmp_path)
    EventLog(log_path(tmp_path, 3)).write("stalled", 7, rank=2)
    started, saved = read_events(tmp_path)
    assert (started["event"], started["step"]) == ("started", 0)
    assert started["world_size"] == 4 and saved["path"] == str(tmp_path)
    assert started["time"] <= saved["time"]
    assert [event["rank"] for event in read_events(tmp_path, rank=3)] == [2]


@given(cut=st.integers(0, 400), garbage=st.binary(max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torn_line_costs_only_itself(tmp_path: Path, cut: int, garbage: bytes) -> None:
    path = log_path(tmp_path)
    path.unlink(missing_ok=True)
    log = EventLog(path)
    for step in range(1, 4):
        log.write("saved", step)
    left = path.read_bytes()[:cut]
    path.write_bytes(left + garbage)
    EventLog(path).write("started", 3)
    read, complete = read_events(tmp_path), left.count(b"\n")
    assert [event["step"] for event in read[:complete]] == [1, 2, 3][:complete]
    assert read[-1]["event"] == "started", "what follows a torn line is read"
    assert len(read) <= complete + 2, "the torn line at most"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_full_disk_is_said_once_and_torn_line_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(log_path(tmp_path))
    log.write("saved", 1)
    for _ in range(2):
        with log.path.open("a") as file:
            file.write('{"event": "sav')
        log.path = Path("/dev/full")
        log.write("saved", 2)
        log.path = log_path(tmp_path)
    log.write("saved", 3)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]
    assert capsys.readouterr().err.count("training continues") == 1
