"""The state that a resumed run restores: losses of files are reported, and totals continue."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsmini.training.outputs import summarise
from dsmini.training.record import History
from tests.helpers.runs import RICH, asked_after, new_run, resumed


def test_steps_skipped_in_a_row_are_counted_across_a_stop(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nan_at": (3, 4), "max_skipped": 2}
    training = new_run(tmp_path, **options)
    asked_after(training, 3)
    assert not training.train()
    with pytest.raises(ArithmeticError, match="in the 2 steps up to step 5"):
        resumed(tmp_path, **options).train()


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
    assert sum(row["skipped"] for row in again.history.records) == 7
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]


def test_totals_and_plots_cover_the_whole_run(never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    shutil.copytree(never_and_stopped[1], tmp_path, dirs_exist_ok=True)
    again = resumed(tmp_path, **RICH)
    before = again.history.seconds
    assert before > 0
    assert again.train()
    summary = summarise(again)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) == [row["step"] for row in again.history.records]
    assert summary["tokens"] == sum(row["tokens"] for row in rows) == 16 * again.trainer.sequences
    assert summary["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["train_seconds"] > before
    assert summary["skipped"] == 1 and summary["val_loss_ema"] == rows[-1]["val_loss_ema"]
    assert all(len(layer) == 8 for row in rows for layer in row["loads"])
    assert [max(row["layer_max_vio"]) >= row["max_vio"] for row in rows] == [True] * 8


def test_resumed_run_forgets_the_loads_of_old_steps() -> None:
    """They are as long as the run, and stay in metrics.jsonl."""
    history, row = History(20), {"loads": [[1]], "skipped": False}
    state: Any = SimpleNamespace(step=30, row=row | {"step": 30}, skipped_in_a_row=0, rewinds=0)
    assert history.restore(state, (row | {"step": step} for step in range(1, 41)), complete=True) == 0
    assert [bool(row["loads"]) for row in history.records] == [False] * 20 + [True] * 10
