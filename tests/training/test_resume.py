"""A run that was stopped anywhere and resumed is the run that was never stopped, bit for bit."""

import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsmini.training import saving
from dsmini.training.run import TrainingRun
from tests.helpers.configs import DSA, V4_MODEL
from tests.helpers.runs import RICH, Killed, asked_after, calls, kill, new_run, resumed, stopped, unequal, whole

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
    "V4": {"model": V4_MODEL, "optimizer": "muon", "grad_accum": 2, "ema_decay": 0.9},
    "rich": RICH,
}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return all of a run with these options that nothing stops; trained once."""

    @cache
    def run(name: str) -> dict[str, Any]:
        training = new_run(tmp_path_factory.mktemp("unstopped"), **OPTIONS[name])
        assert training.train()
        return whole(training)

    return run


@pytest.fixture(scope="module")
def at_step_4(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], TrainingRun]:
    """Return a function that puts a run which stopped after step 4 into a folder, ready to take step 5."""

    @cache
    def half(name: str) -> Path:
        training = new_run(tmp_path_factory.mktemp("half"), **OPTIONS[name])
        kill_at = calls(training, 4, 0)
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, training.trainer, "forward_backward", kill_at, False)
            stopped(training)
        return training.folder

    def begin(name: str, folder: Path) -> TrainingRun:
        shutil.copytree(half(name), folder, dirs_exist_ok=True)
        return resumed(folder, **OPTIONS[name])

    return begin


Kill = Callable[[TrainingRun, pytest.MonkeyPatch], None]
PHASES: dict[str, Kill] = {
    "between micro-batches": lambda t, m: kill(m, t.trainer, "losses", calls(t, 5, 1), False),
    "after backward": lambda t, m: kill(m, t.trainer, "forward_backward", calls(t, 5, 0), True),
    "between the optimizers": lambda t, m: kill(m, t.trainer.optimizers[-1], "step", calls(t, 5, 0), False),
    "in the validation": lambda t, m: kill(m, t.trainer, "_score", calls(t, 6, 0), True),
    "after the last row": lambda t, m: kill(m, t, "_record", calls(t, 8, 0), True),
    "in the last validation": lambda t, m: kill(m, t.trainer, "validate", calls(t, 8, 0), False),
}


# every phase with everything on, and every option once: together they would take minutes
CASES = [("rich", phase) for phase in PHASES] + [
    (options, "after backward") for options in OPTIONS if options != "rich"
]
DEFAULT = {("rich", "after backward"), ("rich", "between the optimizers"), ("rich", "in the validation")}
DEFAULT |= {(options, "after backward") for options in ("adamw", "skipped", "sparse attention")}


@pytest.mark.parametrize(
    ("options", "phase"), [pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow) for case in CASES]
)
def test_a_resumed_run_is_the_one_never_stopped(
    unstopped: Callable[[str], dict[str, Any]],
    at_step_4: Callable[[str, Path], TrainingRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    phase: str,
) -> None:
    want = unstopped(options)
    training = at_step_4(options, tmp_path)
    with monkeypatch.context() as patch:
        PHASES[phase](training, patch)
        stopped(training)
    again = resumed(tmp_path, **OPTIONS[options])
    assert again.train()
    assert unequal(whole(again), want) == set()


SLOW = ((os, "fsync"), (shutil, "rmtree"), (saving, "_write_all"))


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "rename"), *(pytest.param(*of, marks=pytest.mark.slow) for of in SLOW)]
)
def test_a_run_stopped_at_any_moment_of_a_save(
    unstopped: Callable[[str], dict[str, Any]],
    at_step_4: Callable[[str, Path], TrainingRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
) -> None:
    """Stop before each call of a function by the save after step 6, until it makes no further one."""
    for number in itertools.count():
        folder = tmp_path / f"{number}"
        training = at_step_4("rich", folder)
        with monkeypatch.context() as patch, suppress(Killed):
            kill(patch, owner, name, calls(training, 6, number), False)
            training.train()
            assert number > 0
            return
        said: list[str] = []
        again = resumed(folder, said=said, **RICH)
        assert again.saver.saved_at in (4, 6) and said == []  # one or the other whole, and nothing half
        assert again.train()
        assert unequal(whole(again), unstopped("rich")) == set()
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


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
