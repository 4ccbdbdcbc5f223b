"""The watch of a running training: windows of known steps, lines of metrics.jsonl, and resuming to the bit."""

import io
import itertools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from dsmini.diagnosis.contention import OtherPrograms
from dsmini.diagnosis.watch import RunWatch
from dsmini.measure.cpu_time import CpuTimes
from dsmini.training.run import BindingChange
from dsmini.training.trainer import StepResult
from tests.helpers.runs import RICH, die, differences, new_run, read_records, resumed

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
