"""Restarts as a launcher does them: crash loops, exhausted restarts, nothing left to start from, and their cost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.faults import Fault
from tests.distributed.ranks import run_ranks, spoken
from tests.distributed.runs import differences, events, run, saved, small_config, statuses, until_end

pytestmark = pytest.mark.slow
EP: dict[str, Any] = {"ep": 2}


def test_crash_loop_puts_its_checkpoint_aside(tmp_path: Path) -> None:
    """Let four attempts die in step 5: the one that saved step 4, and three that start from it."""
    run_ranks(2, run, tmp_path / "whole", EP)
    faults = [Fault(kind, 1, 5, "forward") for kind in ("exception", "abort", "kill", "segfault")]
    attempts = until_end(2, tmp_path / "run", EP, faults)
    assert len(attempts) == 5 and all(statuses(attempt)[1] != 0 for attempt in attempts[:4])
    assert [event["step"] for event in events(tmp_path / "run", "quarantined")] == [4]
    assert [event["step"] for event in events(tmp_path / "run", "started")] == [0, 4, 4, 4, 2]
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
    assert [event["step"] for event in events(folder, "started")] == [0]
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == before
    shutil.rmtree(folder / "checkpoints")
    assert ends(tmp_path, *line, 4) == [2, 2]
    assert [event["step"] for event in events(folder, "started")] == [0]


def test_torchrun_restarts_until_its_restarts_are_exhausted(config: Path, tmp_path: Path) -> None:
    """Let the second of two kills use up the one restart; then start all again by hand."""
    assert ends(tmp_path, config, "--out", tmp_path / "whole") == [0, 0]
    args = [str(config), "--out", str(tmp_path / "run"), "--resume", "auto"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    torchrun += ["127.0.0.1:0", "--local-addr", "127.0.0.1", "--max-restarts", "1", "--monitor-interval", "0.1"]
    torchrun += ["--nproc-per-node", "2", "-m", "tests.distributed.faults"]
    torchrun += ["kill:1:3:backward,kill:0:5:forward", *args]
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
    assert events(tmp_path / "run", "started")[1]["step"] > 0
    assert ends(tmp_path, *args) == [0, 0]
    got, want = saved(tmp_path / "run", 6), saved(tmp_path / "whole", 6)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
