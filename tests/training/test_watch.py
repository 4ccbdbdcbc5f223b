"""The watch of a running training: windows of known steps, lines of metrics.jsonl, and resuming to the bit."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from dsmini.diagnosis.contention import OtherPrograms
from dsmini.diagnosis.watch import WINDOW, RunWatch
from dsmini.measure.cpu_time import CpuTimes
from dsmini.training.record import read_records
from dsmini.training.run import BindingChange, TrainingRun
from dsmini.training.trainer import StepResult
from tests.helpers.runs import RICH, TIMING, calls, kill, new_run, resumed, stopped, unequal, whole

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


def step(number: int, seconds: float = SECONDS, wait: float = 0.0, **more: Any) -> StepResult:
    """Return a step that computes for these seconds, and waits for a share of its whole time."""
    losses: dict[str, Any] = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
    fields: dict[str, Any] = {"tokens": 8, "counts": None, "skipped": False, **losses, **more}
    return StepResult(step=number, seconds=seconds / (1 - wait), data_wait=wait, **fields)


Part = tuple[int, dict[str, Any]]
"""Number of steps, and what they have: fields of a step, or others and missed of the machine."""


def watched(*parts: Part, machine: Machine | None = None, watch: RunWatch | None = None) -> list[BindingChange]:
    """Return the changes that a watch says in these steps."""
    machine = machine or Machine()
    watch = watch or RunWatch(CPU, machine.read)
    numbers, changes = itertools.count(1), []
    for length, fields in parts:
        machine.others, machine.missed = (fields.get(name, 0.0) for name in ("others", "missed"))
        of_steps = {name: value for name, value in fields.items() if name not in ("others", "missed")}
        changes += [watch.see(step(next(numbers), **of_steps)) for _ in range(length)]
    return [change for change in changes if change is not None]


def at(change: BindingChange) -> int:
    return int(change.sentence.split(":")[0].removeprefix("step "))


SKEWED, COLLAPSED, UNEVEN, EVEN = (
    {"counts": torch.tensor([loads])} for loads in ([40, 12, 6, 6], [32, 32, 0, 0], [40, 8, 8, 8], [16] * 4)
)
SLOWER: dict[str, Any] = {"seconds": 1.5 * SECONDS}
DRIFTED: dict[str, Any] = {"seconds": 1.18 * SECONDS}
SCRIPTS: dict[str, tuple[list[Part], list[tuple[int, str]]]] = {
    "a slow loader and its end, within two windows": (
        [(99, {"wait": 0.02}), (100, {"wait": 0.4}), (100, {"wait": 0.02})],
        [(40, ""), (140, "Data"), (240, "")],
    ),
    "what binds until it is below half of the limit": (
        [(60, {"wait": 0.4}), (60, {"wait": 0.07}), (60, {"wait": 0.04})],
        [(40, "Data"), (160, "")],
    ),
    # validations and new files
    "no wait of every third step": ([(2, {}), (1, {"wait": 0.8})] * 66, [(40, "")]),
    "no change that ends within a window": ([(99, {}), (WINDOW, {"wait": 0.4}), (80, {})], [(40, "")]),
    "no change of short steps that takes 2.6 s": (
        [(999, {"seconds": 1 / 64}), (100, {"seconds": 1 / 64, "wait": 0.4}), (900, {"seconds": 1 / 64})],
        [(6 * 64, "")],
    ),
    "other programs that slow the steps, and their end": (
        [(99, {}), (100, {"others": 1.0, **SLOWER}), (100, {})],
        [(40, ""), (140, "Machine"), (240, "")],
    ),
    "slower steps without other programs": ([(99, {}), (100, SLOWER)], [(40, ""), (140, "Machine")]),
    "no drift of the machine alone": ([(99, {}), (100, DRIFTED)], [(40, "")]),
    "a drift where others run": ([(199, {}), (100, {"others": 1.0, **DRIFTED})], [(40, ""), (240, "Machine")]),
    # others are blamed only for what this run misses, and its own crowd on nobody
    "no programs that run from the start": ([(60, {"others": 0.5})], [(40, "")]),
    "no thread that waits while nobody else runs": ([(60, {"missed": 0.4})], [(40, "")]),
    "a thread that waits for a core of others": ([(60, {"missed": 0.4, "others": 0.5})], [(40, "Machine")]),
    "no skew of experts": ([(60, SKEWED)], [(40, "")]),
    "idle experts": ([(59, SKEWED), (100, COLLAPSED)], [(40, ""), (100, "Algorithm")]),
    "what takes time before idle experts": ([(59, {"wait": 0.3, **COLLAPSED})], [(40, "Data")]),
    "no larger batches": ([(99, {}), (100, {"seconds": 2 * SECONDS, "tokens": 16})], [(40, "")]),
    # a step becomes slower as more experts have work, as that of the toy does
    "no experts in balance": ([(99, UNEVEN), (100, {"seconds": 1.3 * SECONDS, **EVEN})], [(40, "")]),
}
"""Steps, and the changes that are said: the step, and the axis that binds from there."""
WORDS = {
    "other programs that slow the steps, and their end": [
        "a step computes for 0.375 s, and for 0.25 s when such steps were fastest",
        *("other programs keep 1.0 of", "Stop other programs"),
    ],
    "slower steps without other programs": ["no other program is seen"],
    "idle experts": ["50 % of the experts", "MaxVio 1.00"],
}
"""Words of the second change."""


@pytest.mark.parametrize("case", SCRIPTS)
def test_watch_names(case: str) -> None:
    parts, want = SCRIPTS[case]
    changes = watched(*parts)
    assert [(at(change), change.binds) for change in changes] == want
    assert [words for words in WORDS.get(case, []) if words not in changes[1].sentence] == []


def test_sentence_has_the_figures_and_what_to_do() -> None:
    (change,) = watched((60, {"wait": 0.4}))
    assert change.share == pytest.approx(0.4)
    assert change.sentence == (
        "step 40: Data binds: a step waits 40 % (40 to 40) of its time for its batch. "
        "Prepare batches in more threads (data.workers), or make them cheaper to read."
    )


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_30_percent_does_not_flap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    near_the_limit = [(1, {"wait": 0.1 * rng.uniform(0.7, 1.3)}) for _ in range(3000)]
    assert len(watched(*near_the_limit)) <= 2, "what it starts with, and the one that it settles at"
    of_seconds = [(1, {"seconds": SECONDS * rng.uniform(0.7, 1.3)}) for _ in range(3000)]
    assert [(at(change), change.binds) for change in watched(*of_seconds)] == [(40, "")]


# A run with a watcher


class Scripted:
    """A watcher that says a change at known steps."""

    def see(self, step: StepResult) -> BindingChange | None:
        if step.step == 3:
            return BindingChange(binds="Data", share=0.5, sentence="step 3: Data binds")
        return BindingChange(binds="", share=None, sentence="step 6: nothing binds") if step.step == 6 else None


def rows_of(training: TrainingRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (training.folder / "metrics.jsonl").read_text().splitlines()]


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


def test_metrics_have_what_binds_only_with_a_watcher(tmp_path: Path) -> None:
    plain = new_run(tmp_path / "plain")
    assert plain.train()
    watched, said = new_run(tmp_path / "watched"), io.StringIO()
    watched.watch, watched.console = Scripted().see, Console(file=said, width=200)
    assert watched.train()
    rows = rows_of(watched)
    changes = [(row["step"], row["binds"], row["binds_share"]) for row in rows if row["binds"] is not None]
    assert changes == [(3, "Data", 0.5), (6, "", None)]
    lines = [line for line in said.getvalue().splitlines() if "bind" in line]
    assert lines == ["step 3: Data binds", "step 6: nothing binds"]
    assert [list(row) for row in rows] == [[*row, "binds", "binds_share"] for row in rows_of(plain)]
    assert without(rows, *TIMING, "binds", "binds_share") == without(rows_of(plain), *TIMING)
    assert read_records(watched.folder) == rows


def test_watched_run_that_stops_and_resumes_is_the_run_without_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WINDOW": 2, "TAIL": 0.25, "HOLD_SECONDS": 0.0}.items():  # it says changes after two steps
        monkeypatch.setattr(f"dsmini.diagnosis.watch.{name}", value)
    never = new_run(tmp_path / "never", **RICH)
    assert never.train()
    want = whole(never)
    training = new_run(tmp_path / "watched", **RICH)
    training.watch = RunWatch(CPU).see
    with monkeypatch.context() as patch:
        kill(patch, training.trainer, "forward_backward", calls(training, 5, 0), True)
        stopped(training)
    again = resumed(tmp_path / "watched", **RICH)
    watch = RunWatch(CPU)
    again.watch = watch.see
    assert again.train()
    got = whole(again)
    assert watch.before is not None, "it looked"
    rows = json.loads(got["rows"])
    assert all("binds" in row for row in rows)
    got["rows"] = json.dumps(without(rows, "binds", "binds_share"))
    assert unequal(got, want) == set()


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
