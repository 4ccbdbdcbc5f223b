"""Crash loops are found in the event log; their checkpoints are put aside, and step 0 is never a way out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmini.distributed.events import Event, EventLog, log_path, read_events
from dsmini.distributed.quarantine import crash_loops, leave_out_crash_loops, quarantine


def events(*attempts: str) -> list[Event]:
    """Return the events of attempts, written as "started 30, step 31"."""
    return [
        Event(event=words.split()[0], time=0.0, attempt=number, step=int(words.split()[1]))
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


@given(st.lists(st.sampled_from([CRASH, "started 20", "started 30, step 31", "started 20, step 21"]), max_size=20))
def test_no_checkpoint_with_a_later_step_is_left_out(attempts: list[str]) -> None:
    for step in crash_loops(events(*attempts), at_most=2):
        of = [attempt for attempt in attempts if attempt.startswith(f"started {step}")]
        assert len(of) >= 2 and not any("step" in attempt for attempt in of[-2:])


def checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(str(step))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_checkpoint_is_renamed_whole_and_logged(tmp_path: Path) -> None:
    checkpoints(tmp_path, 30)
    log = EventLog(log_path(tmp_path))
    for name in ("quarantined-step-000030", "quarantined-step-000030-2", "quarantined-step-000030-3"):
        target = quarantine(tmp_path / "checkpoints" / "step-000030", log)
        assert target.name == name and (target / "state.json").read_text() == "30"
        assert read_events(tmp_path)[-1].step == 30 and read_events(tmp_path)[-1].fields == {"folder": name}
        checkpoints(tmp_path, 30)


def test_run_continues_from_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints(tmp_path, 20, 30)
    renamed = leave_out_crash_loops(tmp_path, events(CRASH, CRASH, CRASH))
    assert [path.name for path in renamed] == ["quarantined-step-000030"]
    assert names(tmp_path) == ["quarantined-step-000030", "step-000020"]
    assert leave_out_crash_loops(tmp_path, []) == []


def test_run_without_a_checkpoint_left_is_refused_each_time(tmp_path: Path) -> None:
    checkpoints(tmp_path, 20, 30)
    history = events(*[CRASH] * 3, *["started 20"] * 3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no checkpoint left: 3 .* from each of quarantined-step-000020, quara"):
            leave_out_crash_loops(tmp_path, history)
    assert names(tmp_path) == ["quarantined-step-000020", "quarantined-step-000030"]
    (tmp_path / "checkpoints" / "quarantined-step-000020").rename(tmp_path / "checkpoints" / "step-000020")
    assert leave_out_crash_loops(tmp_path, []) == [], "the way out that the error names"


def test_new_run_has_nothing_to_leave_out(tmp_path: Path) -> None:
    assert leave_out_crash_loops(tmp_path, []) == []
    with pytest.raises(ValueError, match="at_most=0 attempts for a checkpoint, want 1 or more"):
        crash_loops([], at_most=0)
