"""The state that a checkpoint must hold, and numbers that go wrong: on all ranks alike, or not at all."""

import dataclasses
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini.checkpoint.training_state import Checkpoint, RunState
from dsmini.distributed.world import World
from dsmini.training.spikes import SkippedBatches
from tests.distributed.faults import Fault
from tests.distributed.ranks import outcomes, run_ranks
from tests.distributed.runs import (
    RECIPE,
    before_each_step,
    differences,
    events,
    new_run,
    rows,
    run,
    saved,
    statuses,
    until_end,
)

pytestmark = pytest.mark.slow
EP: dict[str, Any] = {"ep": 2}
ROWS = RECIPE["batch_size"]
NANS = [Fault("nan", 1, step, "forward") for step in (7, 8)]
"""Steps that are skipped before and after the stop: nothing that comes later hides a count, or the best loss."""
LEFT_OUT = SkippedBatches(ranges=((60, 65),), rewinds=1)
PARTS = ("model", "optimizer", "average", "rng")
TIMES = ("seconds", "corpus_sha256")
"""Fields that change no step: the time so far, and what a resumed run only compares."""
DROPPED = [*PARTS, *(f.name for f in dataclasses.fields(RunState) if f.name not in TIMES)]


def stopped_after_seven(world: World, folder: Path, stop: bool) -> bool:
    """Train with a skipped step and sequences that are left out; stop after step 7 if asked to."""
    training = new_run(world, folder, EP, NANS)
    training.trainer.left_out = LEFT_OUT

    def before() -> None:
        torch.rand(1)  # so that the random numbers are in another state after each step
        if stop and training.trainer.steps_done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before_each_step(training, before)
    return training.train()


def without(checkpoint: Checkpoint, dropped: str) -> Checkpoint:
    """Return a checkpoint in which a part is as that of a new run."""
    if dropped == "nothing":
        return checkpoint
    if dropped in PARTS:
        tensors = {name: torch.zeros_like(t) for name, t in checkpoint.tensors[dropped].items()}
        if dropped == "rng":
            tensors = {name: torch.Generator().manual_seed(9).get_state() for name in tensors}
        return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, dropped: tensors})
    fresh: dict[str, Any] = {"left_out": {}, "row": {**checkpoint.state.row, "loss": 0.0}}
    changes = {dropped: fresh.get(dropped, 0)}
    if dropped.startswith("best_val"):  # they go together
        changes = {"best_val_loss": None, "best_val_step": None}
    return dataclasses.replace(checkpoint, state=dataclasses.replace(checkpoint.state, **changes))


def resumed_without(world: World, before: Path, place: Path, parts: Sequence[str]) -> None:
    """For each part: continue a stopped run from a checkpoint that lacks it, in a folder of its own."""
    for part in parts:
        world.first(lambda part=part: shutil.copytree(before, place / part) and None)
        training = new_run(world, place / part, EP, NANS)
        checkpoint = without(training.newest_checkpoint(str), part)
        torch.manual_seed(5)
        training.saver.saved_at = None
        training.trainer.left_out = SkippedBatches()
        training.history.best = None
        training.resume(checkpoint)
        before_each_step(training, lambda: torch.rand(1))
        training.train()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `whole`, a run that never stopped, and one without each part."""
    place = tmp_path_factory.mktemp("dropped")
    run_ranks(2, stopped_after_seven, place / "whole", False)
    assert run_ranks(2, stopped_after_seven, place / "before", True) == [False, False]
    run_ranks(2, resumed_without, place / "before", place, ["nothing", *DROPPED])
    return place


def test_nothing_dropped_equals_the_whole_run(resumed: Path) -> None:
    assert differences(resumed / "nothing", resumed / "whole") == []


@pytest.mark.parametrize("part", DROPPED)
def test_each_part_that_is_dropped_is_seen(part: str, resumed: Path) -> None:
    steps = {path.name for path in (resumed / part / "checkpoints").iterdir()}
    assert "step-000008" not in steps or differences(resumed / part, resumed / "whole") != []


# --- numbers


def test_nan_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    """Compare what the ranks hold alike after each step."""
    for rank in (0, 1):
        faults = [Fault("nan", rank, 3, "forward")]
        assert run_ranks(2, run, tmp_path / f"{rank}", {"dp": 2, "check_replicas": 1}, faults) == [True, True]
    assert [row["step"] for row in rows(tmp_path / "0") if row["skipped"]] == [3]
    got, want = saved(tmp_path / "1"), saved(tmp_path / "0")
    assert all(torch.equal(got[name], want[name]) for name in want)


SPIKE: dict[str, Any] = {"steps": 40, "max_rewinds": 2, "eval_every": 40, "ema_decay": None, "optimizer": "adamw"}


def left_out(world: World, folder: Path, ranges: Any) -> bool:
    training = new_run(world, folder, EP, **SPIKE)
    training.trainer.left_out = SkippedBatches(ranges=ranges, rewinds=1)
    return training.train()


def test_spike_rewinds_and_leaves_its_batches_out(tmp_path: Path) -> None:
    faults = [Fault("spike", 1, 36, "forward")]
    assert run_ranks(2, run, tmp_path / "run", EP, faults, **SPIKE) == [True, True]
    (rewound,) = events(tmp_path / "run", "rewound")
    assert rewound["step"] == 34
    assert run_ranks(2, left_out, tmp_path / "want", ((34 * ROWS, 36 * ROWS),)) == [True, True]
    assert differences(tmp_path / "run", tmp_path / "want", 40) == []


def test_more_spikes_than_rewinds_end_the_run(tmp_path: Path) -> None:
    faults = [Fault("spike", rank, step, "forward") for rank, step in ((1, 36), (0, 37))]
    ends = outcomes(2, run, tmp_path / "run", EP, faults, **SPIKE | {"max_rewinds": 1})
    assert statuses(ends) == [1, 1] and all("spiked again after 1 rewinds" in end.failure for end in ends)


def test_flipped_bit_is_caught_within_its_steps_and_never_saved(tmp_path: Path) -> None:
    layout, changes = {"dp": 3, "check_replicas": 2}, {"keep": 8, "optimizer": "adamw"}
    run_ranks(3, run, tmp_path / "whole", layout, **changes)
    faults = [Fault("flip", 1, 4, "between")]  # after step 3, before the step that is saved
    attempts = until_end(3, tmp_path / "run", layout, faults, **changes)
    assert [statuses(ends) for ends in attempts] == [[1] * 3, [0] * 3]
    assert all("rank 1 differs in" in end.failure for end in attempts[0])
    (found,) = events(tmp_path / "run", "corrupted")
    assert found["step"] <= 3 + 2 and found["rank"] == [1]
    for step in (2, 4, 6, 8):
        assert differences(tmp_path / "run", tmp_path / "whole", step) == []
