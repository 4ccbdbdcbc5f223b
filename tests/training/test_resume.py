"""A run that was stopped anywhere and resumed is the run that was never stopped, bit for bit."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini.checkpoint import training_state as checkpoints
from dsmini.checkpoint.run_folder import read_metrics
from dsmini.checkpoint.training_state import Checkpoint, last_checkpoint
from dsmini.training.run import TrainingRun
from dsmini.training.summary import summarise
from tests.helpers.runs import Killed, new_run, resumed, unequal, whole

RICH: dict[str, Any] = {
    "optimizer": "muon",
    "moments": "bfloat16",
    "ema_decay": 0.9,
    "grad_accum": 2,
    "batch_start": 2,
    "batch_ramp": 0.5,
    "nan_at": (2,),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "bf16 moments": {"moments": "bfloat16"},
    "average": {"ema_decay": 0.9},
    "accumulation": {"grad_accum": 2},
    "skipped": {"nan_at": (2, 3)},
    "recompute": {"recompute": True},
    "rich": RICH,
}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a run with these options is when nothing stops it; trained once."""
    known: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in known:
            training = new_run(tmp_path_factory.mktemp("unstopped"), **OPTIONS[name])
            assert training.train()
            known[name] = whole(training)
        return known[name]

    return run


def kill(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[[], bool], after: bool) -> None:
    """Make a function die, before or after its work, the first time that `when` says so."""
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        now = when()
        if now and not after:
            raise Killed
        result = real(*args, **kwargs)
        if now:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


def calls(training: TrainingRun, step: int, number: int) -> Callable[[], bool]:
    """True at the so-many-eth call (from 0) while so many steps are done."""
    count: Iterator[int] = iter(range(10**9))
    return lambda: training.trainer.steps_done == step and next(count) == number


def asked_after(training: TrainingRun, steps: int) -> None:
    """Ask it to stop, as by Ctrl-C, in the step that follows so many."""
    real = training.trainer.step

    def step() -> Any:
        if training.trainer.steps_done == steps:
            os.kill(os.getpid(), 15)
        return real()

    training.trainer.step = step


def stopped(training: TrainingRun) -> None:
    with pytest.raises(Killed):
        training.train()


Kill = Callable[[TrainingRun, pytest.MonkeyPatch], None]
PHASES: dict[str, Kill] = {
    "before the micro-batches": lambda t, m: kill(m, t.trainer, "losses", calls(t, 5, 0), False),
    "between micro-batches": lambda t, m: kill(m, t.trainer, "losses", calls(t, 5, 1), False),
    "after backward": lambda t, m: kill(m, t.trainer, "_accumulate", calls(t, 5, 0), True),
    "before the optimizer": lambda t, m: kill(m, t.trainer.optimizers[0], "step", calls(t, 5, 0), False),
    "between the optimizers": lambda t, m: kill(m, t.trainer.optimizers[-1], "step", calls(t, 5, 0), False),
    "after the optimizer": lambda t, m: kill(m, t.trainer.optimizers[-1], "step", calls(t, 4, 0), True),
    "in the validation": lambda t, m: kill(m, t.trainer.model, "hidden", calls(t, 6, 0), True),
    "after the validation": lambda t, m: kill(m, t.trainer, "validate", calls(t, 6, 0), True),
    "in the last validation": lambda t, m: kill(m, t.trainer, "validate", calls(t, 8, 0), False),
}


# every phase with everything on, and every option once: together they would take minutes
CASES = [("rich", phase) for phase in PHASES] + [
    (options, "after backward") for options in OPTIONS if options != "rich"
]


@pytest.mark.parametrize(("options", "phase"), CASES)
def test_a_resumed_run_is_the_one_never_stopped(
    unstopped: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    phase: str,
) -> None:
    want = unstopped(options)
    training = new_run(tmp_path, **OPTIONS[options])
    with monkeypatch.context() as patch:
        PHASES[phase](training, patch)
        stopped(training)
    again = resumed(tmp_path, **OPTIONS[options])
    assert again.train()
    assert unequal(whole(again), want) == set()


# The operations of a save on the disk, and how many of each the third save (step 6) makes: that is asserted below.
SAVING = {(os, "fsync"): 11, (os, "rename"): 2, (shutil, "rmtree"): 1, (checkpoints, "write_safetensors"): 4}
MOMENTS = [
    pytest.param(*place, number, after, id=f"{'after' if after else 'before'} {place[1]} {number}")
    for place, times in SAVING.items()
    for number in range(times)
    for after in ([False] if place[1] == "fsync" else [False, True])
]


@pytest.mark.parametrize(("owner", "name", "number", "after"), MOMENTS)
def test_a_run_stopped_at_any_moment_of_a_save(
    unstopped: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    number: int,
    after: bool,
) -> None:
    training = new_run(tmp_path, **RICH)
    with monkeypatch.context() as patch:
        kill(patch, owner, name, calls(training, 6, number), after)
        stopped(training)
    said: list[str] = []
    again = resumed(tmp_path, said=said, **RICH)
    assert again.saved_at in (4, 6) and said == []  # one or the other whole, and nothing half
    assert again.train()
    assert unequal(whole(again), unstopped("rich")) == set()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_those_are_all_the_moments_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = new_run(tmp_path, **RICH)
    made = dict.fromkeys(SAVING, 0)
    for owner, name in SAVING:
        real = getattr(owner, name)

        def counted(*args: Any, _real: Any = real, _place: Any = (owner, name), **kwargs: Any) -> Any:
            made[_place] += training.trainer.steps_done == 6
            return _real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    assert training.train()
    assert made == SAVING


def test_a_run_stopped_again_and_again(unstopped: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Each time asked to stop, as by Ctrl-C, after one step."""
    training = new_run(tmp_path, **RICH)
    for done in range(8):
        asked_after(training, done)
        assert not training.train()
        training = resumed(tmp_path, **RICH)
    assert training.trainer.steps_done == 8
    assert training.train()
    assert unequal(whole(training), unstopped("rich")) == set()


def test_metrics_with_a_torn_last_line(unstopped: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    training = new_run(tmp_path, steps=8)
    assert training.train()
    shutil.rmtree(tmp_path / "checkpoints/step-000008")
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines[:-40])
    again = resumed(tmp_path)
    assert again.train()
    assert unequal(whole(again), unstopped("adamw")) == set()


def test_a_row_that_lacks_something_or_has_it_of_the_wrong_kind_is_left_out(
    never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    lines = (never_and_stopped[1] / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    lacking = {key: {k: v for k, v in row.items() if k != key} for key in row}
    wrong = {key: {**row, key: {"x": 1}} for key in row}
    optional = {"val_loss_ema"}
    for bad in (lacking, wrong):
        for key, other in bad.items():
            (tmp_path / "metrics.jsonl").write_text("\n".join([lines[1], json.dumps(other), lines[2]]))
            assert [r["step"] for r in read_metrics(tmp_path)] == [2, *([1] if key in optional else []), 3], key


def test_a_run_goes_on_without_the_rows_that_are_not_whole(
    never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    shutil.copytree(never_and_stopped[1], tmp_path, dirs_exist_ok=True)
    (first, *others) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    bad = [json.dumps({"step": "2", "val_loss": 1.0}), json.dumps({"step": 3, "val_loss": None}), "[]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([first, *bad, *others[1:]]) + "\n")
    training = new_run(tmp_path, **RICH)
    said: list[str] = []
    training._say = said.append
    training.resume(last_checkpoint(tmp_path, training.parts, training.fits, said.append))
    assert said == ["metrics.jsonl lacks 1 of 4 steps; the plots leave them out"]
    assert training.train()
    training.plot()
    assert [row["step"] for row in training.rows] == [1, 3, 4, 5, 6, 7, 8]


def part(name: str, **named: Any) -> Callable[[Checkpoint], Checkpoint]:
    return lambda c: dataclasses.replace(c, tensors={**c.tensors, name: {**c.tensors[name], **named}})


def state(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    return lambda c: dataclasses.replace(c, state=dataclasses.replace(c.state, **changes))


def zeroed(name: str, ending: str = "") -> Callable[[Checkpoint], Checkpoint]:
    return lambda c: dataclasses.replace(
        c,
        tensors={
            **c.tensors,
            name: {key: t * 0 if key.endswith(ending) else t for key, t in c.tensors[name].items()},
        },
    )


LOST: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "weights": zeroed("model", "norm.weight"),
    "routing bias": zeroed("model", "gate.bias"),
    "first moment": zeroed("optimizer", "/exp_avg"),
    "second moment": zeroed("optimizer", "/exp_avg_sq"),
    "optimizer's steps": zeroed("optimizer", "/step"),
    "momentum": zeroed("optimizer", "/momentum"),
    "all moments": lambda c: dataclasses.replace(c, tensors={**c.tensors, "optimizer": {}}),
    "average": zeroed("average"),
    "average's updates": state(average_updates=0),
    "random state": lambda c: part("rng", cpu=torch.Generator().manual_seed(1).get_state())(c),
    "step": state(step=3),
    "data position": state(sequences=0),
    "skipped": state(skipped=0),
    "best": state(best_val_loss=None, best_val_step=None),
    "row": lambda c: state(row={**c.state.row, "loss": 0.0})(c),
}


def falling_behind(training: TrainingRun) -> TrainingRun:
    """The best validation is the first, so that forgetting it shows."""
    training.trainer.validate = lambda *_, **__: float(training.trainer.steps_done)
    return training


@pytest.fixture(scope="module")
def never_and_stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a run is that nothing stopped, and the folder of its twin that was stopped after step 4."""
    never, folder = (
        falling_behind(new_run(tmp_path_factory.mktemp("never"), **RICH)),
        tmp_path_factory.mktemp("stopped"),
    )
    assert never.train()
    want = whole(never)  # now: the random state in it is the process's
    training = falling_behind(new_run(folder, **RICH))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, training.trainer, "_accumulate", calls(training, 4, 0), False)
        stopped(training)
    return want, folder


@pytest.mark.parametrize("lost", [None, *LOST])
def test_whatever_is_not_restored_is_noticed(
    never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path, lost: str | None
) -> None:
    never, folder = never_and_stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    again = falling_behind(resumed(tmp_path, LOST[lost] if lost else lambda c: c, **RICH))
    assert again.train()
    assert bool(unequal(whole(again), never)) == bool(lost)


@pytest.mark.parametrize("lost", [False, True])
def test_steps_skipped_in_a_row_are_counted_across_a_stop(tmp_path: Path, lost: bool) -> None:
    options: dict[str, Any] = {"nan_at": (3, 4), "max_skipped": 2}
    training = new_run(tmp_path, **options)
    asked_after(training, 3)
    assert not training.train()
    again = resumed(tmp_path, state(skipped_in_a_row=0) if lost else lambda c: c, **options)
    if lost:
        assert again.train()
    else:
        with pytest.raises(ArithmeticError, match="in the 2 steps up to step 5"):
            again.train()


def test_a_run_that_gave_up_keeps_what_it_can_go_back_to(tmp_path: Path) -> None:
    """Steps 5 to 8 are skipped: checkpoints of the same weights must not take the place of an earlier one."""
    options: dict[str, Any] = {"steps": 12, "keep": 1, "max_skipped": 4}
    training = new_run(tmp_path, **options, save_every=3, nan_at=tuple(range(4, 12)))
    with pytest.raises(ArithmeticError) as error:
        training.train()
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000003", "step-000008"]
    lower = "--train.lr 0.005"
    assert f"--resume {tmp_path} {lower}, or from further back with --init {folders[0]} {lower}" in str(error.value)
    again = resumed(tmp_path, **options, save_every=2, nan_at=(8, 9, 10))  # as many as it had before
    assert again.train()
    assert again.skipped == 7
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]


def test_totals_and_plots_cover_the_whole_run(never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    shutil.copytree(never_and_stopped[1], tmp_path, dirs_exist_ok=True)
    again = resumed(tmp_path, **RICH)
    before = again.seconds
    assert before > 0
    assert again.train()
    summary = summarise(again)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) == [row["step"] for row in again.rows]
    assert summary["tokens"] == sum(row["tokens"] for row in rows) == 16 * again.trainer.sequences
    assert summary["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["train_seconds"] > before
    assert summary["skipped"] == 1 and summary["val_loss_ema"] == rows[-1]["val_loss_ema"]
    assert all(len(layer) == 8 for row in rows for layer in row["loads"])
    assert [max(row["layer_max_vio"]) >= row["max_vio"] for row in rows] == [True] * 8


def test_more_steps_keep_what_was_measured(tmp_path: Path) -> None:
    assert (training := new_run(tmp_path, steps=4)).train()
    longer = resumed(tmp_path, steps=8)
    assert longer.train()
    assert longer.rows[3]["val_loss"] == training.rows[3]["val_loss"]
    assert [row["val_loss"] is not None for row in longer.rows] == [s in (3, 4, 6, 8) for s in range(1, 9)]
