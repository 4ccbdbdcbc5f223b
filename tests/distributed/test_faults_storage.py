"""Storage that fails, and checkpoints that are damaged: said with the ranks, and never loaded into a live run."""

import io
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dsmini.distributed.world import World
from dsmini.machine import random_state
from dsmini.training.saving import NotSavedError
from tests.distributed.faults import Fault, of_this_process
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import STEPS, differences, new_run, run, until_end

pytestmark = pytest.mark.slow
EP: dict[str, Any] = {"ep": 2}
THREE: dict[str, Any] = {"dp": 3}


def told(world: World, folder: Path, faults: list[Fault], **changes: Any) -> tuple[str, str]:
    """Train; return what the run says on its way, and the error of its last save."""
    training = new_run(world, folder, THREE, faults, **changes)
    said, error = io.StringIO(), ""
    training.console = Console(file=said, width=1000)
    try:
        training.train()
    except NotSavedError as failure:
        error = str(failure)
    return said.getvalue(), error


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three ranks without faults."""
    folder = tmp_path_factory.mktemp("three")
    run_ranks(3, run, folder, THREE)
    return folder


@pytest.mark.parametrize("background", [False, True], ids=["in the way", "in the background"])
def test_storage_error_names_its_ranks_and_the_run_continues(background: bool, tmp_path: Path, three: Path) -> None:
    faults = [
        Fault("io_error", 1, 2, "save:writing"),
        *(Fault("full_disk", rank, 4, "save:writing") for rank in (1, 2)),
        Fault("full_disk", 0, 6, "save:before_rename"),
    ]
    (said, error), *others = run_ranks(3, told, tmp_path / "run", faults, save_in_background=background)
    assert error == "" and all(other[1] == "" for other in others)
    assert "step 2: rank 1: Input/output error; no earlier one is there" in said
    assert "step 4: ranks 1, 2: No space left on device" in said
    assert "step 6: No space left on device" in said  # rank 0 alone finishes a save
    assert not list((tmp_path / "run").rglob(".*partial*"))
    assert differences(tmp_path / "run", three) == []


def test_failed_last_save_raises_on_all_ranks(tmp_path: Path, three: Path) -> None:
    faults = [Fault("full_disk", 2, STEPS, "save:written")]
    results = run_ranks(3, told, tmp_path / "run", faults)
    assert all(f"step {STEPS}: rank 2: No space left on device; step 6 is still there" in error for _, error in results)
    until_end(3, tmp_path / "run", THREE, faults)
    assert differences(tmp_path / "run", three) == []


# --- a save in the background


def background(world: World, folder: Path) -> list[str]:
    """Train with slow saves in the background; return the phases of saves and steps of this rank, in their order."""
    training = new_run(world, folder, EP, save_in_background=True)
    told: list[str] = []

    def slow(phase: str) -> None:
        told.extend([phase] if phase.startswith("save:") else [])
        if phase == "save:writing":
            writing = len(told)
            while len(told) == writing and training.trainer.steps_done < STEPS:  # until a step changed the parameters
                pass

    real = training.trainer.step

    def step() -> Any:
        result = real()
        told.append("step")
        return result

    of_this_process[0].at, training.trainer.step = slow, step
    training.train()
    return told


def test_steps_while_a_save_writes_do_not_change_its_files(tmp_path: Path) -> None:
    run_ranks(2, run, tmp_path / "whole", EP)
    told = run_ranks(2, background, tmp_path / "run")[0]
    for step in (4, 6, 8):
        assert differences(tmp_path / "run", tmp_path / "whole", step) == []
    for first, second in pairwise(told):
        assert first != "save:writing" or second in ("step", "save:written")
    assert "step" in [second for first, second in pairwise(told) if first == "save:writing"]
    phases = [phase for phase in told if phase.startswith("save:")]
    assert phases == phases[: len(phases) // 4] * 4  # one save after the other


def late_saves(world: World, folder: Path) -> bool:
    """Train while saves in the background wait for rank 1: their messages must not be taken for those of steps."""
    training = new_run(world, folder, EP, save_in_background=True)
    of_this_process[0].at = lambda phase: time.sleep(0.1 * world.rank)
    return training.train()


def test_save_in_the_background_has_a_group_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(2, late_saves, tmp_path / "run") == [True, True]


# --- damage


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def swap(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x")
    (folder / "average.safetensors").rename(folder / "model.safetensors")
    (folder / "x").rename(folder / "average.safetensors")


def change_the_step(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 7'))


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{"bit": flip_a_bit, "truncated": truncate, "swapped": swap, "step": change_the_step},
    "deleted": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
}
ALL_DAMAGED = "all"


def damaged(whole: Path, place: Path) -> None:
    """Make a copy of a run for each damage of its newest checkpoint, and one in which each checkpoint has a bad bit."""
    for name in (*DAMAGE, ALL_DAMAGED):
        shutil.copytree(whole, place / name)
        for path in (place / name / "checkpoints").iterdir():
            if name == ALL_DAMAGED or path.name == f"step-{STEPS:06d}":
                DAMAGE.get(name, flip_a_bit)(path)


def look(world: World, place: Path) -> dict[str, tuple[bool, int, list[str]]]:
    """Return for each damage: whether nothing changed, the step that is read or 0, and what is said."""
    training = new_run(world, place / "live", EP)
    training.trainer.step()
    found = {}
    for name in (*DAMAGE, ALL_DAMAGED):
        before, said, step = live(training), [], 0
        training.folder = place / name
        try:
            step = training.newest_checkpoint(said.append).state.step
        except ValueError as failure:
            said = [str(failure)]
        after = live(training)
        found[name] = (all(torch.equal(after[key], tensor) for key, tensor in before.items()), step, said)
    return found


def live(training: Any) -> dict[str, torch.Tensor]:
    parts = training.trainer.tensors() | {"rng": random_state(training.trainer.device)}
    tensors = {f"{part}/{name}": t.detach().clone() for part, of in parts.items() for name, t in of.items()}
    return tensors | {"steps": torch.tensor(training.trainer.steps_done)}


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[bool, int, list[str]]]]:
    place = tmp_path_factory.mktemp("damage")
    run_ranks(2, run, place / "whole", EP)
    damaged(place / "whole", place)
    return run_ranks(2, look, place)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_refused_before_anything_changes(name: str, looks: Any) -> None:
    for of_rank in looks:
        unchanged, step, said = of_rank[name]
        assert unchanged and step == 6
        assert len(said) == 1 and f"step-{STEPS:06d}" in said[0] and "using step-000006" in said[0]


def test_all_checkpoints_damaged_raises_on_all_ranks(looks: Any) -> None:
    for of_rank in looks:
        unchanged, step, (error,) = of_rank[ALL_DAMAGED]
        assert unchanged and step == 0
        assert error.count("cannot read") == 3 and "no other checkpoint" in error
