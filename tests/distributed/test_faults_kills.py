"""Processes that die, in any phase of a step or of a save: the run that is started again ends as one that never died.

A run with many faults in a row is compared, so that each start is one of the group of processes.
"""

import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from dsmini.distributed.world import World
from dsmini.training.events import read_events
from tests.distributed.faults import SAVE_PHASES, STEP_PHASES, Fault
from tests.distributed.ranks import outcomes, run_ranks
from tests.distributed.runs import KILLED, differences, events, run, statuses, until_end

EP: dict[str, Any] = {"ep": 2}
LOST = {1, -signal.SIGABRT}
"""Statuses of a rank whose peer died: it leaves, or gloo aborts it."""
RUNS = int(os.environ.get("DSMINI_KILLED_RUNS", "2"))
"""Number of runs that are killed at random moments."""
LONGER: dict[str, Any] = {"steps": 12, "eval_every": 5}
ENDS = {
    **{"kill": KILLED, "kill_saving": KILLED, "exception": 1},
    **{"abort": -signal.SIGABRT, "segfault": -signal.SIGSEGV},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run without faults that saves after each step."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(2, run, folder, EP, save_every=1) == [True, True]
    return folder


def assert_survived(folder: Path, faults: list[Fault], whole: Path, **changes: Any) -> None:
    """Run with faults, each of which ends one attempt, and compare the end."""
    attempts = until_end(2, folder, EP, faults, save_every=1, **changes)
    assert len(attempts) == len(faults) + 1
    for one, ends in zip(faults, attempts, strict=False):
        assert ends[one.rank].status == ENDS[one.kind], (one, statuses(ends), ends[one.rank].failure)
        assert ends[1 - one.rank].status in LOST, (one, statuses(ends), ends[1 - one.rank].failure)
    assert differences(folder, whole) == []


def test_killed_rank_is_restarted_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    assert_survived(tmp_path / "run", [Fault("kill", 1, 3, "backward")], whole)


@pytest.mark.slow
def test_kill_in_each_phase_of_a_step_on_each_rank(tmp_path: Path, whole: Path) -> None:
    places = [(phase, rank) for phase in STEP_PHASES for rank in (0, 1)]
    faults = [Fault("kill", rank, step, phase) for step, (phase, rank) in enumerate(places, 1)]
    assert_survived(tmp_path / "run", faults, whole)


def killed_at_random(world: World, folder: Path, seconds: float) -> bool:
    """Train, saving after each step; this process is killed after some seconds, unless it has come to its end."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        return run(world, folder, save_every=1, **LONGER)
    finally:
        timer.cancel()


@pytest.mark.slow
def test_kill_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Kill each run again and again at moments that are drawn, of steps and of saves."""
    assert run(World(), tmp_path / "whole", save_every=1, **LONGER)
    first, *_, last = read_events(tmp_path / "whole")
    longest, kills = last["time"] - first["time"], 0
    for seed in range(RUNS):
        draw, folder = random.Random(seed), tmp_path / f"{seed}"
        ends = [KILLED]
        while KILLED in ends:
            ends = statuses(outcomes(1, killed_at_random, folder, draw.uniform(0, longest)))
            kills += KILLED in ends
        assert ends == [0]
        assert differences(folder, tmp_path / "whole", LONGER["steps"]) == []
        shutil.rmtree(folder)
    print(f"{RUNS} runs, killed {kills} times, all equal")


@pytest.mark.slow
def test_stage_that_loses_another_ends_without_a_trace(tmp_path: Path) -> None:
    """Check that nothing is raised where a stage exchanges tokens: torch's pipeline wraps the error of the exchange."""
    faults = [Fault("kill", 3, 2, "forward")]
    ends = outcomes(4, run, tmp_path / "run", {"pp": 2, "ep": 2}, faults, grad_accum=2)
    assert ends[3].status == KILLED
    assert all(end.status in LOST and end.failure == "" for end in ends[:3]), ends


@pytest.mark.slow
def test_exception_abort_and_segfault(tmp_path: Path, whole: Path) -> None:
    kinds = ("exception", "abort", "segfault")
    faults = [Fault(kind, step % 2, step, "backward") for step, kind in enumerate(kinds, 2)]
    assert_survived(tmp_path / "run", faults, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "background"), [(0, False), (1, True)], ids=["rank 0", "rank 1 in the background"])
def test_kill_in_each_phase_of_a_save(rank: int, background: bool, tmp_path: Path, whole: Path) -> None:
    phases = SAVE_PHASES if rank == 0 else SAVE_PHASES[: SAVE_PHASES.index("before_rename")]
    faults = [Fault("kill_saving", rank, step, f"save:{phase}") for step, phase in enumerate(phases, 1)]
    assert_survived(tmp_path / "run", faults, whole, save_in_background=background)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_one_rank_saves_and_ends_all(rank: int, tmp_path: Path, whole: Path) -> None:
    folder, faults = tmp_path / "run", [Fault("terminate", rank, 3, "forward")]
    assert run_ranks(2, run, folder, EP, faults, save_every=8) == [False, False]
    steps = [[event["step"] for event in events(folder, name)] for name in ("saved", "stopped")]
    assert steps == [[3], [3]]
    assert run_ranks(2, run, folder, EP, faults, save_every=8) == [True, True]
    assert differences(folder, whole) == []
