"""Checkpoints on disk: what is damaged is named and passed over, what is saved is whole, what is old goes."""

import dataclasses
import hashlib
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from dsmini.atomic import remove_folders
from dsmini.checkpoint import tensor_files, training_state
from dsmini.checkpoint.training_state import MANIFEST, load_run, model_checkpoint, write_manifest
from dsmini.distributed.world import World
from dsmini.training import saving as checkpoints
from dsmini.training.run import newest_checkpoint
from tests.checkpoint.conftest import OPTIONS
from tests.distributed.faults import Fault, inject
from tests.helpers import folders
from tests.helpers.configs import refusal
from tests.helpers.runs import new_run, resumed

FILES = ["model.safetensors", "optimizer.safetensors", "average.safetensors", "rng.safetensors"]
FILES += ["config.toml", "state.json", MANIFEST]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Copy the run, to damage it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def cut(path: Path, where: float) -> None:
    path.write_bytes(path.read_bytes()[: int(where * (path.stat().st_size - 2))])


PLACES = (0.0, 0.3, 1.0)
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"a bit flipped at {where}": partial(flip, where=where) for where in PLACES},
    **{f"cut off at {where}": partial(cut, where=where) for where in PLACES},
    "missing": Path.unlink,
    "of another checkpoint": lambda path: shutil.copy(path.parents[1] / "step-000002" / path.name, path),
}
OF_THE_MANIFEST: dict[str, Callable[[Path], object]] = {
    "numbers for entries": lambda path: path.write_text(re.sub(r"\{[^{}]*\}", "3", path.read_text())),
    "numbers for hashes": lambda path: path.write_text(re.sub(r'"[0-9a-f]{64}"', "3", path.read_text())),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_named_and_passed_over(run: Path, name: str) -> None:
    file, config = run / "checkpoints/step-000004" / name, load_run(run)[1]
    whole = file.read_bytes()
    for damage, do in (DAMAGES | (OF_THE_MANIFEST if name == MANIFEST else {})).items():
        file.write_bytes(whole)
        do(file)
        if (name, damage) == ("config.toml", "of another checkpoint"):  # it is the same in both
            continue
        said: list[str] = []
        found = newest_checkpoint(dataclasses.replace(config, out=run), World(), said.append)
        assert found.folder.name == "step-000002", damage
        (sentence,) = said
        assert str(file.parent) in sentence and "using step-000002" in sentence
        assert name in sentence or MANIFEST in sentence


MISFITS = tomllib.loads(Path(__file__).with_name("folders.toml").read_text(encoding="utf-8"))["checkpoint"]


@pytest.mark.parametrize("case", MISFITS, ids=lambda case: case["said"])
def test_checkpoint_that_does_not_fit_is_refused(run: Path, case: dict[str, Any]) -> None:
    last = run / "checkpoints/step-000004"
    folders.damage(last, case)
    write_manifest(last, FILES[:-1])
    said: list[str] = []
    assert resumed(run, said=said, **OPTIONS).trainer.steps_done == 2
    assert case["said"] in said[0]


def test_run_whose_checkpoints_are_all_damaged_is_refused(run: Path) -> None:
    first, last = run / "checkpoints/step-000002", run / "checkpoints/step-000004"
    first.rename(run / "checkpoints/step-000007")
    cut(last / MANIFEST, 0.5)
    with pytest.raises(ValueError, match=r"is of step 2, the folder's name says 7; .*manifest.json is not JSON"):
        resumed(run, **OPTIONS)
    (run / "checkpoints/step-000007").rename(first)
    write_manifest(last, FILES[:-1])
    flip(last / "optimizer.safetensors", 0.5)
    cut(first / "state.json", 0.5)
    words = r"step-000004: optimizer.* has sha256 .*step-000002: state.json has \d+ bytes"
    with pytest.raises(ValueError, match=words):
        resumed(run, **OPTIONS)


@pytest.mark.parametrize(
    ("owner", "name"), [(hashlib, "file_digest"), (os, "open"), (tensor_files, "safe_open")], ids=lambda x: str(x)
)
def test_unreadable_checkpoint_is_not_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """A later save would remove it, although it may be whole."""
    training, real = new_run(run, **OPTIONS), getattr(owner, name)

    def fail_once(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(owner, name, real)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(owner, name, fail_once)
    said = refusal(newest_checkpoint, training.config, World(), pytest.fail)
    assert said.startswith(f"cannot read {run}/checkpoints/step-000004: cannot read ")
    assert "Input/output error" in said and "move that folder away to continue from the one before" in said
    assert resumed(run, **OPTIONS).trainer.steps_done == 4
    assert names(run) == ["step-000002", "step-000004"]


def test_checkpoint_of_a_newer_version_is_not_passed_over(run: Path) -> None:
    path = run / "checkpoints/step-000004" / MANIFEST
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    said = refusal(resumed, run, **OPTIONS)
    assert said.startswith(
        f"cannot read {path.parent}: manifest.json has format 2, this dsmini reads 1; try again, or "
    )
    assert names(run) == ["step-000002", "step-000004"]
    shutil.rmtree(run / "checkpoints/step-000002")
    assert refusal(resumed, run, **OPTIONS).endswith("try again"), "there is none before"
    path.write_text(path.read_text().replace('"format": 2', '"format": true'))
    assert "manifest.json is damaged" in refusal(resumed, run, **OPTIONS)


def test_checkpoint_that_is_replaced_meanwhile_is_not_missed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keep=1 a trainer saves step 4 and removes step 2 while that is read."""
    first, last, real = run / "checkpoints/step-000002", run / "checkpoints/step-000004", training_state.verify
    last.rename(run / "later")

    def verify(folder: Path, listed: Iterable[str]) -> None:
        if folder == first:
            (run / "later").rename(last)
            remove_folders([first])
        real(folder, listed)

    monkeypatch.setattr(training_state, "verify", verify)
    assert model_checkpoint(run, say=pytest.fail).state.step == 4


def test_average_is_loaded_in_place_of_parameters(run: Path) -> None:
    model, _ = load_run(run, average=True)
    average = load_file(run / "checkpoints/step-000004/average.safetensors")
    last = load_file(run / "checkpoints/step-000004/model.safetensors")
    assert all(torch.equal(p, average[name]) for name, p in model.named_parameters())
    assert not all(torch.equal(p, last[name]) for name, p in model.named_parameters())
    assert all(torch.equal(b, last[name]) for name, b in model.named_buffers())


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    assert new_run(tmp_path, keep=keep, steps=7, eval_every=100).train()
    assert names(tmp_path) == [f"step-{step:06d}" for step in (2, 4, 6, 7)][-keep:]


def test_damaged_later_checkpoint_does_not_count_as_kept(run: Path) -> None:
    """With keep=1 the whole checkpoint must not be removed in favour of the damaged one."""
    flip(run / "checkpoints/step-000004/model.safetensors", 0.5)
    training = resumed(run, **(OPTIONS | {"keep": 1, "save_every": 1, "steps": 3}))
    assert names(run) == ["step-000002", "step-000004"]
    assert training.train()
    assert names(run) == ["step-000003"]
    assert resumed(run, **OPTIONS).trainer.steps_done == 3


def test_damaged_checkpoint_before_the_next_one_does_not_count_as_kept(run: Path) -> None:
    """Step 4 is damaged, and step 2, from which the run continued, must stay next to step 5."""
    flip(run / "checkpoints/step-000004/model.safetensors", 0.5)
    assert resumed(run, **(OPTIONS | {"keep": 2, "save_every": 5, "steps": 5})).train()
    assert names(run) == ["step-000002", "step-000005"]


def test_checkpoint_that_cannot_be_removed_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "prune", Mock(side_effect=OSError(13, "Permission denied")))
    training = new_run(tmp_path, **(OPTIONS | {"keep": 1}))
    training.console.quiet = False
    assert training.train()
    assert names(tmp_path) == ["step-000002", "step-000004"]
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot remove old checkpoints" in said and "cannot save" not in said


def test_full_disk_on_the_way_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk is full when the checkpoints of steps 4 and 6 are written."""
    training = new_run(tmp_path, **(OPTIONS | {"steps": 8}))
    inject(training, [Fault("full_disk", 0, step, "save:written") for step in (4, 6)])
    training.console.quiet = False
    assert training.train()
    assert names(tmp_path) == ["step-000002", "step-000008"]
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint of step 6: No space left on device; step 2 is still there; training continues" in said


def test_run_whose_metrics_were_removed_meanwhile_is_saved(tmp_path: Path) -> None:
    training = new_run(tmp_path, **OPTIONS)
    training.watch = lambda step: (tmp_path / "metrics.jsonl").unlink() if step.step == 3 else None
    assert training.train()
    assert names(tmp_path) == ["step-000002", "step-000004"]
    assert resumed(tmp_path, **OPTIONS).trainer.steps_done == 4


def test_checkpoint_has_its_own_config(run: Path) -> None:
    """The run's own config.toml may have been changed since."""
    config = load_run(run)[1]
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, route_scale=9.0))
    (run / "config.toml").write_text(changed.to_toml())
    assert load_run(run)[1] == load_run(run / "checkpoints/step-000004")[1] == config
