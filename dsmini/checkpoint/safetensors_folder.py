"""Folders of safetensors files: their files, and the tensors in each.

A folder of Hugging Face's layout has one file, model.safetensors, or several and an index. One of DeepSeek's inference
layout has a file for each rank of a tensor-parallel group, model0-mp8.safetensors, model1-mp8.safetensors, ...; many of
its tensors are split into one piece for each rank. Nothing else is opened: a pickle can run code when it is read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmini.checkpoint.safetensors_file import Entry, Stored, read_header
from dsmini.checkpoint.tensor_names import inference_split, is_routed_expert
from dsmini.reading import brief, check_path, is_there, listed, read_table, readable

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_RANK = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def folder_tensors(folder: Path) -> dict[str, Stored]:
    """Find all tensors of a folder in Hugging Face's layout, or in DeepSeek's inference layout.

    Raises: ValueError naming every file that is missing or wrong.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name one that holds config.json and safetensors files")
    if is_inference_layout(folder):
        return _inference_tensors(folder)
    one, index = folder / ONE_FILE, folder / INDEX
    if is_there(one) and is_there(index):
        raise ValueError(f"{folder} has both {ONE_FILE} and {INDEX}; remove the one that is not the model's")
    if is_there(one):
        return read_header(one).tensors
    if not is_there(index):
        raise ValueError(_no_tensors(folder))
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not is_there(folder / name)]:
        raise ValueError(f"{folder} lacks {listed(missing)}, which {INDEX} names; fetch what is missing")
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(folder / file).tensors.items():
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
    headers = [read_header(folder / name).tensors for name in ranks]
    lacking = []
    tensors: dict[str, Stored] = {}
    for name in dict.fromkeys(name for header in headers for name in header):
        parts = [(rank, header[name]) for rank, header in zip(ranks, headers, strict=True) if name in header]
        if not is_routed_expert(name) and len(parts) < len(ranks):
            lacking += [f"{name} in {rank}" for rank, h in zip(ranks, headers, strict=True) if name not in h]
        else:
            tensors[name] = _joined(name, parts)
    if lacking:
        raise ValueError(f"{folder} lacks {listed(lacking)}; convert the model again")
    return tensors


def _joined(name: str, parts: Sequence[tuple[str, Stored]]) -> Stored:
    first, dim = parts[0][1], inference_split(name)
    for rank, other in parts[1:]:
        if (other.dtype, other.shape) != (first.dtype, first.shape):
            raise ValueError(
                f"{readable(name)} is {other.dtype} {list(other.shape)} in {rank}, and {first.dtype} "
                f"{list(first.shape)} in {parts[0][0]}; convert the model again"
            )
    if dim is None or len(parts) == 1:
        return first
    shape = list(first.shape)
    shape[dim] *= len(parts)
    return Stored(first.dtype, tuple(shape), tuple(part.pieces[0] for _, part in parts), dim)


def plan_shards(units: Iterable[Sequence[Entry]], shard_size: int) -> dict[str, list[Entry]]:
    """Spread entries over files of at most shard_size bytes, unless one unit alone is larger.

    Args:
        units: groups of entries that stay in one file, such as a weight and its scales.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for unit in units:
        more = sum(entry.nbytes for entry in unit)
        if shards[-1] and size + more > shard_size:
            shards.append([])
            size = 0
        shards[-1] += unit
        size += more
    if len(shards) == 1:
        return {ONE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json."""
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
