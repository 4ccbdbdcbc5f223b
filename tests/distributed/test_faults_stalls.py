"""Ranks that stop without dying: the watchdog names them within parallel.timeout, and all processes end.

With the collectives of gloo, in which the others wait until the time-out of the group.
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

from dsmini.distributed.chaos import ChaosPlan
from dsmini.distributed.watchdog import GRACE, STALLED
from dsmini.distributed.world import World
from tests.distributed.faulty import differences, events, fault, faulty, prepared, statuses, until_end
from tests.distributed.ranks import START, new_store, outcomes, run_ranks, spoken
from tests.distributed.runs import small_config

LAYOUT: dict[str, Any] = {"timeout": 3.0}
SLACK = 12.0
"""Seconds for a busy machine."""


def stalled(folder: Path, n: int = 2) -> list[Any]:
    return [event for rank in range(n) for event in events(folder, "stalled", rank)]


def mute(world: World, folder: Path, rank: int, how: str) -> bool:
    """Train; in step 3 one rank leaves out a collective, waits in one that the others never join, or sleeps."""
    training = prepared(world, folder, LAYOUT, ())
    real = training.trainer.ranks.sum_gradients

    def sum_gradients(parameters: Any) -> None:
        if world.rank == rank and training.trainer.steps_done == 2:
            if how == "another collective":
                dist.broadcast(torch.zeros(1), src=0)  # which does not send
            time.sleep(3600)
        real(parameters)

    training.trainer.ranks.sum_gradients = sum_gradients
    return training.train()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["stop", "hang"])
def test_a_rank_that_stands_still_is_named(kind: str, rank: int, tmp_path: Path) -> None:
    start = time.monotonic()
    ends = outcomes(2, faulty, tmp_path / "run", LAYOUT, [fault(kind, rank, 3, "backward")], timeout=120.0)
    assert time.monotonic() - start < LAYOUT["timeout"] + GRACE + SLACK
    assert statuses(ends)[1 - rank] == STALLED
    assert statuses(ends)[rank] == (None if kind == "stop" else STALLED)
    (said,) = stalled(tmp_path / "run")
    assert said.fields["rank"] == rank and f"rank {rank} (pid" in said.fields["sentence"]
    assert said.fields["seconds"] > LAYOUT["timeout"]
    assert kind == "stop" or "step 2, backward" in said.fields["sentence"]  # one that was stopped told this before


@pytest.mark.parametrize("how", ["sleep", "another collective"])
def test_a_deadlock_of_three_names_the_rank(how: str, tmp_path: Path) -> None:
    ends = outcomes(3, mute, tmp_path / "run", 1, how, timeout=120.0)
    assert statuses(ends) == [STALLED] * 3
    (said,) = stalled(tmp_path / "run", 3)
    assert said.fields["rank"] == 1 and "optimizer" in said.fields["sentence"]


def test_a_stalled_run_continues_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(2, faulty, tmp_path / "whole", LAYOUT, ())
    attempts = until_end(2, tmp_path / "run", LAYOUT, [fault("hang", 1, 4, "forward")])
    assert [statuses(ends) for ends in attempts] == [[STALLED] * 2, [0, 0]]
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_a_stall_of_the_command_is_told_on_the_standard_error(tmp_path: Path) -> None:
    """Leave the output to the line of JSON."""
    plans = {seed: ChaosPlan.from_seed(seed, 2, 6, 2, ("hang",)).faults for seed in range(50)}
    seed = next(seed for seed, faults in plans.items() if faults and faults[0].rank == 1)
    args = [str(small_config(tmp_path)), "--out", str(tmp_path / "run"), "--json", "--chaos", f"{seed}:2:hang"]
    ends, said = spoken(tmp_path, *[[*args, "--parallel.timeout", "2"]] * 2)
    assert ends == [STALLED] * 2
    assert said[0].count("rank 1 (pid") == 1 and "--resume" in said[0]
    assert [(tmp_path / f"output-{rank}").read_text() for rank in range(2)] == ["", ""]


def test_a_slow_rank_is_no_stall(tmp_path: Path) -> None:
    """Stop a rank for less than the time-out, and let it continue."""
    assert run_ranks(2, paused, tmp_path / "run") == [True, True]
    assert stalled(tmp_path / "run") == []


def paused(world: World, folder: Path) -> bool:
    training = prepared(world, folder, LAYOUT, ())
    if world.rank == 1 and os.fork() == 0:  # a child that wakes its parent
        parent = os.getppid()
        time.sleep(0.3)
        os.kill(parent, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(parent, signal.SIGCONT)
        os._exit(0)
    real = training.trainer.step

    def step() -> Any:
        time.sleep(0.1)
        return real()

    training.trainer.step = step
    return training.train()


def hold_store(sender: Any) -> None:
    """Hold the store as a launcher does, until it is killed."""
    store = new_store()
    sender.send(store.port)
    time.sleep(600)


def kill_after(step: int, folder: Path, launcher: Any) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and not any(event.step >= step for event in events(folder, "step")):
        time.sleep(0.1)
    launcher.kill()


def test_a_run_whose_launcher_is_killed_is_saved_and_stops(tmp_path: Path) -> None:
    folder, (ours, theirs) = tmp_path / "run", START.Pipe(duplex=False)
    launcher = START.Process(target=hold_store, args=(theirs,), daemon=True)
    launcher.start()
    store = SimpleNamespace(port=ours.recv())
    killer = threading.Thread(target=kill_after, args=(3, folder, launcher))
    killer.start()
    ends = outcomes(2, faulty, folder, {}, (), {"steps": 5000, "save_every": 5000}, store=store)
    killer.join()
    assert [(end.status, end.value) for end in ends] == [(0, False)] * 2, ends
    (stopped,) = events(folder, "stopped")
    assert stopped.step >= 3 and [event.step for event in events(folder, "saved")] == [stopped.step]
