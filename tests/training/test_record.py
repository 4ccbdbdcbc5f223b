"""The record of a run: metrics.jsonl, the event log and TensorBoard's files, as they are written and read back."""

import io
import itertools
import json
import math
import shutil
import sys
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from dsmini.diagnosis.contention import OtherPrograms
from dsmini.diagnosis.watch import RunWatch
from dsmini.distributed.world import World
from dsmini.measure.cpu_time import CpuTimes
from dsmini.train import main
from dsmini.training import record
from dsmini.training.record import EventLog, TensorBoard, finite, log_path, read_events, row_of
from dsmini.training.run import BindingChange, newest_checkpoint
from dsmini.training.trainer import StepResult
from tests.helpers.commands import TINY
from tests.helpers.configs import refusal
from tests.helpers.runs import RICH, die, differences, new_run, read_records, resumed

KEYS = (
    *("step", "loss", "val_loss", "lr", "tokens_per_s", "max_vio", "skipped", "mtp_loss", "balance_loss", "grad_norm"),
    *("data_wait", "memory", "tokens", "seconds", "layer_max_vio", "loads"),
)
"""Keys of metrics.jsonl, in the order in which they are written."""
OPTIONAL = ("val_loss_ema", "val_loss_at_eval_context")


def test_metrics_have_their_keys_in_order_and_read_back_equal(half: Path, tmp_path: Path) -> None:
    lines = (half / "metrics.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line)) for line in lines] == [(*KEYS, *OPTIONAL)] * len(lines)
    assert tuple(record.KEYS) == KEYS
    records = read_records(half)
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


def test_row_with_a_missing_or_wrong_value_is_left_out(half: Path, tmp_path: Path) -> None:
    lines = (half / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    lacking = {key: {k: v for k, v in row.items() if k != key} for key in row}
    wrong = {key: {**row, key: {"x": 1}} for key in row}
    for bad in (lacking, wrong):
        for key, other in bad.items():
            (tmp_path / "metrics.jsonl").write_text("\n".join([lines[1], json.dumps(other), lines[2]]))
            assert [r["step"] for r in read_records(tmp_path)] == [2, *([1] if key in OPTIONAL else []), 3], key


def test_run_resumes_without_the_rows_that_are_not_whole(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
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


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens, and cannot be read")
def test_metrics_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/proc/self/mem")
    assert "metrics.jsonl: Input/output error" in refusal(read_records, tmp_path)


# the event log


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


# TensorBoard's files, read back by its own reader


needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


def shown(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(events: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


@needs_tensorboard
def test_layers_have_the_curves_and_histograms_of_the_record(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, ["block 1", "MTP 1"])
    loads = {2: [[4, 2, 6, 4], [0, 0, 0, 12]], 3: [[4, 4, 4, 4], [0, 0, 0, 0]]}
    for step, max_vio in ((1, None), (2, [0.5, 2.0]), (3, [0.25, 1.0])):
        absent = {"skipped": False, "val_loss": 3.0 if step == 2 else None}
        row = dict.fromkeys(KEYS, step + 0.5) | {"step": step} | absent
        board.add(row | {"layer_max_vio": max_vio, "loads": loads.get(step)})
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
def test_a_resumed_run_shows_the_figures_of_its_metrics_once(tmp_path: Path) -> None:
    """The first process came to step 5, its last checkpoint is of step 4, which is recorded again."""
    first = new_run(tmp_path, tensorboard=True)
    assert die(first, first.trainer, "forward_backward", 5)
    assert resumed(tmp_path, tensorboard=True).train()
    rows, events = read_records(tmp_path), shown(tmp_path / "tensorboard")
    for name in (name for name in KEYS if name not in ("step", "layer_max_vio", "loads")):
        steps, values = zip(*scalars(events, name), strict=True)
        there = [row for row in rows if row[name] is not None]
        assert [*steps] == [row["step"] for row in there], name
        assert values == pytest.approx([float(row[name]) for row in there], rel=2**-23), name


def test_missing_library_is_a_sentence_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # Python finds none
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    flags = f"--data.path {tmp_path}/book.txt --out {tmp_path}/x --train.tensorboard {TINY}"
    assert "pip install 'dsmini[tensorboard]'" in refusal(main, flags.split())
    assert not (tmp_path / "x").exists()


# --- the watch of a running training: windows of known steps, lines of metrics.jsonl, and resuming to the bit

CPU = torch.device("cpu")
SECONDS = 0.25
"""Seconds of a step without waiting: 20 of them take 5 s, longer than a change must hold."""


class Machine:
    """CPU times of steps of 0.25 s on one thread. Others keep cores busy, and this process misses some."""

    def __init__(self) -> None:
        self.others = self.missed = 0.0
        self.at = self.busy = self.delayed = 0.0

    def read(self) -> CpuTimes:
        self.at += SECONDS
        self.busy += SECONDS * (1 + self.others)
        self.delayed += SECONDS * self.missed
        return CpuTimes(at=self.at, busy=self.busy, own=self.at, delayed=self.delayed)


@pytest.fixture(autouse=True)
def _one_thread_and_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("dsmini.diagnosis.watch.cores", lambda: 1)
    monkeypatch.setattr("dsmini.diagnosis.contention.cores", lambda: 1)


def step(
    number: int, seconds: float = SECONDS, wait: float = 0.0, loads: list[int] | None = None, tokens: int = 8
) -> StepResult:
    """Return a step that computes for these seconds, and waits for a share of its whole time."""
    losses = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
    seconds, counts = seconds / (1 - wait), None if loads is None else torch.tensor([loads])
    return StepResult(
        step=number, seconds=seconds, data_wait=wait, tokens=tokens, counts=counts, skipped=False, **losses
    )


def watched(*parts: Sequence[Any]) -> list[BindingChange]:
    """Return the changes that a watch says in steps, whose number and fields watched.toml describes."""
    machine = Machine()
    watch = RunWatch(CPU, machine.read)
    numbers, changes = itertools.count(1), []
    for length, fields in parts:
        machine.others, machine.missed = (fields.get(name, 0.0) for name in ("others", "missed"))
        of_steps = {name: value for name, value in fields.items() if name not in ("others", "missed")}
        changes += [watch.see(step(next(numbers), **of_steps)) for _ in range(length)]
    return list(filter(None, changes))


def at(change: BindingChange) -> int:
    return int(change.sentence.split(":")[0].removeprefix("step "))


SCRIPTS = tomllib.loads(Path(__file__).with_name("watched.toml").read_text())


@pytest.mark.parametrize("case", SCRIPTS)
def test_watch_names(case: str) -> None:
    script = SCRIPTS[case]
    changes = watched(*script["steps"] * script.get("repeat", 1))
    assert [[at(change), change.binds] for change in changes] == script["changes"]
    said = " ".join(change.sentence for change in changes)
    assert [words for words in script.get("words", []) if words not in said] == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_30_percent_does_not_flap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    near_the_limit = [(1, {"wait": 0.1 * rng.uniform(0.7, 1.3)}) for _ in range(3000)]
    assert len(watched(*near_the_limit)) <= 2, "what it starts with, and the one that it settles at"
    of_seconds = [(1, {"seconds": SECONDS * rng.uniform(0.7, 1.3)}) for _ in range(3000)]
    assert [(at(change), change.binds) for change in watched(*of_seconds)] == [(40, "")]


# A run with a watcher


def test_metrics_and_lines_have_what_binds(tmp_path: Path) -> None:
    """Without a watcher the metrics have no such keys: test_record.py lists them."""
    changes = {
        3: BindingChange(binds="Data", share=0.5, sentence="step 3: Data binds"),
        6: BindingChange(binds="", share=None, sentence="step 6: nothing binds"),
    }
    watched, said = new_run(tmp_path), io.StringIO()
    watched.watch, watched.console = lambda step: changes.get(step.step), Console(file=said, width=200)
    assert watched.train()
    rows = [(row["step"], row["binds"], row["binds_share"]) for row in read_records(tmp_path)]
    assert rows[2] == (3, "Data", 0.5) and rows[5] == (6, "", None)
    assert [row[1:] for row in rows if row[0] not in (3, 6)] == [(None, None)] * 6
    lines = [line for line in said.getvalue().splitlines() if "bind" in line]
    assert lines == ["step 3: Data binds", "step 6: nothing binds"]


def test_watched_and_resumed_run_is_the_plain_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WINDOW": 2, "TAIL": 0.25, "HOLD_SECONDS": 0.0}.items():  # it says changes after two steps
        monkeypatch.setattr(f"dsmini.diagnosis.watch.{name}", value)
    never = new_run(tmp_path / "never", **RICH)
    assert never.train()
    training = new_run(tmp_path / "watched", **RICH)
    training.watch = RunWatch(CPU).see
    assert die(training, training.trainer, "forward_backward", 5, after=True)
    again, watch = resumed(tmp_path / "watched", **RICH), RunWatch(CPU)
    again.watch = watch.see
    assert again.train()
    assert watch.before is not None, "it looked"
    assert all("binds" in row for row in read_records(again.folder))
    assert differences(again.folder, never.folder) == []


@pytest.mark.parametrize(
    ("others", "missed", "said"),
    [
        (0.6, 0.4, "other programs keep 0.6 of 1 cores busy: the steps wait for a core 40% of their time; stop those"),
        (0.6, 0.0, ""),
        (0.0, 0.4, ""),
    ],
)
def test_other_programs_that_slow_the_steps_are_named_once(others: float, missed: float, said: str) -> None:
    machine = Machine()
    machine.others, machine.missed = others, missed
    look = OtherPrograms(machine.read)
    found = [sentence for _ in range(100) if (sentence := look.see(SECONDS))]
    assert (found[0].startswith(said) and len(found) == 1) if said else found == []
