"""TensorBoard files, read back with TensorBoard's own reader; nothing else needs the library."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dsmini.train import main
from dsmini.training.record import KEYS, Row, TensorBoard
from tests.helpers.commands import TINY, run
from tests.helpers.configs import refusal
from tests.helpers.runs import calls, kill, new_run, resumed, stopped

TEXT = "The quick brown fox jumps over the lazy dog. " * 100
FLAGS = ["--train.tensorboard", *TINY.split()]
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


def shown(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(events: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def record(step: int, **more: Any) -> Row:
    absent = {"skipped": False, "val_loss": None, "layer_max_vio": None, "loads": None}
    return dict.fromkeys(KEYS, step + 0.5) | {"step": step} | absent | more


@needs_tensorboard
def test_a_run_shows_the_figures_of_its_metrics(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    done = run(f"dsmini.train --data.path book.txt --out x --train.steps 4 --train.tensorboard {TINY}", tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    events = shown(tmp_path / "x/tensorboard")
    for name in [name for name in KEYS if name not in ("step", "layer_max_vio", "loads")]:
        want = [(r["step"], float(r[name])) for r in rows if r[name] is not None]
        found = scalars(events, name)
        assert [step for step, _ in found] == [step for step, _ in want], name
        assert [value for _, value in found] == pytest.approx([value for _, value in want], rel=2**-23), name


@needs_tensorboard
def test_layers_have_the_curves_and_histograms_of_the_record(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, ["block 1", "MTP 1"])
    board.add(record(1))
    board.add(record(2, layer_max_vio=[0.5, 2.0], loads=[[4, 2, 6, 4], [0, 0, 0, 12]], val_loss=3.0))
    board.add(record(3, layer_max_vio=[0.25, 1.0], loads=[[4, 4, 4, 4], [0, 0, 0, 0]]))
    board.close()
    events = shown(tmp_path)
    assert scalars(events, "max_vio/block 1") == [(2, 0.5), (3, 0.25)]
    assert scalars(events, "max_vio/MTP 1") == [(2, 2.0), (3, 1.0)]
    (histogram,) = events.Histograms("load/block 1")
    assert histogram.step == 2
    value = histogram.histogram_value
    assert (value.min, value.max, value.num, value.sum) == (0.5, 1.5, 4, 4)
    assert events.Histograms("load/MTP 1")[0].histogram_value.max == 4


@needs_tensorboard
def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    """The first process came to step 5, its last checkpoint is of step 4, which is recorded again."""
    first = new_run(tmp_path, tensorboard=True)
    kill_at = calls(first, 5, 0)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, first.trainer, "forward_backward", kill_at, False)
        stopped(first)
    assert resumed(tmp_path, tensorboard=True).train()
    assert [step for step, _ in scalars(shown(tmp_path / "tensorboard"), "loss")] == list(range(1, 9))


def test_missing_library_is_a_sentence_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # Python finds none
    (tmp_path / "book.txt").write_text(TEXT)
    sentence = refusal(main, ["--data.path", f"{tmp_path}/book.txt", "--out", f"{tmp_path}/x", *FLAGS])
    assert "pip install 'dsmini[tensorboard]'" in sentence
    assert not (tmp_path / "x").exists()
