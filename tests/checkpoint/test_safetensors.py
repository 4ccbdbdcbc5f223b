"""Files of tensors: every bit comes back, and written files are those of the safetensors library."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsmini.checkpoint.tensor_files import Entry, SafetensorsReader, write_safetensors
from tests.helpers import folders

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


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def test_written_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    """Except where dtypes of one width are mixed, which checkpoints do not: the library has its own order of those."""
    tensors = {name: t for name, t in TENSORS.items() if name not in ("bytes", "mask")}
    write_safetensors(tmp_path / "ours", entries_of(tensors), {"step": "3"})
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"step": "3"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_bit_comes_back_by_either_reader(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", entries_of(TENSORS), {"format": "pt"})
    assert not folders.different(load_file(tmp_path / "x"), TENSORS)
    assert not folders.different(SafetensorsReader(tmp_path / "x").read_all(), TENSORS)


def test_writing_to_what_was_read_leaves_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "x")
    reader = SafetensorsReader(tmp_path / "x")
    view = reader.read("a")
    view.zero_()
    assert torch.equal(SafetensorsReader(tmp_path / "x").read("a"), torch.ones(9))
    del reader
    assert torch.equal(view, torch.zeros(9))  # outlives the reader
