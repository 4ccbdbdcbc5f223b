"""Ranks that stop without dying: the heartbeat names them after parallel.timeout, and all processes end.

With the collectives of gloo, in which the others wait until the time-out of the group. That is longer, so the exit
status tells who ended a process.
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsmini.distributed.heartbeat import STALLED
from dsmini.distributed.world import World
from tests.distributed.faults import Fault
from tests.distributed.ranks import START, new_store, outcomes, run_ranks, spoken, start
from tests.distributed.runs import (
    before_each_step,
    differences,
    events,
    new_run,
    run,
    small_config,
    statuses,
    until_end,
)

LAYOUT: dict[str, Any] = {"timeout": 5.0}


def stalled(folder: Path, n: int = 2) -> list[Any]:
    return [event for rank in range(n) for event in events(folder, "stalled", rank)]


def mute(world: World, folder: Path, rank: int, how: str) -> bool:
    """Train; in step 3 one rank leaves out a collective, waits in one that the others never join, or sleeps."""
    training = new_run(world, folder, LAYOUT)
    real = training.trainer.mesh.sum_gradients

    def sum_gradients(parameters: Any) -> None:
        if world.rank == rank and training.trainer.steps_done == 2:
            if how == "another collective":
                dist.broadcast(torch.zeros(1), src=0)  # which does not send
            time.sleep(3600)
        real(parameters)

    training.trainer.mesh.sum_gradients = sum_gradients
    return training.train()


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("hang", 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("hang", 0), ("stop", 0), ("stop", 1)))],
)
def test_a_rank_that_stands_still_is_named(kind: str, rank: int, tmp_path: Path) -> None:
    ends = outcomes(2, run, tmp_path / "run", LAYOUT, [Fault(kind, rank, 3, "backward")], timeout=150.0)
    assert statuses(ends)[1 - rank] == STALLED
    assert statuses(ends)[rank] == (None if kind == "stop" else STALLED)
    (said,) = stalled(tmp_path / "run")
    assert said["rank"] == rank and f"rank {rank} (pid" in said["sentence"]
    assert said["seconds"] > LAYOUT["timeout"]
    if kind == "hang":  # one that was stopped told this before
        assert "step 2, backward, in tests/distributed/faults.py:" in said["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", "another collective"])
def test_a_deadlock_of_three_names_the_rank(how: str, tmp_path: Path) -> None:
    ends = outcomes(3, mute, tmp_path / "run", 1, how, timeout=150.0)
    assert statuses(ends) == [STALLED] * 3
    (said,) = stalled(tmp_path / "run", 3)
    assert said["rank"] == 1 and "optimizer" in said["sentence"]


@pytest.mark.slow
def test_a_stalled_run_continues_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(2, run, tmp_path / "whole")
    attempts = until_end(2, tmp_path / "run", LAYOUT, [Fault("hang", 1, 4, "forward")])
    assert [statuses(ends) for ends in attempts] == [[STALLED] * 2, [0, 0]]
    assert differences(tmp_path / "run", tmp_path / "whole") == []


@pytest.mark.slow
def test_a_stall_of_the_command_is_told_on_the_standard_error(tmp_path: Path) -> None:
    """Leave the output to the line of JSON."""
    args = [str(small_config(tmp_path)), "--out", str(tmp_path / "run"), "--json", "--parallel.timeout", "5"]
    got = spoken(tmp_path, args, args, faults=[Fault("hang", 1, 3, "forward")])
    assert got.statuses == [STALLED] * 2 and got.outputs == ["", ""]
    assert got.errors[0].count("rank 1 (pid") == 1 and "--resume" in got.errors[0]


def paused(world: World, folder: Path) -> bool:
    """Train; stop rank 1 for less than the time-out, and let it continue."""
    training = new_run(world, folder, LAYOUT)
    if world.rank == 1 and os.fork() == 0:  # a child that wakes its parent
        parent = os.getppid()
        time.sleep(0.3)
        os.kill(parent, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(parent, signal.SIGCONT)
        os._exit(0)
    before_each_step(training, lambda: time.sleep(0.1))
    return training.train()


@pytest.mark.slow
def test_a_slow_rank_is_no_stall(tmp_path: Path) -> None:
    assert run_ranks(2, paused, tmp_path / "run") == [True, True]
    assert stalled(tmp_path / "run") == []


def hold_store(sender: Any) -> None:
    """Hold the store as a launcher does, until it is killed."""
    store = new_store()
    sender.send(store.port)
    time.sleep(600)


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_is_saved_and_stops(tmp_path: Path) -> None:
    folder, (ours, theirs) = tmp_path / "run", START.Pipe(duplex=False)
    launcher = start(hold_store, theirs)

    def kill_after_three_steps() -> None:
        until = time.monotonic() + 150
        while time.monotonic() < until and not any(event["step"] >= 3 for event in events(folder, "step")):
            time.sleep(0.1)
        launcher.kill()

    killer = threading.Thread(target=kill_after_three_steps)
    killer.start()
    changes = {"steps": 1_000_000, "save_every": 1_000_000}
    ends = outcomes(2, run, folder, store=SimpleNamespace(port=ours.recv()), **changes)
    killer.join()
    assert [(end.status, end.value) for end in ends] == [(0, False)] * 2, ends
    (stopped,) = events(folder, "stopped")
    assert stopped["step"] >= 3 and [event["step"] for event in events(folder, "saved")] == [stopped["step"]]
