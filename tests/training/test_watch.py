"""The watch of a running training: windows of known steps, lines of metrics.jsonl, and resuming to the bit."""

import io
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from dsmini.diagnosis.watch import WINDOW, RunWatch
from dsmini.measure.cpu_time import CpuTimes
from dsmini.training.record import read_records
from dsmini.training.run import TrainingRun
from dsmini.training.trainer import StepResult
from dsmini.training.watcher import BindingChange
from tests.helpers.runs import RICH, TIMING, calls, kill, new_run, resumed, stopped, unequal, whole

CPU = torch.device("cpu")
SECONDS = 0.25
"""Of a step without waiting: 20 of them take 5 s, longer than a change must hold."""


def step(number: int, seconds: float = SECONDS, wait: float = 0.0, **more: Any) -> StepResult:
    """Return a step that computes for these seconds, and waits for a share of its whole time."""
    losses: dict[str, Any] = dict.fromkeys(("loss", "mtp_loss", "balance_loss", "grad_norm", "lr"), 1.0)
    fields: dict[str, Any] = {"tokens": 8, "counts": None, "skipped": False, **losses, **more}
    return StepResult(step=number, seconds=seconds / (1 - wait), data_wait=wait, **fields)


class Machine:
    """CPU times of steps of 0.25 s, in which others keep cores busy and this process misses some that it could use."""

    def __init__(self) -> None:
        self.own, self.others, self.missed = float(torch.get_num_threads()), 0.0, 0.0
        self._at = self._busy = self._used = self._delayed = 0.0

    def read(self) -> CpuTimes:
        self._at += SECONDS
        self._used += SECONDS * self.own
        self._busy += SECONDS * (self.own + self.others)
        self._delayed += SECONDS * self.missed
        return CpuTimes(at=self._at, busy=self._busy, own=self._used, delayed=self._delayed)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def watch(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> RunWatch:
    """Return a watch on a machine with a core for each thread, which looks at every step."""
    monkeypatch.setattr("dsmini.diagnosis.watch.cores", lambda: torch.get_num_threads())
    monkeypatch.setattr("dsmini.diagnosis.watch.COST_SHARE", 1e9)
    return RunWatch(CPU, torch.get_num_threads(), machine.read)


def seen(watch: RunWatch, steps: Sequence[StepResult]) -> list[tuple[int, str]]:
    """Return the steps at which a change was said, and what binds from there."""
    return [(s.step, change.binds) for s in steps if (change := watch.see(s)) is not None]


def test_slow_loader_is_named_within_two_windows_and_so_is_its_end(watch: RunWatch) -> None:
    steps = [step(i, wait=0.4 if 100 <= i < 200 else 0.02) for i in range(1, 300)]
    assert seen(watch, steps) == [(20, ""), (134, "Data"), (230, "")]
    assert 100 + 2 * WINDOW > 134


def test_sentence_has_the_figures_and_what_to_do(watch: RunWatch) -> None:
    changes = [watch.see(step(i, wait=0.4)) for i in range(1, 60)]
    (change,) = [c for c in changes if c is not None]
    assert change.share == pytest.approx(0.4)
    assert change.sentence == (
        "step 40: Data binds: a step waits 40% (40% to 40%) of its time for its batch. "
        "Prepare batches in more threads (data.workers), or make them cheaper to read."
    )


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_30_percent_around_the_limit_does_not_flap(watch: RunWatch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [step(i, wait=0.1 * rng.uniform(0.7, 1.3)) for i in range(1, 3000)]
    assert len(seen(watch, steps)) <= 2, "what it starts with, and the one that it settles at"


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_30_percent_in_the_seconds_binds_nothing(watch: RunWatch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert seen(watch, [step(i, SECONDS * rng.uniform(0.7, 1.3)) for i in range(1, 3000)]) == [(20, "")]


def test_wait_of_few_steps_is_not_named(watch: RunWatch) -> None:
    """Check validations and new files: every third step waits for most of its time."""
    assert seen(watch, [step(i, wait=0.8 if i % 3 == 0 else 0.0) for i in range(1, 200)]) == [(20, "")]


def test_waiting_is_no_slower_compute(watch: RunWatch) -> None:
    changes = [watch.see(step(i, wait=0.0 if i < 50 else 0.4 if i < 150 else 0.06)) for i in range(1, 250)]
    last = [change for change in changes if change is not None][-1]
    assert "nothing binds (waiting 6%, slower steps 0%" in last.sentence


def test_change_that_ends_within_a_window_is_not_said(watch: RunWatch) -> None:
    steps = [step(i, wait=0.4 if 100 <= i < 100 + WINDOW else 0.0) for i in range(1, 200)]
    assert seen(watch, steps) == [(20, "")]


def test_change_of_short_steps_must_hold_for_seconds(watch: RunWatch) -> None:
    steps = [step(i, 1 / 64, wait=0.4 if 1000 <= i < 1100 else 0.0) for i in range(1, 2000)]
    assert seen(watch, steps) == [(3 * 64, "")], "100 steps take 2.6 s"


def test_other_programs_that_slow_the_steps_are_named(watch: RunWatch, machine: Machine) -> None:
    quiet = [step(i) for i in range(1, 100)]
    assert seen(watch, quiet) == [(20, "")]
    machine.others = 1.0
    changes = [watch.see(step(i, 1.5 * SECONDS)) for i in range(100, 200)]
    (change,) = [c for c in changes if c is not None]
    assert change.binds == "Machine" and change.share == pytest.approx(1 / 3)
    assert "a step computes for 0.375 s, and for 0.25 s when such steps were fastest" in change.sentence
    assert "other programs keep 1.0 of" in change.sentence and "Stop other programs" in change.sentence
    machine.others = 0.0
    assert [binds for _, binds in seen(watch, [step(i) for i in range(200, 300)])] == [""]


def test_slower_steps_without_other_programs_are_named_as_such(watch: RunWatch) -> None:
    changes = [watch.see(step(i, SECONDS if i < 100 else 1.5 * SECONDS)) for i in range(1, 200)]
    change = [c for c in changes if c is not None][-1]
    assert change.binds == "Machine" and "no other program is seen" in change.sentence


def test_drift_of_the_machine_is_named_only_where_others_run(watch: RunWatch, machine: Machine) -> None:
    assert seen(watch, [step(i, SECONDS if i < 100 else 1.18 * SECONDS) for i in range(1, 200)]) == [(20, "")]
    machine.others = 1.0
    assert [binds for _, binds in seen(watch, [step(i, 1.18 * SECONDS) for i in range(200, 300)])] == ["Machine"]


def test_programs_that_run_from_the_start_bind_if_threads_wait_for_cores(watch: RunWatch, machine: Machine) -> None:
    """Check that busy cores of others are blamed only for what this run misses, and its own crowd on nobody."""
    threads = torch.get_num_threads()
    machine.others = 0.5 * threads
    assert seen(watch, [step(i) for i in range(1, 60)]) == [(20, "")], "no thread waits"
    machine.others, machine.missed = 0.0, 0.4 * threads
    assert seen(watch, [step(i) for i in range(60, 120)]) == [], "nobody else runs"
    machine.others = 0.5 * threads
    changes = [watch.see(step(i)) for i in range(120, 180)]
    (change,) = [c for c in changes if c is not None]
    assert change.binds == "Machine" and change.share == pytest.approx(0.4)
    assert f"each of this run's {threads} threads waits 40% of the time for a core" in change.sentence


@pytest.mark.parametrize(("others", "binds"), [(0.0, "Machine"), (1.0, "")])
def test_fewer_threads_than_cores_bind_unless_others_use_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, others: float, binds: str
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("dsmini.diagnosis.watch.cores", lambda: threads + 1)
    monkeypatch.setattr("dsmini.diagnosis.watch.COST_SHARE", 1e9)
    machine.others = others
    watch = RunWatch(CPU, threads + 1, machine.read)
    assert [b for _, b in seen(watch, [step(i) for i in range(1, 60)])] == [binds]
    by_torch = RunWatch(CPU, threads, machine.read)
    assert [b for _, b in seen(by_torch, [step(i) for i in range(1, 60)])] == [""], "torch chose these threads"


def test_idle_experts_are_named_and_skew_alone_is_not(watch: RunWatch) -> None:
    skewed, collapsed = torch.tensor([[40, 12, 6, 6]]), torch.tensor([[32, 32, 0, 0]])
    assert seen(watch, [step(i, counts=skewed) for i in range(1, 60)]) == [(20, "")]
    changes = [watch.see(step(i, counts=collapsed)) for i in range(60, 160)]
    (change,) = [c for c in changes if c is not None]
    assert (change.binds, change.share) == ("Algorithm", 0.5)
    assert "50% of the experts" in change.sentence and "MaxVio 1.00" in change.sentence


def test_what_takes_time_comes_before_idle_experts(watch: RunWatch) -> None:
    collapsed = torch.tensor([[32, 32, 0, 0]])
    assert seen(watch, [step(i, wait=0.3, counts=collapsed) for i in range(1, 60)]) == [(40, "Data")]


def test_steps_without_finite_gradient_are_lost_time(watch: RunWatch) -> None:
    found = seen(watch, [step(i, skipped=i > 50 and i % 4 == 0) for i in range(1, 120)])
    assert [binds for _, binds in found] == ["", "Algorithm"]


def test_two_axes_that_take_turns_are_one_until_one_is_clearly_larger(watch: RunWatch) -> None:
    rng = np.random.default_rng(0)
    near = [
        step(i, skipped=i % 5 == 0, wait=rng.uniform(0.15, 0.25), seconds=SECONDS * (1 - 0.2)) for i in range(1, 400)
    ]
    assert len(seen(watch, near)) == 1


def test_larger_batches_are_other_work(watch: RunWatch) -> None:
    steps = [step(i, SECONDS * (1 if i < 100 else 2), tokens=8 if i < 100 else 16) for i in range(1, 200)]
    assert seen(watch, steps) == [(20, "")]


def test_balanced_experts_are_other_work(watch: RunWatch) -> None:
    """Check a step that becomes slower as more experts have work, as that of the toy does."""
    uneven, even = torch.tensor([[40, 8, 8, 8]]), torch.tensor([[16, 16, 16, 16]])
    steps = [step(i, SECONDS * (1 if i < 100 else 1.3), counts=uneven if i < 100 else even) for i in range(1, 200)]
    assert seen(watch, steps) == [(20, "")]


def test_look_that_is_dear_waits_for_a_hundred_times_its_cost(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check steps of 0.25 s and looks of a second: one look in 400 steps, whatever it costs."""
    clock = itertools.count()
    monkeypatch.setattr("dsmini.diagnosis.watch.time.perf_counter", lambda: float(next(clock)))
    looks: list[int] = []
    watch = RunWatch(CPU, 1, lambda: (looks.append(0), machine.read())[1])
    seen(watch, [step(i) for i in range(1, 1202)])
    assert len(looks) == 1 + 1200 // 400


class Scripted:
    """A watcher that says a change at known steps."""

    def see(self, step: StepResult) -> BindingChange | None:
        if step.step == 3:
            return BindingChange(binds="Data", share=0.5, sentence="step 3: Data binds")
        return BindingChange(binds="", share=None, sentence="step 6: nothing binds") if step.step == 6 else None


def test_metrics_have_what_binds_only_with_a_watcher(tmp_path: Path) -> None:
    plain = new_run(tmp_path / "plain")
    assert plain.train()
    watched, said = new_run(tmp_path / "watched"), io.StringIO()
    watched.watcher, watched.console = Scripted(), Console(file=said, width=200)
    assert watched.train()
    rows = [json.loads(line) for line in (watched.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["binds"], row["binds_share"]) for row in rows if row["binds"] is not None] == [
        (3, "Data", 0.5),
        (6, "", None),
    ]
    assert [line for line in said.getvalue().splitlines() if "bind" in line] == [
        "step 3: Data binds",
        "step 6: nothing binds",
    ]
    kept = [{key: v for key, v in row.items() if key not in {*TIMING, "binds", "binds_share"}} for row in rows]
    without = [json.loads(line) for line in (plain.folder / "metrics.jsonl").read_text().splitlines()]
    assert [list(row) for row in without] == [[*row][: -len(("binds", "binds_share"))] for row in rows]
    assert kept == [{key: v for key, v in row.items() if key not in TIMING} for row in without]
    assert [record.row() for record in read_records(watched.folder)] == rows


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainingRun], TrainingRun]:
    """Return a function that gives a run a watch which looks at each step and says changes after two."""
    for name, value in {"WINDOW": 2, "RANK": 1, "HOLD_SECONDS": 0.0, "COST_SHARE": 1e9}.items():
        monkeypatch.setattr(f"dsmini.diagnosis.watch.{name}", value)

    def give(training: TrainingRun) -> TrainingRun:
        training.watcher = RunWatch(CPU, torch.get_num_threads())
        return training

    return give


def test_watched_run_that_stops_and_resumes_is_the_run_without_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: Callable[[TrainingRun], TrainingRun]
) -> None:
    never = new_run(tmp_path / "never", **RICH)
    assert never.train()
    want = whole(never)
    training = eager(new_run(tmp_path / "watched", **RICH))
    with monkeypatch.context() as patch:
        kill(patch, training.trainer, "forward_backward", calls(training, 5, 0), True)
        stopped(training)
    again = eager(resumed(tmp_path / "watched", **RICH))
    assert again.train()
    got = whole(again)
    assert isinstance(again.watcher, RunWatch) and len(again.watcher.times) > 1, "it looked"
    assert all("binds" in row for row in json.loads(got["rows"]))
    got["rows"] = json.dumps(
        [{k: v for k, v in row.items() if k not in ("binds", "binds_share")} for row in json.loads(got["rows"])]
    )
    assert unequal(got, want) == set()


def test_watched_run_resumes_without_its_watch(tmp_path: Path) -> None:
    training = new_run(tmp_path)
    training.watcher = Scripted()
    real = training.trainer.step
    training.trainer.step = lambda: real() if training.trainer.steps_done < 4 else pytest.fail("killed")
    with pytest.raises(BaseException, match="killed"):
        training.train()
    assert resumed(tmp_path).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["binds" in row for row in rows] == [True] * 4 + [False] * 4
    assert [record.step for record in read_records(tmp_path)] == list(range(1, 9))


def test_real_slow_loader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the step's own clock, the watch and the record together."""
    training = new_run(tmp_path, steps=70, batch_size=1, eval_every=1000, save_every=1000)
    monkeypatch.setattr("dsmini.diagnosis.watch.HOLD_SECONDS", 0.1)
    training.watcher = RunWatch(CPU, torch.get_num_threads())
    real = training.trainer.loader.take

    def take(requests: Any) -> Any:
        time.sleep(0.1)
        return real(requests)

    training.trainer.loader.take = take
    assert training.train()
    assert "Data" in [record.row()["binds"] for record in read_records(tmp_path)]
