"""Checkpoints of several ranks: one format whatever the layout, so that any other layout continues."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmini.distributed.world import World
from dsmini.training.record import read_records
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import RECIPE, run, saved
from tests.helpers.runs import TIMING
from tests.helpers.tolerances import FP32_MODEL

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"ep": 2}),
    (4, {"ep": 4}),
    (4, {"ep": 2, "zero": 3}),
    (4, {"dp": 4, "zero": 1}),
]


def go(n: int, folder: Path, parallel: dict[str, Any], until: int = 8, **changes: Any) -> None:
    if n == 1:
        run(World(), folder, parallel, until, **changes)
    else:
        run_ranks(n, run, folder, parallel, until)


def rows(folder: Path) -> list[str]:
    return [json.dumps({k: v for k, v in r.row().items() if k not in TIMING}) for r in read_records(folder)]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never stopped")
    assert run(World(), folder)
    return folder


@pytest.mark.parametrize("after", [2, 4], ids="to layout {}".format)
@pytest.mark.parametrize("before", [0, 1, 3], ids="layout {}".format)
def test_another_layout_continues(before: int, after: int, tmp_path: Path, never_stopped: Path) -> None:
    go(*LAYOUTS[before][:1], tmp_path / "run", LAYOUTS[before][1], 5)
    go(*LAYOUTS[after][:1], tmp_path / "run", LAYOUTS[after][1])
    want, got = saved(never_stopped, 8), saved(tmp_path / "run", 8)
    assert got.keys() == want.keys()
    lr = 0.01
    for name, w in want.items():
        difference = (got[name].double() - w.double()).abs().max().item()
        assert difference <= FP32_MODEL * 8 * max(w.double().abs().max().item(), 2 * lr), name
    assert len(rows(tmp_path / "run")) == len(rows(never_stopped)) == RECIPE["steps"]


@pytest.mark.parametrize("layout", [1, 3], ids="layout {}".format)
def test_the_same_layout_continues_bit_for_bit(layout: int, tmp_path: Path) -> None:
    n, parallel = LAYOUTS[layout]
    go(n, tmp_path / "whole", parallel)
    go(n, tmp_path / "stopped", parallel, 5)
    go(n, tmp_path / "stopped", parallel)
    want, got = saved(tmp_path / "whole", 8), saved(tmp_path / "stopped", 8)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")


def test_every_layout_writes_the_same_bytes(tmp_path: Path) -> None:
    """Write what one process saved again, from every layout."""
    go(1, tmp_path / "one", {}, 5)
    want = (tmp_path / "one" / "checkpoints" / "step-000005" / "manifest.json").read_text()
    for n, parallel in LAYOUTS[1:]:
        (tmp_path / "one" / "events.jsonl").unlink()  # attempts without a step look like a crash loop
        assert run_ranks(n, rewrite, tmp_path / "one", parallel)[0] == want


def rewrite(world: World, folder: Path, parallel: dict[str, Any]) -> str:
    """Load the last checkpoint, save it again, and return its manifest."""
    from tests.distributed.runs import new_run

    training = new_run(world, folder, parallel)
    training.saver.config = training.saver.config.__class__.from_run(
        folder / "checkpoints" / "step-000005" / "config.toml"
    )
    training.saver.saved_at = None
    training.saver.save()
    return world.first(lambda: (folder / "checkpoints" / "step-000005" / "manifest.json").read_text())
