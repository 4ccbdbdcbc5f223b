"""Checkpoints of several ranks: one format whatever the layout, so that any other layout continues."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsmini.distributed.mesh import HeldRows
from dsmini.distributed.world import World
from dsmini.training import saving
from dsmini.training.saving import _plan
from tests.conftest import MODELS
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import assert_near, manifest_of_rewritten, run
from tests.helpers.runs import saved, untimed

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"ep": 2}),
    (4, {"ep": 4}),
    (4, {"ep": 2, "zero": 3}),
    (4, {"dp": 4, "zero": 1}),
    (2, {"pp": 2}),
]
BATCH: dict[str, Any] = {"batch_size": 16, "grad_accum": 2}


def go(layout: int, folder: Path, until: int = 0) -> Path:
    n, parallel = LAYOUTS[layout]
    how: dict[str, Any] = {"until": until, **BATCH}
    run_ranks(n, run, folder, parallel, **how) if n > 1 else run(World(), folder, **how)
    return folder


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Return the folder of a run of a layout that was stopped in a step; 0: of a whole run."""
    return cache(lambda layout, until: go(layout, tmp_path_factory.mktemp("left") / "run", until))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, 2),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0, 2), (3, 2), (0, 4), (1, 4), (3, 5), (5, 0))),
    ],
)
def test_another_layout_continues(before: int, after: int, tmp_path: Path, left: Callable[[int, int], Path]) -> None:
    shutil.copytree(left(before, 5), tmp_path / "run")
    assert_near(go(after, tmp_path / "run"), left(0, 0))


STAGED: dict[str, dict[str, Any]] = {
    "glm": {"indexer_types": ("full", "shared", "shared", "shared"), "indexer_target": "served"},
    "v4": {"hc_mult": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("base", STAGED)
def test_stages_with_indexers_resume_to_the_bit(base: str, tmp_path: Path) -> None:
    model = MODELS[base] | STAGED[base] | {"init_std": 0.1}
    for name, until in (("whole", 0), ("stopped", 5), ("stopped", 0)):
        run_ranks(2, run, tmp_path / name, {"pp": 2}, model=model, until=until, recompute=True, **BATCH)
    got, want = saved(tmp_path / "stopped"), saved(tmp_path / "whole")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    rows = untimed(tmp_path / "whole")
    assert untimed(tmp_path / "stopped") == rows and all("indexer_kl" in row for row in rows)


def lost_by_the_disk(world: World, folder: Path) -> str:
    """Train with a network file system that loses what rank 1 writes, and returns no error."""
    if world.rank == 1:
        saving.write_at = lambda *_: None
    try:
        run(world, folder, {"ep": 2}, save_every=100)
    except saving.NotSavedError as error:
        return str(error)
    return ""


def test_rows_that_a_file_system_loses_are_not_saved_as_zeros(tmp_path: Path) -> None:
    (words,) = {*run_ranks(2, lost_by_the_disk, tmp_path / "run")}
    assert "the file system has lost what rank 1 wrote into model.safetensors; no earlier one" in words
    assert not [*(tmp_path / "run").glob("checkpoints/*")]


@pytest.mark.parametrize(("experts", "ep", "dp"), [(4, 2, 3), (2, 2, 2), (8, 1, 5), (8, 2, 2)])
def test_every_row_of_experts_is_written_once(experts: int, ep: int, dp: int) -> None:
    """Where more ranks divide experts than there are, the last hold none, and must not write in place of others."""
    each = experts // ep
    rows = -(-each // dp)
    held = []
    for rank in range(ep * dp):
        first = min(each, rank % dp * rows)
        mine = max(0, min(rows, each - first))
        piece = HeldRows(shape=(experts, 3), first=rank // dp * each + first, rows=mine)
        held.append({"model": {"w": (piece, torch.ones(mine, 3))}})
    meta = [{"model": {"w": (torch.float32, each["model"]["w"][0])}} for each in held]
    written = []
    for rank, of_rank in enumerate(held):
        world: Any = SimpleNamespace(rank=rank, gather=lambda _: meta)
        plan, mine = _plan(world, of_rank)
        assert [entry.shape for entry in plan["model"]] == [(experts, 3)]
        written += [row for piece, _ in mine["model"].values() for row in range(piece.first, piece.first + piece.rows)]
    assert sorted(written) == list(range(experts))


@pytest.mark.slow
def test_every_layout_writes_the_same_bytes(tmp_path: Path, left: Callable[[int, int], Path]) -> None:
    """Write what one process saved again, from every layout."""
    shutil.copytree(left(0, 5), tmp_path / "run")
    want = (tmp_path / "run" / "checkpoints" / "step-000005" / "manifest.json").read_text()
    for n, parallel in LAYOUTS[1:]:
        assert run_ranks(n, manifest_of_rewritten, tmp_path / "run", parallel, 5, **BATCH)[0] == want
