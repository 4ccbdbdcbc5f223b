"""The format of safetensors files: headers, checked before any tensor is read, and the writing of a file.

A file is eight bytes of length, that many bytes of JSON with the dtype, shape and place of every tensor, and the
tensors one after the other.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmini.reading import brief, open_regular, parse_json, readable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_DIMENSIONS = 64
"""Maximum number of dimensions of a tensor; torch takes no more."""
LONGEST_HEADER = 100_000_000
"""Limit in bytes; the safetensors library refuses longer ones too."""


@dataclass(frozen=True)
class StoredPiece:
    """The place of a tensor or of a part of it: from byte `start` to `end` of a file."""

    file: Path
    start: int
    end: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder; in pieces if ranks have parts of it, to be joined along `dim`."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]
    dim: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Header:
    """The header of one file, which holds the tensors that it names and nothing else."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises: ValueError naming the file and what is wrong with it.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first.startswith(b"version"):
                raise ValueError(f"{path} is a Git LFS pointer and not the file itself; fetch it with: git lfs pull")
            if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(
                    f"{path} has {size:,} bytes and a header of {length:,}: it is cut short or no safetensors file; "
                    "fetch it again"
                )
            text = file.read(length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the header of {path} is not JSON: {error}; fetch the file again") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; fetch it again") from None
    header = parse_json(text, f"the header of {path}")
    if not isinstance(header, dict):
        raise ValueError(f"the header of {path} is a {type(header).__name__}, want a table; fetch the file again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has __metadata__={brief(metadata)}, want a table of texts; fetch the file again")
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(path, tensors, 8 + length, size)
    return Header(tensors, metadata)


def _stored(path: Path, name: str, entry: Any, data: int) -> Stored:
    try:
        dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end)) or len(shape) > MOST_DIMENSIONS:
            raise TypeError("sizes are whole numbers")
    except (TypeError, KeyError, ValueError):
        raise ValueError(
            f"{path} describes {readable(name)} by {brief(entry)}; want dtype, shape and data_offsets: fetch it again"
        ) from None
    if dtype not in DTYPES:
        raise ValueError(f"{path} has {readable(name)} in the dtype {brief(dtype)}; dsmini reads {', '.join(DTYPES)}")
    want = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != want:
        raise ValueError(
            f"{path} gives {readable(name)}, {dtype} {list(shape)}, {end - start:,} bytes, want {want:,}; "
            "fetch it again"
        )
    return Stored(dtype, shape, (StoredPiece(path, data + start, data + end, shape),))


def _check_places(path: Path, tensors: Mapping[str, Stored], data: int, size: int) -> None:
    end = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].pieces[0].start, item[1].pieces[0].end)):
        piece = stored.pieces[0]
        if piece.start != end:
            raise ValueError(
                f"{path} has {readable(name)} at byte {piece.start:,}, want {end:,}: tensors overlap or have gaps"
            )
        end = piece.end
    if end > size:
        raise ValueError(f"{path} is cut short: it has {size:,} bytes of {end:,}; fetch it again")
    if end < size:
        raise ValueError(f"{path} has {size - end:,} bytes after its last tensor; fetch it again")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `make` gives it when its turn comes, on any device."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def entries_of(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return entries that write tensors as they are."""
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def header_of(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes of a file before its tensors, and the byte of the file at which each tensor starts."""
    # Wide types first, as the safetensors library has it, so that every tensor starts at a multiple of its width.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.nbytes
        places[entry.name] = start
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    before = len(text).to_bytes(8, "little") + text
    return before, {name: len(before) + start for name, start in places.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, as a file has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def begin_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a file with a header and room for its tensors; return the byte at which each starts."""
    before, places = header_of(entries, metadata)
    with path.open("wb") as file:
        file.write(before)
        file.truncate(len(before) + sum(entry.nbytes for entry in entries))
    return places


def write_at(file: int, view: memoryview, place: int) -> None:
    """Write all bytes into an open file from this place on: one call of the system may write fewer."""
    while len(view):
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written


def write_entries(
    path: Path,
    entries: Sequence[Entry],
    places: Mapping[str, int],
    wrote: Callable[[int], None] = lambda n: None,
) -> None:
    """Write some tensors into a file with room for all, holding one at a time, and force them to the disk."""
    file = os.open(path, os.O_WRONLY)
    try:
        for entry in sorted(entries, key=lambda entry: places[entry.name]):
            tensor = entry.make().detach()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
            write_at(file, bytes_of(tensor), places[entry.name])
            wrote(entry.nbytes)
        os.fsync(file)
    finally:
        os.close(file)


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    wrote: Callable[[int], None] = lambda n: None,
) -> None:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        wrote: told the bytes of each tensor that is written.
    """
    text, places = header_of(entries, metadata)
    with path.open("wb") as file:
        file.write(text)
        for entry in sorted(entries, key=lambda entry: places[entry.name]):
            tensor = entry.make().detach()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
            file.write(bytes_of(tensor))
            wrote(entry.nbytes)
