"""Restarts as a launcher does them: crash loops, exhausted restarts, nothing left to start from, and their cost."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini.distributed.chaos import ChaosPlan, Fault
from dsmini.distributed.goodput import goodput
from dsmini.distributed.world import World
from dsmini.planner.quantities.quantity import SECONDS
from dsmini.planner.reliability import FailureInputs, effective_share
from tests.distributed.ranks import outcomes, run_ranks, spoken
from tests.distributed.runs import differences, events, fault, new_run, run, saved, small_config, statuses, until_end

pytestmark = pytest.mark.slow
EP: dict[str, Any] = {"ep": 2}


def test_crash_loop_puts_its_checkpoint_aside(tmp_path: Path) -> None:
    """Let four attempts die in step 5: the one that saved step 4, and three that start from it."""
    run_ranks(2, run, tmp_path / "whole", EP)
    faults = [fault(kind, 1, 5, "forward") for kind in ("exception", "abort", "kill", "segfault")]
    attempts = until_end(2, tmp_path / "run", EP, faults)
    assert len(attempts) == 5 and all(statuses(attempt)[1] != 0 for attempt in attempts[:4])
    assert [event.step for event in events(tmp_path / "run", "quarantined")] == [4]
    assert [event.step for event in events(tmp_path / "run", "started")] == [0, 4, 4, 4, 2]
    assert (tmp_path / "run" / "checkpoints" / "quarantined-step-000004").is_dir()
    assert differences(tmp_path / "run", tmp_path / "whole") == []


# --- the command


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config of a small run of 6 steps."""
    return small_config(tmp_path_factory.mktemp("config"))


def ends(folder: Path, *line: object) -> list[int | None]:
    """Return the exit statuses of two ranks of the command."""
    return spoken(folder, *[[str(word) for word in line]] * 2).statuses


def test_nothing_whole_to_start_from_is_an_error_and_no_step_zero(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = (config, "--out", folder, "--resume", "auto", "--train.steps")
    assert ends(tmp_path, *line, 2) == [0, 0]
    for path in folder.glob("checkpoints/*/model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = sorted(path.name for path in folder.glob("checkpoints/*"))
    for _ in range(2):
        assert ends(tmp_path, *line, 4) == [2, 2]
    assert [event.step for event in events(folder, "started")] == [0]
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == before
    shutil.rmtree(folder / "checkpoints")
    assert ends(tmp_path, *line, 4) == [2, 2]
    assert [event.step for event in events(folder, "started")] == [0]


def kills(seed: int, steps: int, mean: float) -> tuple[Fault, ...]:
    return ChaosPlan.from_seed(seed, 2, steps, mean, ("kill",)).faults


def test_torchrun_restarts_until_its_restarts_are_exhausted(config: Path, tmp_path: Path) -> None:
    """Let the second of two kills use up the one restart; then start all again by hand."""
    assert ends(tmp_path, config, "--out", tmp_path / "whole") == [0, 0]
    seed = next(seed for seed in range(1000) if [one.step for one in kills(seed, 6, 3)] in ([2, 4], [2, 5], [3, 5]))
    args = [str(config), "--out", str(tmp_path / "run"), "--resume", "auto", "--chaos", f"{seed}:3:kill"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    torchrun += ["127.0.0.1:0", "--local-addr", "127.0.0.1", "--max-restarts", "1", "--monitor-interval", "0.1"]
    torchrun += ["--nproc-per-node", "2", "-m", "dsmini.train", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = subprocess.Popen(
        torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        said, _ = launcher.communicate(timeout=250)
    finally:
        launcher.terminate()  # it ends its workers
        launcher.wait(timeout=60)
    assert launcher.returncode == 1, said
    assert len(events(tmp_path / "run", "started")) == 2, said
    assert events(tmp_path / "run", "started")[1].step > 0
    assert ends(tmp_path, *args) == [0, 0]
    got, want = saved(tmp_path / "run", 6), saved(tmp_path / "whole", 6)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# --- the cost


def slow(world: World, folder: Path, faults: Any, seconds: float, **changes: Any) -> bool:
    """Train with steps that take some time, as on a larger model."""
    training = new_run(world, folder, EP, faults, **changes)
    real = training.trainer.step

    def step() -> Any:
        start = time.perf_counter()
        time.sleep(seconds)
        result = real()
        return dataclasses.replace(result, seconds=time.perf_counter() - start)

    training.trainer.step = step
    return training.train()


def test_goodput_under_kills_is_the_planners(tmp_path: Path) -> None:
    """Run with kills as a Poisson process; compare the measured share of training with the planner's."""
    faults = next(faults for seed in range(100) if len(faults := kills(seed, 100, 25)) == 5)
    changes = {"steps": 100, "save_every": 4, "eval_every": 100, "optimizer": "adamw", "ema_decay": None}
    for _ in range(len(faults) + 1):
        attempt = outcomes(2, slow, tmp_path / "run", faults, 0.03, **changes)
        if all(end.value is True for end in attempt):
            break
    assert all(end.value is True for end in attempt)
    account = goodput(tmp_path / "run")
    assert account.failures == len(faults) and account.training_share is not None
    assert account.restart_seconds and account.saving_seconds and account.interval_seconds
    assert account.mean_seconds_between_failures
    inputs = FailureInputs(restart_time=SECONDS(account.restart_seconds), write_time=SECONDS(account.saving_seconds))
    mttf, interval = SECONDS(account.mean_seconds_between_failures), SECONDS(account.interval_seconds)
    assert sum(account.microseconds.values()) == account.total
    assert abs(account.training_share - effective_share(mttf, interval, inputs).value) < 0.05
    assert 0.2 < account.training_share < 0.95
