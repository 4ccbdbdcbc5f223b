"""Safetensors files and folders of them: what is damaged or does not belong together is refused by name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmini import load_pretrained
from dsmini.checkpoint.safetensors_file import entries_of, write_safetensors
from dsmini.checkpoint.safetensors_reader import SafetensorsReader
from tests.helpers import folders
from tests.helpers.configs import refusal


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "{path} is cut short: it has"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "header of"),
        (lambda path: path.write_bytes(b""), "{path} has 0 bytes and a header of 0: it is cut short or no"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "{path} has 1 bytes after its last tensor"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "{path} is a Git LFS pointer"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"{{{{"), "the header of {path} is not JSON"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "the header of {path} is a list"),
        (lambda path: with_header(path, lambda h: h["lm_head.weight"].update(shape=[61, 25])), "want 6,100; fetch"),
        (
            lambda path: with_header(path, lambda h: h["lm_head.weight"].update(shape=[-1])),
            "{path} describes lm_head.w",
        ),
        (lambda path: with_header(path, lambda h: h["lm_head.weight"].update(dtype="F4")), "in the dtype 'F4'"),
        (lambda path: with_header(path, lambda h: h["model.norm.weight"].update(data_offsets=[0, 96])), "overlap"),
        (lambda path: with_header(path, lambda h: h["lm_head.weight"].pop("dtype")), "want dtype, shape and data_off"),
    ],
)
def test_damaged_file_is_named(folder: Path, damage: Callable[[Path], object], sentence: str) -> None:
    path = folder / "model.safetensors"
    damage(path)
    assert sentence.format(path=path) in refusal(load_pretrained, folder)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shards_are_named(sharded: Path) -> None:
    for i in (1, 3):
        (sharded / f"model-0000{i}-of-00003.safetensors").unlink()
    assert refusal(load_pretrained, sharded) == (
        f"{sharded} lacks model-00001-of-00003.safetensors, model-00003-of-00003.safetensors, which "
        "model.safetensors.index.json names; fetch what is missing"
    )
    (sharded / "model.safetensors.index.json").unlink()
    assert "no model.safetensors.index.json that says what is in them" in refusal(load_pretrained, sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors"])
def test_index_that_leaves_the_folder_is_refused(sharded: Path, file: str) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": file}))
    assert f"names the file {file!r}, which is not in the folder" in refusal(load_pretrained, sharded)


def test_index_that_contradicts_the_files_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": "x.bin"}))
    assert "names 'x.bin'; dsmini opens safetensors files only" in refusal(load_pretrained, sharded)
    edit_index(sharded, lambda weight_map: weight_map.pop("lm_head.weight"))
    load_pretrained(sharded)  # it is in a file that the index names
    edit_index(sharded, lambda m: m.update({"a": m["model.norm.weight"], "b": m["model.norm.weight"]}))
    assert "lacks tensors that model.safetensors.index.json names: a, b;" in refusal(load_pretrained, sharded)
    (sharded / "model.safetensors.index.json").write_text("{}")
    assert "is not an index of tensors" in refusal(load_pretrained, sharded)


def test_tensor_in_another_shard_than_indexed_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda m: m.update({"model.norm.weight": m["lm_head.weight"]}))
    assert "holds model.norm.weight, which model.safetensors.index.json has in" in refusal(load_pretrained, sharded)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(load_pretrained, folder)
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    assert "no safetensors file, only pytorch_model.bin; dsmini opens no pickles" in refusal(load_pretrained, folder)


TENSORS = {
    "b": torch.arange(12.0).view(3, 4).t(),
    "é\n/a": torch.tensor([1.0, -2.0]).bfloat16(),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "codes": torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
    "step": torch.tensor([5]),
    "mask": torch.tensor([True, False]),
}


def test_written_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    """Except where dtypes of one width are mixed, which checkpoints do not: the library has its own order of those."""
    tensors = {name: t for name, t in TENSORS.items() if name not in ("bytes", "mask")}
    write_safetensors(tmp_path / "ours", entries_of(tensors), {"step": "3"})
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"step": "3"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_written_file_is_read_by_the_library(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", entries_of(TENSORS), {"format": "pt"})
    assert not folders.different(load_file(tmp_path / "x"), TENSORS)


def test_reader_gives_back_every_bit_and_the_metadata(tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "x", {"step": "3"})
    reader = SafetensorsReader(tmp_path / "x")
    assert not folders.different(reader.read_all(), TENSORS)
    assert reader.metadata == {"step": "3"}


def test_writing_to_what_was_read_leaves_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "x")
    reader = SafetensorsReader(tmp_path / "x")
    view = reader.read("a")
    view.zero_()
    assert torch.equal(SafetensorsReader(tmp_path / "x").read("a"), torch.ones(9))
    del reader
    assert torch.equal(view, torch.zeros(9))  # outlives the reader


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(SafetensorsReader, tmp_path / "x") == f"there is no file {tmp_path / 'x'}; check the name"
