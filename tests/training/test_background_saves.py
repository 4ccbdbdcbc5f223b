"""Checkpoints written by a thread: of the state when they were asked for, one after the other, errors reported."""

import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dsmini.training import saving
from dsmini.training.record import read_events
from dsmini.training.run import TrainingRun
from tests.helpers.runs import calls, kill, new_run, stopped

BEHIND: dict[str, Any] = {"save_in_background": True, "keep": 9}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold every save until the event is set."""
    opened, real = threading.Event(), saving.save_pieces

    def held(*args: Any) -> None:
        assert opened.wait(20)
        real(*args)

    monkeypatch.setattr(saving, "save_pieces", held)
    return opened


def begun(folder: Path) -> TrainingRun:
    """Return a run after its first step."""
    training = new_run(folder, **BEHIND)
    (folder / "metrics.jsonl").touch()
    step(training)
    return training


def step(training: TrainingRun) -> None:
    training._keep(training.trainer.step())


def test_file_has_the_state_of_the_moment_it_was_asked_for(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    twin = begun(tmp_path / "b")
    twin.saver.save()
    gate.clear()
    training = begun(tmp_path / "a")
    training.saver.save(background=True)
    step(training)  # every parameter and moment moves while the thread has written nothing
    assert not list(tmp_path.glob("a/checkpoints/step*"))
    gate.set()
    training.saver.finish()
    for name in ("model", "optimizer", "rng"):
        a, b = ((tmp_path / run / f"checkpoints/step-000001/{name}.safetensors").read_bytes() for run in "ab")
        assert a == b


def test_checkpoint_is_logged_once_its_files_are_on_the_disk(tmp_path: Path, gate: threading.Event) -> None:
    """Else a run that is killed in its first save could never be resumed: the log would tell of a checkpoint."""
    training = begun(tmp_path)
    training.saver.save(background=True)
    assert [event for event in read_events(tmp_path) if event["event"] == "saved"] == []
    gate.set()
    training.saver.finish()
    assert [event["step"] for event in read_events(tmp_path) if event["event"] == "saved"] == [1]


def test_thread_of_a_save_does_not_say_that_the_steps_move(tmp_path: Path) -> None:
    """Else a main thread that hangs would count as saving."""
    training = new_run(tmp_path, **BEHIND)
    threads: set[str] = set()
    training.phase = training.trainer.phase = lambda name: threads.add(threading.current_thread().name)
    assert training.train()
    assert threads == {"MainThread"}


def test_failure_of_a_save_does_not_hide_the_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "save_pieces", Mock(side_effect=RuntimeError("the second")))
    training = new_run(tmp_path, **BEHIND)
    kill(monkeypatch, training.trainer, "forward_backward", calls(training, 2, 0), False)
    stopped(training)
