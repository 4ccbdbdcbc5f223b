"""The names of tensors in folders, and safetensors files: read, joined from ranks, and written.

Our names are those of DeepSeek's inference code with two differences: the experts of a layer are stacked into one
tensor, and the multi-token prediction blocks are mtp.0, mtp.1, ... (in a folder they follow the last layer as layers N,
N+1, ...). Hugging Face's names, and those of dtypes, are in names.toml, which no other file reads. A folder of V4 has
the names of its inference code.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.reading import (
    UnreadableError,
    brief,
    is_there,
    listed,
    open_regular,
    parse_json,
    read_table,
    read_toml,
    readable,
)

_HUGGING_FACE, _V4_PARTS, _V4_RULES, _DTYPES = read_toml(Path(__file__).with_name("names.toml")).values()
# parts that have the same name there, and the modules outside attention and feed-forward
_SAME = {*("weight", "bias", "gate", "experts", "shared_experts"), *("enorm", "hnorm", "eh_proj")}
_TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INDEXER = {"wq_b", "wk", "k_norm", "weights_proj"}
_STACKED = re.compile(r"(.+ffn\.experts)\.(w[123])(_scale)?")
_BLOCK = re.compile(r"(layers|mtp)\.(\d+)\.(?:block\.)?(.+)")
_PACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|w2)")
# dimension in which DeepSeek's inference code splits these over its ranks: 0 rows, 1 columns
_SPLIT = {"embed": 0, "head": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
_V4_SPLIT = {"embed": 0, "head": 0, "wq_b": 0, "weights_proj": 0, "wo_a": 0, "wo_b": 1}


def is_v4(config: ModelConfig) -> bool:
    """Return whether a model's folder is one of deepseek_v4, with the names of DeepSeek's inference code."""
    return config.attention == "compressed"


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Return the names of the MTP blocks' copies of embedding and head, each with our name of the original."""
    return {
        f"{prefix}{theirs}.weight": f"{ours}.weight"
        for prefix in mtp_prefixes(config)
        for theirs, ours in (("embed_tokens", "embed"), ("shared_head.head", "head"))
        if not is_v4(config)
    }


def mtp_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """Return the prefix of the names of each MTP block's tensors in a folder."""
    depths = range(config.n_mtp_layers)
    return tuple(f"mtp.{d}." if is_v4(config) else f"model.layers.{config.n_layers + d}." for d in depths)


def is_derived(theirs: str) -> bool:
    """Return whether a tensor repeats what config.json says, such as the rotary frequencies of old folders."""
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", theirs) is not None


def is_indexer(theirs: str) -> bool:
    """Return whether a tensor of a folder, in either layout, belongs to the indexer of V3.2."""
    return ".indexer." in theirs


def is_stacked(name: str) -> bool:
    """Return whether one of our tensors holds all experts of a layer, which are single tensors in a folder."""
    return _STACKED.fullmatch(name) is not None


def is_routed_expert(theirs: str) -> bool:
    """Return whether a tensor of DeepSeek's inference layout belongs to a routed expert."""
    return re.search(r"\.ffn\.experts\.\d+\.", theirs) is not None


def inference_name(name: str, expert: int | None = None) -> str:
    """Return the name in DeepSeek's inference code of our tensor, or of one expert's part of a stacked one."""
    name = re.sub(r"^(mtp\.\d+)\.block\.", r"\1.", name)
    name = re.sub(r"\b(hc_(?:attn|ffn|head))\.", r"\1_", name)
    if stacked := _STACKED.fullmatch(name):
        return f"{stacked[1]}.{expert}.{stacked[2]}.{'scale' if stacked[3] else 'weight'}"
    return name


def inference_split(theirs: str, v4: bool = False) -> int | None:
    """Return the dimension in which DeepSeek's inference layout splits a tensor over its ranks.

    None: each rank has the whole tensor, as of V3.2's indexer and of V4's compressors and shared experts, or one rank
    has a routed expert's.
    """
    parts = theirs.split(".")
    if is_routed_expert(theirs) or {"compressor", "shared_experts" if v4 else "indexer"} & {*parts}:
        return None
    return 0 if parts[-1] == "attn_sink" else (_V4_SPLIT if v4 else _SPLIT).get(parts[-2:][0])


def folder_name(name: str, config: ModelConfig, expert: int | None = None) -> str:
    """Return the name in a folder with a config.json of our tensor, or of one expert's part of a stacked one.

    Raises: ValueError for a tensor that DeepSeek's architecture does not have.
    """
    return inference_name(name, expert) if is_v4(config) else hf_name(name, config.n_layers, expert)


def hf_name(name: str, n_layers: int, expert: int | None = None) -> str:
    """Return the name in a Hugging Face folder of our tensor, or of one expert's part of a stacked one.

    Raises: ValueError for a tensor that DeepSeek's architecture does not have.
    """
    block = _BLOCK.fullmatch(inference_name(name, expert))
    if block is None:
        module, _, kind = name.rpartition(".")
        if module in _TOP:
            return f"{_TOP[module]}.{kind}"
        raise _unknown(name)
    prefix = f"model.layers.{int(block[2]) + (n_layers if block[1] == 'mtp' else 0)}."
    rest = {"norm.weight": "shared_head.norm.weight", "ffn.gate.bias": "mlp.gate.e_score_correction_bias"}
    if block[3] in rest:
        return prefix + rest[block[3]]
    parts = block[3].split(".")
    same = {"indexer", *_INDEXER} if "indexer" in parts else _SAME
    if any(not (part in same or part in _HUGGING_FACE or part.isdigit()) for part in parts[:-1]):
        raise _unknown(name)
    return prefix + ".".join(part if part in same else _HUGGING_FACE.get(part, part) for part in parts)


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"tensor {name!r} has no Hugging Face name; only models of MLA, DSA and V4's attention have a folder format"
    )


# --- reading


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in _DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_RANK = re.compile(r"model(\d+)-mp(\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; in several if ranks have parts of it, to be joined along `dim`."""

    dtype: str
    shape: tuple[int, ...]
    files: tuple[Path, ...]
    dim: int = 0
    within: tuple[str, tuple[int | slice, ...]] | None = None
    """Name of the tensor in the file that it is a part of, and which part; None: it is a whole one."""

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
        if not path.is_dir():
            self.tensors: dict[str, Stored] = _header(path)
        elif is_inference_layout(path):
            self.tensors = _joined_ranks(path)
        else:
            self.tensors = _indexed(path)

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; one in a single file is a view of the file, with copy on write."""
        stored = self.tensors[name]
        for file in stored.files:
            if file not in self._open:
                self._open[file] = _opened(file)
        whole, part = stored.within or (name, ())
        parts = [self._open[file].get_tensor(whole)[part] for file in stored.files]
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
        raise ValueError(f"{path} is not a safetensors file, is cut short or damaged: {said}; fetch it again") from None


def _header(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file in the order of their places."""
    file, tensors = _opened(path), {}
    with open_regular(path) as again:  # the library keeps the last of two entries with one name
        length = int.from_bytes(again.read(8), "little")
        parse_json(again.read(length).decode(), f"the header of {path}")
    for name in file.offset_keys():
        part = file.get_slice(name)
        dtype = part.get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{path} has {readable(name)} in the dtype {dtype}; dsmini reads {', '.join(DTYPES)}")
        tensors[name] = Stored(dtype, tuple(part.get_shape()), (path,))
    return tensors


def _indexed(folder: Path) -> dict[str, Stored]:
    """Find all tensors of a folder in Hugging Face's layout, in the order of the files and their places."""
    one, index = is_there(folder / ONE_FILE), is_there(folder / INDEX)
    if one and index:
        raise ValueError(f"{folder} has both {ONE_FILE} and {INDEX}; remove the one that is not the model's")
    if one:
        return _header(folder / ONE_FILE)
    if not index:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        fix = "fetch its files again, or name a folder that holds a model"
        if pickles:
            fix = f"dsmini opens no pickles, such as {pickles[0]}, for they can run code: convert them to safetensors"
        raise ValueError(f"{folder} has neither {ONE_FILE} nor {INDEX}, which says what is in several files; {fix}")
    weight_map: Any = read_table(folder / INDEX).get("weight_map")
    odd = [x for x in weight_map.values() if not _is_plain(x)] if isinstance(weight_map, dict) else [weight_map]
    if odd:
        raise ValueError(
            f"{folder / INDEX} names {brief(odd[0])}; want a safetensors file of that folder for each tensor of its "
            "weight_map: fetch it again"
        )
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not is_there(folder / name)]:
        raise ValueError(f"{folder} lacks {listed(missing)}, which {INDEX} names; fetch what is missing")
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(folder / file).items():
            if name in tensors:
                raise ValueError(
                    f"{folder} has {name} in two files, {tensors[name].files[0].name} and {file}; want one"
                )
            tensors[name] = stored
    wrong = [name for name, file in weight_map.items() if name not in tensors or tensors[name].files[0].name != file]
    if wrong:
        raise ValueError(f"{folder} has not in the files that {INDEX} names: {listed(sorted(wrong))}; fetch both again")
    return tensors


def _is_plain(file: object) -> bool:
    """Return whether this can be the name of a safetensors file in the folder itself."""
    return isinstance(file, str) and re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file) is not None


def is_inference_layout(folder: Path) -> bool:
    """Return whether a folder's files are named as those that DeepSeek's inference code reads."""
    return any(_RANK.fullmatch(path.name) for path in folder.glob("*.safetensors"))


def _joined_ranks(folder: Path) -> dict[str, Stored]:
    """Find all tensors of a folder in DeepSeek's inference layout, joined from the files of all ranks."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    ranks = len(found)
    files = [f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)]
    if found != sorted(files):
        raise ValueError(
            f"{folder} has {listed(found)}; want the files of one conversion, model0-mpN to model(N-1)-mpN, and no "
            "others: fetch what is missing"
        )
    headers = {file: _header(folder / file) for file in files}
    lacking, tensors = [], {}
    v4 = any(name.endswith(".attn_sink") for name in headers[files[0]])
    for name in dict.fromkeys(name for header in headers.values() for name in header):
        parts = {file: header[name] for file, header in headers.items() if name in header}
        if not is_routed_expert(name):
            lacking += [f"{name} in {file}" for file in files if file not in parts]
        tensors[name] = _joined(name, list(parts.values()), inference_split(name, v4))
    if lacking:
        raise ValueError(f"{folder} lacks {listed(lacking)}; convert the model again")
    return tensors


def _joined(name: str, parts: Sequence[Stored], dim: int | None) -> Stored:
    """Return a tensor whose parts are in the files of several ranks, cut along dim; None: each is the whole one."""
    first = parts[0]
    for other in parts:
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            words = [f"{part.dtype} {list(part.shape)} in {part.files[0].name}" for part in (other, first)]
            raise ValueError(f"{readable(name)} is {words[0]}, and {words[1]}; convert the model again")
    if dim is None:
        return first
    shape = tuple(n * len(parts) if d == dim else n for d, n in enumerate(first.shape))
    return replace(first, shape=shape, files=tuple(part.files[0] for part in parts), dim=dim)


def in_released_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors of a V4 folder by released names, whatever transformers calls them, and experts one by one.

    Raises: ValueError for two tensors of one name.
    """
    out: dict[str, Stored] = {}
    for theirs, whole in tensors.items():
        name = ".".join(_V4_PARTS.get(part, part) for part in theirs.removeprefix("model.").split("."))
        for pattern, to in _V4_RULES.items():
            name = re.sub(pattern, to, name)
        for one, stored in _unpacked(name, theirs, whole).items():
            if one in out:
                raise ValueError(f"{whole.files[0].parent} has {one} twice, the second time as {theirs}; remove one")
            out[one] = stored
    return out


def _unpacked(name: str, theirs: str, stored: Stored) -> dict[str, Stored]:
    """Return the experts that transformers packs into one tensor, by name: gate and up [e, 2 f, m], or down."""
    packed = _PACKED.fullmatch(name)
    if packed is None or len(stored.shape) != 3 or 0 in stored.shape:
        return {name: stored if name == theirs else replace(stored, within=(theirs, ()))}
    e, r, c = stored.shape
    rows = {"w2": slice(0, r)} if packed[2] == "w2" else {"w1": slice(0, r // 2), "w3": slice(r // 2, r)}
    return {
        f"{packed[1]}.{i}.{w}.weight": replace(stored, shape=(of.stop - of.start, c), within=(theirs, (i, of)))
        for i in range(e)
        for w, of in rows.items()
    }


def fault_of(name: str, tensor: Tensor) -> str:
    """Return in words which values of a folder's tensor have no meaning; "" if there are none. Makes no copy of it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    if tensor.dtype == torch.float8_e4m3fn:  # its largest code, with either sign, is NaN
        parts = tensor.reshape(-1).split(1 << 20)
        return "NaN" if any(int((part.view(torch.uint8) & 0x7F).max()) == 0x7F for part in parts) else ""
    is_scale = name.endswith((".scale", "scale_inv"))  # V4's hc_head_scale is none of FP8
    least, most = torch.aminmax(tensor.float() if is_scale else tensor)  # small, and may be E8M0
    if not (math.isfinite(least) and math.isfinite(most)):
        return "infinities or NaN"
    return "an FP8 scale that is not above 0" if is_scale and least <= 0 else ""


# --- writing


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


def begin_safetensors(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a file with a header and room for its tensors; return the byte at which each starts, in that order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    end = 0
    # wide types first, as the library has it, so that every tensor starts at a multiple of its width
    for entry in sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name)):
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

    Raises: ValueError for values without a meaning.
    """
    by_name = {entry.name: entry for entry in entries}
    places = begin_safetensors(path, entries, metadata)
    file = os.open(path, os.O_WRONLY)
    try:
        for name, place in places.items():
            entry, tensor = by_name[name], by_name[name].make()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
            if fault := fault_of(name, tensor):
                raise ValueError(
                    f"{name} would hold {fault}, with which no folder is read; mend the model, or save "
                    "model.state_dict() with your code"
                )
            write_at(file, bytes_of(tensor), place)
            wrote(entry.nbytes)
    finally:
        os.close(file)
