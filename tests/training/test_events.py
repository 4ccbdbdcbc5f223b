"""The event log: what is written is read, whatever a kill or a full disk left; crash loops and times follow from it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmini.config import RunConfig
from dsmini.training.record import (
    Event,
    EventLog,
    crash_loops,
    goodput,
    log_path,
    put_aside_crash_loops,
    read_events,
)


def test_events_are_read_as_written(tmp_path: Path) -> None:
    log = EventLog(log_path(tmp_path), 1)
    log.write("started", 0, world_size=4, layout={"pp": 2, "dp": 2})
    log.write("step", 1, seconds=0.5, path=tmp_path)
    EventLog(log_path(tmp_path, 3), 5).write("stalled", 7, rank=2)
    started, step = read_events(tmp_path)
    assert (started["event"], started["attempt"], started["step"]) == ("started", 1, 0)
    assert started["layout"] == {"pp": 2, "dp": 2} and step["path"] == str(tmp_path)
    assert started["time"] <= step["time"]
    assert [event["attempt"] for event in read_events(tmp_path, rank=3)] == [5]


@given(cut=st.integers(0, 400), garbage=st.binary(max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_torn_line_costs_only_itself(tmp_path: Path, cut: int, garbage: bytes) -> None:
    path = log_path(tmp_path)
    path.unlink(missing_ok=True)
    for step in range(1, 4):
        EventLog(path, 1).write("step", step, seconds=1.0)
    left = path.read_bytes()[:cut]
    path.write_bytes(left + garbage)
    EventLog(path, 9).write("started", 3)
    read, complete = read_events(tmp_path), left.count(b"\n")
    assert [event["step"] for event in read[:complete]] == [1, 2, 3][:complete]
    assert read[-1]["attempt"] == 9, "what follows a torn line is read"
    assert len(read) <= complete + 2, "the torn line at most"


def test_full_disk_is_said_once_and_torn_line_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, write = EventLog(log_path(tmp_path), 1), os.write
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
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]
    assert capsys.readouterr().err.count("training continues") == 1


# --- crash loops


def events(*attempts: str) -> list[Event]:
    """Return the events of attempts, written as "started 30, step 31"."""
    return [
        {"event": words.split()[0], "time": float(number), "attempt": number, "step": int(words.split()[1])}
        for number, attempt in enumerate(attempts, 1)
        for words in attempt.split(", ")
    ]


CRASH = "started 30"


@pytest.mark.parametrize(
    ("attempts", "steps"),
    [
        ([CRASH] * 2, []),
        ([CRASH] * 3, [30]),
        (["started 0, restored 30", "started 0, restored 30", "started 0, restored 30, failed 30"], [30]),
        ([CRASH, CRASH, "started 30, stopped 30", CRASH], [30]),
        ([CRASH, CRASH, "started 30, stopped 30"], []),
        ([CRASH, CRASH, "started 30, step 31", CRASH, CRASH], []),
        ([CRASH, CRASH, "started 30, step 31", CRASH, CRASH, CRASH], [30]),
        (["started 0"] * 9, []),
        ([*[CRASH] * 3, *["started 20"] * 3], [20, 30]),
        ([*[CRASH] * 2, "started 20, step 21, step 22, saved 30", CRASH], []),
        ([*[CRASH] * 3, "quarantined 30, started 20, step 21"], []),
        (["started 30, stalled 30, failed 30"] * 3, [30]),
        (["started 20, step 21, saved 30"] * 5, []),
    ],
)
def test_crash_loops_are_counted_in_a_row(attempts: list[str], steps: list[int]) -> None:
    assert crash_loops(events(*attempts)) == steps


def checkpoints(run: Path, *steps: int) -> tuple[RunConfig, EventLog]:
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(str(step))
    return RunConfig(out=run), EventLog(log_path(run), 1)


def test_checkpoints_of_crash_loops_are_renamed_whole_and_logged_but_for_the_last(tmp_path: Path) -> None:
    history = events(*["started 20"] * 3, *[CRASH] * 3)
    for name in ("quarantined-step-000030", "quarantined-step-000030-2", "quarantined-step-000030-3"):
        run = checkpoints(tmp_path, 20, 30)
        (target,) = put_aside_crash_loops(*run, history)
        assert target.name == name and (target / "state.json").read_text() == "30"
        logged = read_events(tmp_path)[-1]
        assert (logged["event"], logged["step"], logged["folder"]) == ("quarantined", 30, name)
    assert put_aside_crash_loops(*run, history) == [] and (tmp_path / "checkpoints/step-000020").is_dir()


# --- time


def test_steps_that_were_done_again_count_once() -> None:
    log = [
        *({"event": "step", "time": 10.0 + n, "attempt": 1, "step": n, "seconds": 1.0} for n in (1, 2, 3)),
        {"event": "started", "time": 20.0, "attempt": 2, "step": 1},
        *({"event": "step", "time": 20.0 + n, "attempt": 2, "step": n, "seconds": 0.5} for n in (2, 3, 4)),
        {"event": "rewound", "time": 25.0, "attempt": 2, "step": 3},
    ]
    assert goodput(log) == (2, (1.0 + 0.5 + 0.5) / 14.0)
    assert goodput([]) == (1, None)
