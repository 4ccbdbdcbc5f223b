"""Files of tensors: every bit comes back, and a quantized tensor's file of something else is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmini.checkpoint.quantized import load_quantized, save_quantized
from dsmini.checkpoint.safetensors_file import entries_of, write_safetensors
from dsmini.checkpoint.safetensors_reader import SafetensorsReader
from dsmini.numerics import FORMATS, quantize
from tests.helpers import folders
from tests.helpers.configs import refusal
from tests.helpers.quantizer import EVERY_CUT, EVERY_FORMAT, alike, same

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


@EVERY_CUT
@EVERY_FORMAT
@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
def test_file_keeps_every_bit(
    tmp_path: Path, shape: tuple[int, ...], tile: Any, tiles: tuple[int, ...], format: Any, scale: Any
) -> None:
    x = torch.randn(shape).half()
    if x.numel():
        x.view(-1)[0] = torch.nan
    q = quantize(x, tile, scale, format)
    save_quantized(q, tmp_path / "q.safetensors")
    back = load_quantized(tmp_path / "q.safetensors")
    assert alike(back, q)
    assert type(back.tile) is type(q.tile) and type(back.shape) is type(q.shape)
    assert same(back.dequantize(), q.dequantize())
    assert back.source is None
    save_quantized(load_quantized(str(tmp_path / "q.safetensors"), "cpu"), str(tmp_path / "again.safetensors"))
    assert alike(load_quantized(tmp_path / "again.safetensors"), q)
    there = load_file(tmp_path / "q.safetensors")
    assert there["codes"].dtype == FORMATS[format].dtype


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    q = quantize(torch.randn(3, 130))
    save_file({"weight": torch.ones(3)}, path)
    said = "it holds ['weight'] and metadata of []; want codes, scales and tile"
    assert refusal(load_quantized, path) == f"{path} is not a file of save_quantized: {said}"
    save_file({"codes": q.codes, "scales": q.scales}, path, {"format": "pt"})
    assert "metadata of ['format']" in refusal(load_quantized, path)
    save_file({"codes": q.codes, "scales": q.scales, "more": q.scales.clone()}, path, {"tile": "[1, 128]"})
    assert "['codes', 'more', 'scales']" in refusal(load_quantized, path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": None}, "'shape'"),
        ({"format": None}, "'format'"),
        ({"format": "e9m9"}, "format='e9m9' is unknown"),
        ({"format": "e5m2"}, "codes are [3, 130] torch.float8_e4m3fn; want [3, 130] torch.float8_e5m2"),
        ({"shape": "[3, 131]"}, "want [3, 131]"),
        ({"tile": "[1, 64]"}, "scales are [3, 2] torch.float32; want [3, 3] torch.float32"),
        ({"tile": "x"}, "Expecting value"),
        ({"tile": "[0, 1]"}, "is not a tile"),
        ({"scale": "big"}, "scale='big' is unknown"),
        ({"dtype": "save"}, "'save'"),
    ],
)
def test_file_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, str | None], said: str) -> None:
    path = tmp_path / "x.safetensors"
    q = quantize(torch.randn(3, 130))
    about = {"shape": "[3, 130]", "tile": "[1, 128]", "scale": "ue8m0", "format": "e4m3", "dtype": "float32"} | changes
    save_file({"codes": q.codes, "scales": q.scales}, path, {k: v for k, v in about.items() if v is not None})
    words = refusal(load_quantized, path)
    assert words.startswith(f"{path} is not a file of save_quantized: ") and said in words
    path.write_bytes(b"not at all")
    assert "is not a file of save_quantized" in refusal(load_quantized, path)
