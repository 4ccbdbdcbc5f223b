"""save_pretrained: write a folder that transformers loads.

Tensors are made one at a time when their turn comes, in the dtype that they are written in. An unchanged model gives
the folder it was loaded from.
"""

import dataclasses
import functools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from dsmini.atomic import as_json, new_folder
from dsmini.checkpoint.load import FP4, FP8, Part, PretrainedTensors, check_dtype, meta_model, origin_of, parts_of
from dsmini.checkpoint.tensor_files import INDEX, ONE_FILE, Entry, folder_name, is_v4, mtp_copies, write_safetensors
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.published import (
    UNKNOWN_IDS,
    config_from_json,
    config_to_json,
    with_dtypes,
    with_experts,
    with_mtp_layers,
)
from dsmini.console.progress import Progress
from dsmini.nn import Transformer
from dsmini.nn.fp8 import fp8_weights
from dsmini.nn.gate import Gate, HashGate, check_table
from dsmini.nn.hyper_connections import HyperConnection, StreamHead
from dsmini.numerics import (
    FP4_BLOCK,
    SMALLEST_AMAX,
    WEIGHT_TILE,
    encode_tiles,
    fp4_to_fp8,
    quantize_fp4,
    tile_scales,
)
from dsmini.numerics.quantization import Scale
from dsmini.reading import brief, check_path, open_regular, refusing

# files of a model's folder apart from its tensors and config.json; code is copied and never run
BESIDE = re.compile(
    r".*token.*|.*\.tiktoken|special_tokens_map\.json|added_tokens\.json|chat_template.*|generation_config\.json|vocab\..*|"
    r"merges\.txt|.*\.model|.*\.py|LICENSE.*"
)
TENSORS = (".safetensors", ".bin", ".pt", ".pth")
LOST = ", which no config says: the folder would be read as another model; save model.state_dict() with your code"
IDEAS = ("mask", "options", "scale", "eps", "rope", "topk", "interleaved", "fp8", "exchange", "pre_norm")
IDEAS += ("window_size", "m", "qat", "groups", "limit", "sinkhorn_iters", "norm_eps")
"""Attributes of layers, besides weights, that decide what they compute."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Saved(NamedTuple):
    """The result of a save."""

    nbytes: int
    """Bytes of tensors."""
    files: list[str]
    """Names of the files with tensors."""


def save_pretrained(
    model: Transformer,
    path: str | Path,
    fp8: bool = False,
    *,
    fp4: bool = False,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    files: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Saved:
    """Write the model as a new Hugging Face folder: safetensors, config.json, and the small files it came with.

    The tensors of a loaded model are written in their stored dtypes, whatever they are held in, so a folder that is
    loaded and saved has the same tensors. Its tokenizer and other small files are copied. A model that was not loaded
    is written as it is held. The folder is written whole or not at all. A long save shows a bar on the standard error.

    Args:
        fp8: write the matrices of attention and feed-forwards as E4M3 codes with scales for 128x128 blocks, in V4
            powers of two. Matrices held in FP8 are written as they are, also without it, and so are experts in FP4
            without it; with it their values stay the same.
        fp4: write V4's routed experts in FP4, and the other matrices as `fp8` does.
        dtype: dtype of all that is not FP8, except gates and V4's hyper-connections, sinks and position biases, which
            stay FP32; without `fp8` of all. None: see above.
        shard_size: maximum size of a file in bytes, or a text such as "5GB"; a larger tensor has a file of its own.
        files: texts of further files, by name; they replace copied ones of the same name.
        config: further keys of config.json, such as eos_token_id.

    Raises: ValueError if the folder holds anything already, if no model type describes the model, if a layer computes
        what no config says, if a tensor would have infinities or NaN, for experts whose rows have no whole blocks of
        FP4, and for a hash layer's table that `check_table` refuses.
    """
    path = Path(path)
    limit = parse_size(shard_size)
    refuse_filled(path)
    refuse_changed_ideas(model)
    raw = _described(model)
    plan = SavePlan(model, fp8 or fp4, dtype, fp4)
    shards = _shards(plan, limit)
    every = {entry.name: (file, entry) for file, entries in shards.items() for entry in entries}
    nbytes = sum(entry.nbytes for _, entry in every.values())
    raw = with_dtypes(
        raw,
        str(every[folder_name("embed.weight", model.config)][1].dtype).removeprefix("torch."),
        replace=dtype is not None,
        fp8=plan.has_fp8,
        keep_quantization=not plan.quantizes,
    )
    if is_v4(model.config):
        raw = with_experts(raw, plan.has_fp4)
    texts = {**(files or {}), "config.json": as_json(raw | dict(config or {}))}
    if len(shards) > 1:
        weight_map = {name: file for name, (file, _) in sorted(every.items())}
        texts[INDEX] = as_json({"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    beside = _files_beside(model)
    target = Path(os.path.realpath(path))  # a link stays, and what it names is written
    with ExitStack() as stack:
        with refusing(f"cannot make the folder {path}", "choose another"):
            folder = stack.enter_context(new_folder(target))
        with (
            Progress(Console(stderr=True), nbytes, f"writing {target.name}", unit="bytes") as progress,
            torch.no_grad(),
        ):
            for name, entries in shards.items():
                try:
                    write_safetensors(folder / name, entries, {"format": "pt"}, progress.add)
                except OSError as error:  # it names no file where the disk is full
                    raise OSError(error.errno, error.strerror, str(path)) from None
        for name, file in beside.items():
            shutil.copyfile(file, folder / name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return Saved(nbytes, list(shards))


def _shards(plan: "SavePlan", limit: int) -> dict[str, list[Entry]]:
    """Return the tensors of each file by its name. A file has at most `limit` bytes, or one weight and its scales."""
    shards: list[list[Entry]] = []
    room = 0
    for unit in plan.units():
        size = sum(entry.nbytes for entry in unit)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1] += unit
        room -= size
    if len(shards) == 1:
        return {ONE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": entries for i, entries in enumerate(shards, 1)}


def _files_beside(model: Transformer) -> dict[str, Path]:
    """Return the small files of the folder that a model was loaded from, by name.

    Warns: if that folder is gone.

    Raises: ValueError for a file that may not be read.
    """
    origin = origin_of(model)
    if origin is None:
        return {}
    if not origin.folder.is_dir():
        gone = f"{origin.folder}, from which the model was loaded, is gone; its tokenizer is not copied"
        warnings.warn(gone, stacklevel=3)
        return {}
    files = {file.name: file for file in sorted(origin.folder.iterdir()) if file.is_file()}
    beside = {name: f for name, f in files.items() if BESIDE.fullmatch(name) and f.suffix not in TENSORS}
    for file in beside.values():
        open_regular(file).close()
    return beside


class SavePlan:
    """The tensors of a folder, each with the dtype that it is written in.

    Args:
        fp8: write matrices as FP8 codes; see save_pretrained.
        dtype: dtype of all that is not FP8; None: as it was stored, or is held.
        fp4: write experts as FP4 codes; see save_pretrained.
    """

    def __init__(self, model: Transformer, fp8: bool, dtype: torch.dtype | None, fp4: bool = False) -> None:
        check_dtype(dtype)
        c, v4 = model.config, is_v4(model.config)
        require(v4 or not fp4, "FP4 is the format of DeepSeek-V4's experts; write this model in FP8, or as it is")
        whole = not (c.dim % FP4_BLOCK or c.moe_inter_dim % FP4_BLOCK)
        require(
            whole or not fp4,
            f"FP4 needs rows of whole blocks of {FP4_BLOCK}, and experts have rows of dim={c.dim} and "
            f"moe_inter_dim={c.moe_inter_dim}; write them in FP8, or as they are",
        )
        self.model: Transformer = model
        self.fp8: bool = fp8
        self.dtype: torch.dtype | None = dtype
        self.fp4: bool = fp4
        self.scale: Scale = "ue8m0" if v4 else "fp32"
        self.scale_dtype: torch.dtype = torch.float8_e8m0fnu if v4 else torch.float32
        self.state: dict[str, Any] = model.state_dict()
        origin = origin_of(model)
        self.stored: Mapping[str, torch.dtype] | None = None if origin is None else origin.dtypes
        """Stored dtypes of a loaded model by their Hugging Face names."""
        fp32 = (Gate, HyperConnection, StreamHead)
        self.fp32: tuple[str, ...] = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, fp32)
        )
        """Beginnings of the names of tensors that are FP32 in every folder."""
        held = [self.state[name].dtype in (FP8, FP4) for name in fp8_weights(model)]
        self.quantizes: bool = fp8 and not all(held)
        self.has_fp8: bool = bool(held) and (fp8 or (dtype is None and any(held)))
        """True if some tensors are written as codes."""
        self.quantized: Callable[[Part], tuple[Tensor, Tensor]] = functools.lru_cache(maxsize=1)(self._quantized)
        """Codes and scales of a matrix, made once for both tensors of a folder."""
        self.has_fp4: bool = fp4 or (not fp8 and dtype is None and any(t.dtype == FP4 for t in self.state.values()))

    def parts(self) -> Iterator[Part]:
        """Yield the parts of the model that are written; last the MTP blocks' copies of embedding and head."""
        yield from parts_of(self.model)
        for theirs, ours in mtp_copies(self.model.config).items():
            if self.stored is None or theirs in self.stored:
                yield Part(ours, None, tuple(self.state[ours].shape), theirs)

    def units(self) -> Iterator[Sequence[Entry]]:
        """Yield the entries in the order of the model, a weight and its scales together."""
        for part in self.parts():
            scales, held = part.scales, self.state[part.ours].dtype
            if scales is None or not (self.fp8 or (held in (FP8, FP4) and self.dtype is None)):
                yield [_entry(part, self._dtype_of(part, held), lambda of: self._numbers(of, self.dtype))]
                continue
            written, of_codes, of_scales = part, FP8, self.scale_dtype
            if self._in_fp4(part):
                written, of_codes, of_scales = part.in_fp4(), torch.int8, torch.float8_e8m0fnu
            elif held == FP8:
                of_scales = self._stored_as(scales, self.scale_dtype)
            assert written.scales is not None
            yield [
                _entry(written, of_codes, lambda of: self.quantized(of)[0], part),
                _entry(written.scales, of_scales, lambda of: self.quantized(of)[1], part),
            ]

    def value(self, part: Part) -> Tensor:
        """Return the values of a part of the model, as they are held."""
        whole = self.state[part.ours]
        return whole if part.expert is None else whole[part.expert]

    def _stored_as(self, part: Part, otherwise: torch.dtype) -> torch.dtype:
        """Return the dtype in which a part was stored; another if the model was not loaded."""
        return (self.stored or {}).get(part.name, otherwise)

    def _dtype_of(self, part: Part, held: torch.dtype) -> torch.dtype:
        """Return the dtype in which a part is written that is not FP8."""
        stored = self._stored_as(part, held)
        if not held.is_floating_point and part.scales is None:
            return self._stored_as(part, torch.int64)  # a table of experts, as released
        if self.dtype is not None:
            fp32 = part.ours.startswith(self.fp32) or part.ours.endswith((".attn_sink", ".ape"))
            return torch.float32 if fp32 else self.dtype
        return held if stored in (FP8, FP4) else stored  # dequantized since

    def _numbers(self, part: Part, dtype: torch.dtype | None) -> Tensor:
        """Return the numbers of a part, as they are held; those of codes are dequantized to a dtype."""
        value = self.value(part)
        if value.dtype not in (FP8, FP4) or part.scales is None:
            return value
        assert dtype is not None, "codes are written as they are where no dtype is asked for"
        return PretrainedTensors.decoded([value, self.value(part.scales)], dtype)

    def _in_fp4(self, part: Part) -> bool:
        """Return whether a matrix that is written as codes is written in FP4."""
        return self.has_fp4 and part.expert is not None

    def _quantized(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return codes and scales of a matrix as they are written: as they are held, or made from other numbers.

        Raises: ValueError for FP4 that FP8 cannot hold.
        """
        value, in_fp4 = self.value(part), self._in_fp4(part)
        assert part.scales is not None, "only matrices are written as codes"
        if value.dtype == (FP4 if in_fp4 else FP8):
            codes, scales = value, self.value(part.scales)
        elif in_fp4:
            codes, scales = quantize_fp4(self._numbers(part, torch.float32))
        elif value.dtype == FP4:
            try:
                codes, scales = fp4_to_fp8(value, self.value(part.scales))
            except ValueError as error:
                raise ValueError(f"{part.name}: {error}") from None
        else:
            scales = tile_scales(value, WEIGHT_TILE, self.scale, "e4m3", SMALLEST_AMAX)
            codes = encode_tiles(value, scales, WEIGHT_TILE)
        return (codes.view(torch.int8), scales.view(torch.float8_e8m0fnu)) if in_fp4 else (codes, scales)


def _entry(part: Part, dtype: torch.dtype, make: Callable[[Part], Tensor], of: Part | None = None) -> Entry:
    """Return the entry of a part. Args: of: the part that its values are made from; None: itself."""
    return Entry(part.name, dtype, part.shape, lambda: make(of or part).to(dtype))


def refuse_changed_ideas(model: Transformer) -> None:
    """Raise ValueError for a model that computes what no config says, since it would be read back as another.

    That is a layer with a hook, or whose class is not dsmini's or torch's, and one of IDEAS that the config does not
    give. A folder never holds code.
    """
    plain = dict(meta_model(model.config).named_modules())
    for name, module in model.named_modules():
        kind, where = type(module), f"{name}." if name else "the model's "
        ours = kind.__module__.split(".")[0] in ("dsmini", "torch") and "forward" not in vars(module)
        ours = ours and not module._forward_hooks and not module._forward_pre_hooks
        require(ours, f"{name or 'the model'} is a {kind.__qualname__} with code of its own{LOST}")
        if isinstance(module, HashGate):
            try:
                check_table(module.tid2eid, model.config.n_routed_experts)
            except ValueError as error:
                raise ValueError(f"{where}{error}") from None
        for option in IDEAS:
            given = vars(module).get(option)  # parameters and buffers of such names are weights
            wanted = vars(plain[name]).get(option) if name in plain else None
            require(given == wanted, f"{where}{option} is {brief(given)}{LOST}")


def parse_size(size: int | str) -> int:
    """Return bytes from a number or a text such as "5GB", "500MB" or "2GiB"."""
    part = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?|)B?", str(size).strip().upper())
    nbytes = 0 if part is None else int(float(part[1]) * UNITS[part[2]])
    require(nbytes > 0, f"shard size {brief(size)} is not the size of a file; use for example 5GB or 500MB")
    return nbytes


def refuse_filled(path: Path) -> None:
    """Raise ValueError unless `path` is a new or an empty folder that can be made, or a link to one."""
    check_path(path, "folder")
    with refusing(f"cannot look into {path}", "choose another folder"):
        real = Path(os.path.realpath(path))
        filled = real.is_symlink() or (real.exists() and (not real.is_dir() or any(real.iterdir())))
    require(not path.is_file(), f"{path} is a file; choose a new folder")
    require(not filled, f"{path} holds files already; choose a new folder, or remove that one")
    fix = f"choose a new folder in it, such as {path / 'model'}"
    require(not os.path.ismount(real), f"{path} is a mount point, which cannot be replaced; {fix}")
    here = real.exists() and real.samefile(os.curdir)  # its shell would stay in the old one
    require(not here, f"{path} is the current folder, which is not replaced; {fix}")


def _described(model: Transformer) -> dict[str, Any]:
    """Return a config.json without the dtypes of tensors: the one that was loaded, if it still fits the model.

    Otherwise its special ids alone are kept.
    """
    origin = origin_of(model)
    if origin is not None and origin.raw:
        raw = with_mtp_layers(origin.raw, model.config.n_mtp_layers)  # it may have been loaded without its MTP blocks
        if ModelConfig(**config_from_json(raw, "config.json")) == model.config:
            return raw
    raw = origin.raw if origin is not None else {}
    ids = {key: raw[key] for key in (*UNKNOWN_IDS, "pad_token_id") if key in raw}
    return {**UNKNOWN_IDS, **ids, **config_to_json(dataclasses.asdict(model.config))}
