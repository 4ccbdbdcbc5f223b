"""Tensors in safetensors files: one file, a sharded folder, or the ranks of DeepSeek's inference layout.

The safetensors library reads and checks them. Nothing else is opened: a pickle can run code when it is read. Files are
written here, because the library wants all tensors of a file at once, and several processes write rows of one file.

A folder of Hugging Face's layout has one file, model.safetensors, or several and an index. One of DeepSeek's inference
layout has a file for each rank of a tensor-parallel group, model0-mp8.safetensors, model1-mp8.safetensors, ...; many of
its tensors are split into one piece for each rank.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsmini.checkpoint.tensor_names import inference_split, is_routed_expert
from dsmini.reading import UnreadableError, brief, check_path, is_there, listed, open_regular, read_table, readable

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
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_RANK = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; in several if ranks have parts of it, to be joined along `dim`."""

    dtype: str
    shape: tuple[int, ...]
    files: tuple[Path, ...]
    dim: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsReader:
    """The tensors of a file or folder, read from mapped files when they are asked for.

    Opening reads and checks all headers, but no tensor.

    Raises: ValueError naming every file that is missing or wrong, and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self._open: dict[Path, Any] = {}
        self.metadata: dict[str, str] = {}
        """Texts in the header of a single file; empty for a folder."""
        if path.is_dir():
            self.tensors = _inference_tensors(path) if is_inference_layout(path) else _folder_tensors(path)
        else:
            self.tensors = _header(path)
            self.metadata = self._file(path).metadata() or {}

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; one in a single file is a view of the file, with copy on write."""
        stored = self.tensors[name]
        parts = [self._file(file).get_tensor(name) for file in stored.files]
        if len(parts) == 1:
            return parts[0]
        # as bytes, for torch cannot join numbers of every dtype
        joined = torch.cat([part.unsqueeze(-1).view(torch.uint8) for part in parts], stored.dim)
        return joined.view(parts[0].dtype).squeeze(-1)

    def read_all(self) -> dict[str, Tensor]:
        """Return all tensors by name, as `read` gives them."""
        return {name: self.read(name) for name in self.tensors}

    def release(self) -> None:
        """Let go of the memory of what was read, where no tensor uses it any more."""
        self._open.clear()

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


def _opened(path: Path) -> Any:
    with open_regular(path) as file:
        if file.read(7) == b"version":
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself; fetch it with: git lfs pull")
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror or error}; check the disk") from None
    except SafetensorError as error:
        said = readable(str(error).removeprefix("Error while deserializing header: "))
        raise ValueError(f"{path} is no safetensors file, is cut short or damaged: {said}; fetch it again") from None


def _header(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file in the order of their places."""
    file, tensors = _opened(path), {}
    for name in file.offset_keys():
        part = file.get_slice(name)
        dtype = part.get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{path} has {readable(name)} in the dtype {dtype}; dsmini reads {', '.join(DTYPES)}")
        tensors[name] = Stored(dtype, tuple(part.get_shape()), (path,))
    return tensors


def _folder_tensors(folder: Path) -> dict[str, Stored]:
    """Find all tensors of a folder in Hugging Face's layout, in the order of the files and their places."""
    one, index = folder / ONE_FILE, folder / INDEX
    if is_there(one) and is_there(index):
        raise ValueError(f"{folder} has both {ONE_FILE} and {INDEX}; remove the one that is not the model's")
    if is_there(one):
        return _header(one)
    if not is_there(index):
        raise ValueError(_no_tensors(folder))
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not is_there(folder / name)]:
        raise ValueError(f"{folder} lacks {listed(missing)}, which {INDEX} names; fetch what is missing")
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(folder / file).items():
            if weight_map.get(name, file) != file:
                raise ValueError(
                    f"{folder / file} holds {readable(name)}, which {INDEX} has in {weight_map[name]}; fetch both"
                )
            tensors[name] = stored
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise ValueError(f"{folder} lacks tensors that {INDEX} names: {listed(missing)}; fetch its files again")
    return tensors


def _no_tensors(folder: Path) -> str:
    there = [path.name for path in sorted(folder.iterdir())]
    if pickles := [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{folder} has no safetensors file, only {listed(pickles)}; dsmini opens no pickles, for they can run "
            "code: convert them to safetensors first"
        )
    if shards := [name for name in there if name.endswith(".safetensors")]:
        return f"{folder} has {listed(shards)} and no {INDEX} that says what is in them; fetch the index"
    return f"{folder} has neither {ONE_FILE} nor {INDEX}; name a folder that holds a model"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_table(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(
            f"{path} is not an index of tensors: weight_map is {brief(weight_map)}, want the name of a file for each; "
            "fetch it again"
        )
    for file in sorted(set(weight_map.values())):
        check_path(Path(file), f"weight_map of {path}")
        if file != Path(file).name or "\\" in file or file in ("", ".", ".."):
            raise ValueError(f"{path} names the file {brief(file)}, which is not in the folder; want plain file names")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{path} names {brief(file)}; dsmini opens safetensors files only")
    return weight_map


def is_inference_layout(folder: Path) -> bool:
    """Return whether a folder's files are named as those that DeepSeek's inference code reads."""
    return any(_RANK.fullmatch(path.name) for path in folder.glob("*.safetensors"))


def _inference_tensors(folder: Path) -> dict[str, Stored]:
    found = [m for path in folder.glob("*.safetensors") if (m := _RANK.fullmatch(path.name))]
    groups = {int(m[2]) for m in found}
    if len(groups) > 1:
        raise ValueError(f"{folder} has files of {sorted(groups)} ranks mixed; keep those of one conversion")
    n, there = int(found[0][2]), {m[0] for m in found}
    if n > 2 * len(found):  # before that many names are made
        raise ValueError(f"{folder} has {len(found)} files of {n:,} ranks, by their names; fetch what is missing")
    ranks = [f"model{i}-mp{found[0][2]}.safetensors" for i in range(n)]
    if missing := [name for name in ranks if name not in there]:
        raise ValueError(f"{folder} lacks {listed(missing)}; fetch what is missing")
    if extra := sorted(there - set(ranks)):
        raise ValueError(f"{folder} has {listed(extra)}, which belong to none of the {len(ranks)} ranks; remove them")
    headers = {rank: _header(folder / rank) for rank in ranks}
    lacking = []
    tensors: dict[str, Stored] = {}
    for name in dict.fromkeys(name for header in headers.values() for name in header):
        parts = {rank: header[name] for rank, header in headers.items() if name in header}
        if not is_routed_expert(name):
            lacking += [f"{name} in {rank}" for rank in ranks if rank not in parts]
        tensors[name] = _joined(name, parts)
    if lacking:
        raise ValueError(f"{folder} lacks {listed(lacking)}; convert the model again")
    return tensors


def _joined(name: str, parts: Mapping[str, Stored]) -> Stored:
    """Return a tensor whose parts are in the files of several ranks."""
    (first_rank, first), dim = next(iter(parts.items())), inference_split(name)
    for rank, other in parts.items():
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            raise ValueError(
                f"{readable(name)} is {other.dtype} {list(other.shape)} in {rank}, and {first.dtype} "
                f"{list(first.shape)} in {first_rank}; convert the model again"
            )
    if dim is None:
        return first
    shape = list(first.shape)
    shape[dim] *= len(parts)
    return Stored(first.dtype, tuple(shape), tuple(part.files[0] for part in parts.values()), dim)


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


def begin_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a file with a header and room for its tensors; return the byte at which each starts, in that order."""
    # wide types first, as the library has it, so that every tensor starts at a multiple of its width
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    end = 0
    for entry in ordered:
        places[entry.name], end = end, end + entry.nbytes
        place = [places[entry.name], end]
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + start for name, start in places.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, as a file has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_at(file: int, view: memoryview, place: int) -> None:
    """Write all bytes into an open file from this place on: one call of the system may write fewer."""
    while len(view):
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written


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
    by_name = {entry.name: entry for entry in entries}
    places = begin_safetensors(path, entries, metadata)
    file = os.open(path, os.O_WRONLY)
    try:
        for name, place in places.items():
            entry, tensor = by_name[name], by_name[name].make()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
            write_at(file, bytes_of(tensor), place)
            wrote(entry.nbytes)
    finally:
        os.close(file)
