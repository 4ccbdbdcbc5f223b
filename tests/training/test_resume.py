"""A run that was stopped anywhere and resumed is the run that was never stopped, bit for bit; and what it saves."""

import dataclasses
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig
from dsmini.checkpoint.training_state import Checkpoint
from dsmini.training import saving
from dsmini.training.origin import RunOrigin, find_origin
from dsmini.training.outputs import summarise
from dsmini.training.record import History, read_events
from dsmini.training.run import TrainingRun
from dsmini.training.start import started
from tests.conftest import SMALL
from tests.helpers.configs import DSA, GLM, V4_MODEL
from tests.helpers.runs import RICH, asked_after, die, differences, new_run, resumed, saved

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "bf16 moments": {"moments": "bfloat16"},
    "average": {"ema_decay": 0.9},
    "accumulation": {"grad_accum": 2},
    "skipped": {"nan_at": (2, 3)},
    "recompute": {"recompute": True},
    "warm-up of indexers": {"model": DSA, "dsa_stage": "warmup", "optimizer": "muon", "ema_decay": 0.9},
    "sparse attention": {"model": DSA, "optimizer": "muon", "recompute": True, "grad_accum": 2},
    "shared choices": {"model": GLM | {"indexer_target": "served"}, "optimizer": "muon", "recompute": True},
    "V4": {"model": V4_MODEL, "optimizer": "muon", "grad_accum": 2, "ema_decay": 0.9},
    "Engram": {"model": {"engram_layer_ids": (0, 1), "engram_vocab_size": 50}, "optimizer": "muon", "grad_accum": 2},
    "rich": RICH,
}
PLACES: dict[str, tuple[int, Callable[[TrainingRun], bool]]] = {
    "between micro-batches": (4, lambda t: die(t, t.trainer, "losses", 5, 1)),
    "after backward": (4, lambda t: die(t, t.trainer, "forward_backward", 5, after=True)),
    "between the optimizers": (4, lambda t: die(t, t.trainer.optimizers[-1], "step", 5)),
    "in the validation": (6, lambda t: die(t, t.trainer, "_score", 6, after=True)),
    "at a disk without room for a row": (5, lambda t: die(t, t, "_record", 5, error=OSError)),
    "after the last row": (8, lambda t: die(t, t, "_record", 8, after=True)),
    "in the last validation": (8, lambda t: die(t, t.trainer, "validate", 8)),
}
"""Places of death, and the step of the checkpoint from which the run continues."""
# every place with everything on, and every option once: together they would take minutes
CASES = [("rich", place) for place in PLACES] + [(name, "after backward") for name in OPTIONS if name != "rich"]
QUICK = {
    ("rich", "at a disk without room for a row"),
    ("rich", "after backward"),
    ("rich", "between the optimizers"),
    ("rich", "in the validation"),
}
QUICK |= {(options, "after backward") for options in ("adamw", "skipped", "sparse attention")}
SLOW = ((os, "fsync"), (shutil, "rmtree"), (saving, "_write_all"))
"""Calls of a save; os.rename is tried by default."""
Start = Callable[[str, Path], TrainingRun]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run with these options that nothing stops; trained once."""

    @cache
    def run(name: str) -> Path:
        training = new_run(tmp_path_factory.mktemp("unstopped"), **OPTIONS[name])
        assert training.train()
        return training.folder

    return run


@pytest.fixture(scope="module")
def at_step_4(tmp_path_factory: pytest.TempPathFactory, half: Path) -> Start:
    """Return a function that puts a run which was killed after step 4 into a folder, ready to take step 5."""

    @cache
    def killed(name: str) -> Path:
        if name == "rich":
            return half
        training = new_run(tmp_path_factory.mktemp("killed"), **OPTIONS[name])
        assert die(training, training.trainer, "forward_backward", 4)
        return training.folder

    def begin(name: str, folder: Path) -> TrainingRun:
        shutil.copytree(killed(name), folder, dirs_exist_ok=True)
        return resumed(folder, **OPTIONS[name])

    return begin


@pytest.mark.parametrize(
    ("options", "place"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_resumed_run_is_the_one_never_stopped(
    unstopped: Callable[[str], Path], at_step_4: Start, tmp_path: Path, options: str, place: str
) -> None:
    step, killed = PLACES[place]
    assert killed(at_step_4(options, tmp_path))
    again = resumed(tmp_path, **OPTIONS[options])
    assert again.saver.saved_at == (2 if options == "skipped" else step), (
        "weights that no step moved are not saved again"
    )
    assert again.train()
    assert differences(tmp_path, unstopped(options)) == []


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "rename"), *(pytest.param(o, n, marks=pytest.mark.slow) for o, n in SLOW)]
)
def test_a_run_stopped_at_any_moment_of_a_save(
    unstopped: Callable[[str], Path], at_step_4: Start, tmp_path: Path, owner: Any, name: str
) -> None:
    """Stop before each call of a function by the save after step 6, until it makes no further one."""
    for number in itertools.count():
        folder = tmp_path / f"{number}"
        if not die(at_step_4("rich", folder), owner, name, 6, number):
            assert number > 0
            return
        said: list[str] = []
        again = resumed(folder, said=said, **RICH)
        assert again.saver.saved_at in (4, 6) and said == []  # one or the other whole, and nothing half
        assert again.train()
        assert differences(folder, unstopped("rich")) == []
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_a_run_stopped_again_and_again(unstopped: Callable[[str], Path], tmp_path: Path) -> None:
    """Each time asked to stop, as by Ctrl-C, after one step."""
    training = new_run(tmp_path, **RICH)
    for done in range(8):
        asked_after(training, done)
        assert not training.train()
        training = resumed(tmp_path, **RICH)
    assert training.trainer.steps_done == 8
    assert training.train()
    assert differences(tmp_path, unstopped("rich")) == []


# what is restored besides tensors


def test_steps_skipped_in_a_row_are_counted_across_a_stop(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nan_at": (3, 4), "max_skipped": 2}
    training = new_run(tmp_path, **options)
    asked_after(training, 3)
    assert not training.train()
    with pytest.raises(ArithmeticError, match="in the 2 steps up to step 5"):
        resumed(tmp_path, **options).train()
    assert TrainConfig().max_skipped == 10


def test_a_run_that_gave_up_keeps_what_it_can_go_back_to(tmp_path: Path) -> None:
    """Steps 5 to 8 are skipped: checkpoints of the same weights must not take the place of an earlier one."""
    options: dict[str, Any] = {"steps": 12, "keep": 1, "max_skipped": 4}
    training = new_run(tmp_path, **options, save_every=3, nan_at=tuple(range(4, 12)))
    with pytest.raises(ArithmeticError) as error:
        training.train()
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000003", "step-000008"]
    lower = "--train.lr 0.005"
    advice = f"start from an earlier state with --init {folders[0]} {lower}"
    assert advice in str(error.value)
    with pytest.raises(ArithmeticError) as error:  # its last checkpoint is of the state that gave up
        resumed(shutil.copytree(tmp_path, tmp_path / "copy"), **options, nan_at=(8, 9, 10, 11)).train()
    assert advice.replace(str(tmp_path), str(tmp_path / "copy")) in str(error.value)
    again = resumed(tmp_path, **options, save_every=2, nan_at=(8, 9, 10))  # as many as it had before
    assert again.train()
    assert sum(row["skipped"] for row in again.history.records) == 7
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]


def test_totals_and_plots_cover_the_whole_run(at_step_4: Start, tmp_path: Path) -> None:
    again = at_step_4("rich", tmp_path)
    before = again.history.seconds
    assert again.train()
    summary = summarise(again)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) == [row["step"] for row in again.history.records]
    assert summary["tokens"] == sum(row["tokens"] for row in rows) == 16 * again.trainer.sequences
    assert summary["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["train_seconds"] > before > 0
    assert summary["skipped"] == 1 and summary["val_loss_ema"] == rows[-1]["val_loss_ema"]
    assert all(len(layer) == 8 for row in rows for layer in row["loads"])
    assert [max(row["layer_max_vio"]) >= row["max_vio"] for row in rows] == [True] * 8


def test_resumed_run_forgets_the_loads_of_old_steps() -> None:
    """They are as long as the run, and stay in metrics.jsonl."""
    history, row = History(20), {"loads": [[1]], "skipped": False}
    state: Any = SimpleNamespace(step=30, row=row | {"step": 30}, skipped_in_a_row=0, rewinds=0)
    assert history.restore(state, (row | {"step": step} for step in range(1, 41)), complete=True) == 0
    assert [bool(row["loads"]) for row in history.records] == [False] * 20 + [True] * 10


# checkpoints that a thread writes


@pytest.fixture
def behind(tmp_path: Path) -> TrainingRun:
    """Return a run that saves in the background, after its first step."""
    training = new_run(tmp_path, save_in_background=True, keep=9)
    (tmp_path / "metrics.jsonl").touch()
    training._keep(training.trainer.step())
    return training


def test_save_in_the_background_has_the_state_it_was_asked_for(
    behind: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in its first save could never be resumed, if the log told of a checkpoint."""
    opened, real = threading.Event(), saving.save_pieces
    behind.saver.save()
    want = saved(behind.folder, 1)
    shutil.rmtree(behind.folder / "checkpoints")
    (behind.folder / "events.jsonl").unlink()
    monkeypatch.setattr(saving, "save_pieces", lambda *args: (opened.wait(20), real(*args)))
    behind.saver.save(background=True)
    behind._keep(behind.trainer.step())  # every parameter and moment moves while the thread has written nothing
    assert not list(behind.folder.glob("checkpoints/step*"))
    assert [event for event in read_events(behind.folder) if event["event"] == "saved"] == []
    opened.set()
    behind.saver.finish()
    got = saved(behind.folder, 1)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)
    assert [event["step"] for event in read_events(behind.folder) if event["event"] == "saved"] == [1]


def test_thread_of_a_save_does_not_say_that_the_steps_move(behind: TrainingRun) -> None:
    """Else a main thread that hangs would count as saving."""
    threads: set[str] = set()
    behind.phase = behind.trainer.phase = lambda name: threads.add(threading.current_thread().name)
    assert behind.train()
    assert threads == {"MainThread"}


def test_failure_of_a_save_does_not_hide_the_first_error(behind: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "save_pieces", Mock(side_effect=RuntimeError("the second")))
    assert die(behind, behind.trainer, "forward_backward", 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say which files are mapped")
def test_checkpoint_is_read_once_and_unmapped_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file counts as memory, and one that is removed still takes its space."""
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    train = TrainConfig(seq_len=16, device="cpu", dtype="float32", steps=2, save_every=1, final_eval_tokens=64)
    data, out = DataConfig(path=tmp_path / "book.txt"), tmp_path / "run"
    config = RunConfig(model=ModelConfig(**SMALL | {"vocab_size": 256}), train=train, data=data, out=out)
    quiet = Console(quiet=True)
    with started(RunOrigin(config=config), config, quiet) as training:
        training.train()
    read: list[str] = []
    rows = Checkpoint.rows
    monkeypatch.setattr(Checkpoint, "rows", lambda self, name, part: (read.append(name), rows(self, name, part))[1])
    for origin, by_rows in ((find_origin(None, out, None), False), (find_origin(None, None, out), True)):
        more = dataclasses.replace(origin.config.train, steps=3, seq_len=16, device="cpu", final_eval_tokens=64)
        name = out if origin.resume else tmp_path / "other"
        config = dataclasses.replace(origin.config, train=more, out=name, data=data)
        with started(origin, config, quiet):
            maps = Path("/proc/self/maps").read_text()
            assert "model.safetensors" not in maps and bool(read) == by_rows
