"""Folders read and written by several ranks: each has its own experts alone, and the files are those of one process."""

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dsmini import ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.distributed import export
from dsmini.distributed.expert_shares import ExpertHolders, layers_of_holders
from dsmini.distributed.pretrained import load_pretrained as load_part
from dsmini.distributed.world import World
from tests.distributed.generating import FP8_SIZES, SIZES, new_folder, placement_of, saved
from tests.distributed.ranks import run_ranks
from tests.helpers.folders import config_of, different, read


@pytest.mark.parametrize(
    ("n", "fp8", "copies", "options"),
    [
        (2, "dequantize", True, {"fp8": True, "shard_size": "100KB"}),
        pytest.param(2, "dequantize", False, {}, marks=pytest.mark.slow),
        pytest.param(4, "keep", True, {"shard_size": "60KB"}, marks=pytest.mark.slow),
        pytest.param(2, "keep", False, {"dtype": torch.bfloat16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_saved_files_are_those_of_one_process(tmp_path: Path, n: int, fp8: Any, copies: bool, options: Any) -> None:
    folder = new_folder(tmp_path / "model", fp8=True)
    placement = placement_of(ModelConfig(**(SIZES | FP8_SIZES))) if copies else None
    one = save_pretrained(load_pretrained(folder, fp8=fp8), tmp_path / "one", **options)
    assert set(run_ranks(n, saved, folder, tmp_path / "several", placement, fp8, options)) == {one.nbytes}
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "several").iterdir()} == names
    for name in names:
        assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.slow
def test_tensors_are_saved_in_their_stored_dtypes(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "model", stored=torch.bfloat16)
    run_ranks(2, saved, folder, tmp_path / "again", None, "keep", {}, torch.float32)
    assert different(read(tmp_path / "again"), read(folder)) == set()
    assert config_of(tmp_path / "again") == config_of(folder)


def save_on_a_full_disk(world: World, folder: Path, out: Path) -> str:
    """Save where rank 1 has no space; return the error."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(export, "write_entries", full if world.rank == 1 else export.write_entries):
        try:
            saved(world, folder, out, None, "dequantize", {})
        except OSError as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_full_disk_of_one_rank_is_said_by_all_and_leaves_nothing(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "model")
    said = run_ranks(2, save_on_a_full_disk, folder, tmp_path / "out" / "x")
    assert said == ["[Errno 28] rank 1: No space left on device"] * 2
    assert list((tmp_path / "out").iterdir()) == []


def refusals(world: World, cases: list[tuple[Path, Any]]) -> list[str]:
    """Return the error of each case."""
    said: list[str] = []
    for path, placement in cases:
        with pytest.raises(ValueError, match=";") as error:
            load_part(world, path, placement=placement)
        said.append(str(error.value))
    return said


@pytest.mark.slow
def test_every_rank_raises_what_is_wrong(tmp_path: Path) -> None:
    folder, damaged = new_folder(tmp_path / "model"), new_folder(tmp_path / "damaged")
    dense = new_folder(tmp_path / "dense", n_dense_layers=3, n_mtp_layers=0)
    shard = damaged / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    cases = [(tmp_path / "nothing", None), (damaged, None), (dense, None), (folder, [[0] * 8] * 4), (folder, None)]
    first, *others = run_ranks(3, refusals, cases)
    assert all(other == first for other in others)
    words = ["there is no folder", "cut short", "no experts to divide", "8 places, not divisible by 3 processes"]
    words.append("8 experts are not divisible by 3 processes; start 2, say")
    assert [said for said, part in zip(first, words, strict=True) if part not in said] == []


def test_what_ranks_cannot_divide_is_refused() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SIZES))
    good = placement_of(model.config)
    for n, placement, words in (
        (9, None, "9 processes for 8 experts; start at most 8"),
        (2, good[:2], "the placement has 2 layers, and the model has 4"),
        (5, good, "layer 0 of the placement has 12 places, not divisible by 5 processes"),
        (2, [*good[:3], [8] * 12], "layer 3 of the placement names expert 8; the model has experts 0 to 7"),
        (2, [*good[:3], [0, 1, 2, 3, 4, 5, 7, 7]], "no place for expert 6; give each expert one or more"),
        (2, [[], *good[1:]], "layer 0 of the placement has 0 places"),
    ):
        with pytest.raises(ValueError, match=words):
            layers_of_holders(model, n, placement)


def test_copies_of_an_expert_take_turns() -> None:
    holders = ExpertHolders.of_places([0, 1, 2, 0, 3, 2, 0, 0], 4, 4)
    assert holders.held == ((0, 1), (0, 2), (2, 3), (0,))
    indices = torch.rand(300, 4).argsort(1)[:, :2]
    ranks = holders.rank_of_visits(indices)
    for expert in range(4):
        visits = ranks[indices == expert].bincount(minlength=4)
        holds = torch.tensor([expert in own for own in holders.held])
        mean = visits.sum() / holds.sum()
        assert ((visits - holds * mean).abs() <= 4 * mean.sqrt() * (holds.sum() > 1)).all()
    assert all(expert in holders.held[holders.writer(expert)] for expert in range(4))
