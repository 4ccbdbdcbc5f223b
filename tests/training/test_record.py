"""The record of a step: metrics.jsonl written and read back, also where lines of it are not whole."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from dsmini.distributed.world import World
from dsmini.training import record
from dsmini.training.record import finite, read_records, row_of
from dsmini.training.run import newest_checkpoint
from dsmini.training.trainer import StepResult
from tests.helpers.runs import RICH, new_run

KEYS = (
    *("step", "loss", "val_loss", "lr", "tokens_per_s", "max_vio", "skipped", "mtp_loss", "balance_loss", "grad_norm"),
    *("data_wait", "memory", "tokens", "seconds", "layer_max_vio", "loads"),
)
"""Keys of metrics.jsonl, in the order in which they are written."""
OPTIONAL = ("val_loss_ema", "val_loss_at_eval_context")


def test_metrics_have_their_keys_in_order_and_read_back_equal(
    never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    lines = (never_and_stopped[1] / "metrics.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line)) for line in lines] == [(*KEYS, *OPTIONAL)] * len(lines)
    assert tuple(record.KEYS) == KEYS
    records = read_records(never_and_stopped[1])
    assert [json.dumps(row) for row in records] == lines
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records[0] | {"of_another_version": [1, "x"]}))
    assert read_records(tmp_path)[0]["of_another_version"] == [1, "x"]


def test_record_without_finite_figures_holds_none() -> None:
    losses = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "lr", "data_wait"), math.nan)
    step = StepResult(**losses, step=3, grad_norm=math.inf, tokens=8, seconds=0.5, counts=None, skipped=True)
    row = row_of(step, memory=7)
    figures = ("loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "data_wait", "max_vio", "layer_max_vio", "loads")
    assert all(row[name] is None for name in figures)
    assert (row["step"], row["tokens_per_s"], row["memory"], row["skipped"]) == (3, 16.0, 7, True)
    assert finite({"val_loss": math.inf, "val_loss_ema": 2.0}) == {"val_loss": None, "val_loss_ema": 2.0}


def test_row_with_a_missing_or_wrong_value_is_left_out(
    never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    lines = (never_and_stopped[1] / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    lacking = {key: {k: v for k, v in row.items() if k != key} for key in row}
    wrong = {key: {**row, key: {"x": 1}} for key in row}
    for bad in (lacking, wrong):
        for key, other in bad.items():
            (tmp_path / "metrics.jsonl").write_text("\n".join([lines[1], json.dumps(other), lines[2]]))
            assert [r["step"] for r in read_records(tmp_path)] == [2, *([1] if key in OPTIONAL else []), 3], key


def test_run_resumes_without_the_rows_that_are_not_whole(
    never_and_stopped: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    shutil.copytree(never_and_stopped[1], tmp_path, dirs_exist_ok=True)
    (first, *others) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    bad = [json.dumps({"step": "2", "val_loss": 1.0}), json.dumps({"step": 3, "val_loss": None}), "[]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([first, *bad, *others[1:]]) + "\n")
    training = new_run(tmp_path, **RICH)
    said: list[str] = []
    training.console = Console(file=io.StringIO(), width=200)
    training.resume(newest_checkpoint(training.config, World(), said.append))
    assert training.console.file.getvalue() == "metrics.jsonl lacks 1 of 4 steps; the plots leave them out\n"
    assert said == []
    assert training.train()
    training.plot()
    assert [row["step"] for row in training.history.records] == [1, 3, 4, 5, 6, 7, 8]


def test_metrics_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Any:
        file = MagicMock()
        file.__enter__.return_value.__iter__.side_effect = OSError(5, "Input/output error")
        return file

    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr("dsmini.reading.open_regular", broken)
    with pytest.raises(ValueError, match=r"cannot read .*/metrics.jsonl: Input/output error"):
        read_records(tmp_path)
