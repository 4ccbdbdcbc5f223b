"""save_pretrained: a folder that transformers loads, and that is what was loaded if nothing changed in between."""

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from dsmini import names
from dsmini.checkpoint.manifest import sync
from dsmini.checkpoint.pretrained import Origin, check_dtype, origin_of
from dsmini.checkpoint.safetensors_file import Entry, write_file
from dsmini.checkpoint.safetensors_folder import INDEX, index_of, plan_shards
from dsmini.checkpoint.slots import Slot, fp8_weights, scale_slot, slots
from dsmini.config import ModelConfig
from dsmini.console.messages import rate
from dsmini.console.progress import Progress
from dsmini.fields import require
from dsmini.nn import Transformer
from dsmini.nn.gate import Gate
from dsmini.numerics import SMALLEST_AMAX, WEIGHT_TILE, encode_tiles, tile_scales

# what a model's folder holds beside its tensors and config.json; code is copied and never run
BESIDE = re.compile(
    r".*token.*|.*\.tiktoken|special_tokens_map\.json|added_tokens\.json|chat_template.*|generation_config\.json|vocab\..*|"
    r"merges\.txt|.*\.model|.*\.py|LICENSE.*"
)
TENSORS = (".safetensors", ".bin", ".pt", ".pth")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Saved(NamedTuple):
    """What save_pretrained wrote."""

    nbytes: int
    """Of tensors."""
    seconds: float
    files: list[str]
    """With tensors."""


def save_pretrained(
    model: Transformer,
    path: str | Path,
    fp8: bool = False,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    files: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Saved:
    """Write the model as a new Hugging Face folder: safetensors, config.json, and what lay beside them.

    A loaded model's tensors are written as they were stored, whatever they are held in, so that a folder that is loaded
    and saved comes out with the same tensors; its tokenizer and other small files are copied along. A model that
    was not loaded is written as it is held. The folder is there whole or not at all.

    Args:
        fp8: write the matrices of attention and feed-forwards as E4M3 codes with FP32 scales for 128x128 blocks.
            Those that are held in FP8 are written as they are without it too.
        dtype: of all that is not FP8, but for gates, which stay FP32; without `fp8` of all. None: see above.
        shard_size: bytes, or a text such as "5GB" or "500MB", that no file shall exceed; a larger tensor has its own.
        files: texts of further files, by name; instead of those copied, where both have one.
        config: further keys of config.json, such as eos_token_id.
        say: told how many bytes were written, and how fast. A long save shows a bar on the standard error.

    Raises: ValueError if the folder holds anything already, if deepseek_v2 and deepseek_v3 do not describe the model,
        or to quantise what is not finite.
    """
    path = Path(path)
    limit = parse_size(shard_size)
    check_dtype(dtype)
    refuse_filled(path)
    described = _described(model)
    save = _Save(model, fp8, dtype)
    shards = plan_shards(save.units(), limit)
    raw = _with_dtypes(described, save, shards) | dict(config or {})
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    partial_folder = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial_folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path}: {error.strerror}; choose another") from None
    try:
        with Progress(Console(stderr=True), total, f"writing {path.name}", unit="bytes") as progress, torch.no_grad():
            for name, entries in shards.items():
                write_file(partial_folder / name, entries, progress.add)
                sync(partial_folder / name)
        _copy_beside(origin_of(model), partial_folder)
        texts = {**(files or {}), "config.json": json.dumps(raw, indent=2) + "\n"}
        texts |= {INDEX: json.dumps(index_of(shards), indent=2) + "\n"} if len(shards) > 1 else {}
        for name, text in texts.items():
            (partial_folder / name).write_text(text, encoding="utf-8")
            sync(partial_folder / name)
        os.rename(partial_folder, path)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    sync(path.parent)
    if say is not None:
        say(rate("wrote", total, progress.seconds))
    return Saved(total, progress.seconds, list(shards))


def parse_size(size: int | str) -> int:
    """Bytes, from a number or a text such as "5GB", "500MB" or "2GiB"."""
    part = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", str(size).strip().upper())
    nbytes = 0 if part is None else int(float(part[1]) * UNITS[part[2]])
    require(nbytes > 0, f"shard size {size!r} is no size of a file; use for example 5GB or 500MB")
    return nbytes


def refuse_filled(path: Path) -> None:
    """Raises: ValueError unless `path` is a new or an empty folder that can be made."""
    try:
        filled = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise ValueError(f"cannot look into {path}: {error.strerror}; choose another folder") from None
    require(not filled, f"{path} holds files already; choose a new folder, or remove that one")


class _Save:
    """Which tensors a model's folder has, and what each is written as."""

    def __init__(self, model: Transformer, fp8: bool, dtype: torch.dtype | None) -> None:
        self.model, self.fp8, self.dtype = model, fp8, dtype
        self.n_layers = model.config.n_layers
        self.state = model.state_dict()
        self.weights = fp8_weights(model)
        origin = origin_of(model)
        self.stored: Mapping[str, torch.dtype] = {} if origin is None else origin.dtypes
        self.loaded = origin is not None
        self.gates = {f"{name}." for name, module in model.named_modules() if isinstance(module, Gate)}
        self.quantizes = fp8 and any(self.state[name].dtype != torch.float8_e4m3fn for name in self.weights)
        self.scales: dict[Slot, Tensor] = {}
        """Of weights that are being quantised: made when the scales are written, needed once more for the codes."""

    def units(self) -> Iterator[Sequence[Entry]]:
        """The entries of the folder in the order of the model, those that belong together together."""
        scale_names = {f"{p[: -len(a)]}{m.scale_names[a]}" for p, (m, a) in self.weights.items()}
        for slot in slots(self.state):
            if slot.name in self.weights:
                yield self._matrix(slot)
            elif slot.name not in scale_names:
                yield [self._plain(slot)]
        for theirs, ours in names.mtp_copies(self.n_layers, range(self.model.config.n_mtp_layers)).items():
            if not self.loaded or theirs in self.stored:
                yield [self._entry(theirs, self.state[ours], self._dtype(theirs, ours))]

    def _name(self, slot: Slot) -> str:
        return names.hf_name(slot.name, self.n_layers, slot.expert)

    def _value(self, slot: Slot) -> Tensor:
        return self.state[slot.name] if slot.expert is None else self.state[slot.name][slot.expert]

    def _dtype(self, theirs: str, ours: str) -> torch.dtype:
        if self.dtype is not None:
            gate = any(ours.startswith(prefix) for prefix in self.gates)
            return torch.float32 if gate else self.dtype
        stored = self.stored.get(theirs)
        held = self.state[ours].dtype
        if stored == torch.float8_e4m3fn:  # and dequantised since
            return torch.bfloat16 if held == torch.float8_e4m3fn else held
        return stored or held

    def _entry(self, theirs: str, value: Tensor, dtype: torch.dtype) -> Entry:
        return Entry(theirs, dtype, tuple(value.shape), partial(value.to, dtype))

    def _plain(self, slot: Slot) -> Entry:
        theirs = self._name(slot)
        return self._entry(theirs, self._value(slot), self._dtype(theirs, slot.name))

    def _matrix(self, slot: Slot) -> list[Entry]:
        """A weight that may be FP8, then with its scales."""
        module, attribute = self.weights[slot.name]
        scale = scale_slot(slot, module, attribute)
        theirs, theirs_scale = self._name(slot), self._name(scale)
        kept = self.state[slot.name].dtype == torch.float8_e4m3fn
        if kept and (self.fp8 or self.dtype is None):
            stored = self.stored.get(theirs_scale, torch.float32)
            return [
                self._entry(theirs, self._value(slot), torch.float8_e4m3fn),
                self._entry(theirs_scale, self._value(scale), stored),
            ]
        if self.fp8:
            return [
                Entry(theirs, torch.float8_e4m3fn, slot.shape, partial(self._codes, slot)),
                Entry(theirs_scale, torch.float32, scale.shape, partial(self._new_scales, slot)),
            ]
        if kept:
            assert self.dtype is not None
            make = partial(module.dequantized, attribute, self.dtype, slot.expert)
            return [Entry(theirs, self.dtype, slot.shape, make)]
        return [self._plain(slot)]

    def _new_scales(self, slot: Slot) -> Tensor:
        scales = tile_scales(self._value(slot), WEIGHT_TILE, "fp32", "e4m3", SMALLEST_AMAX)
        if not scales.isfinite().all():
            raise ValueError(f"{slot.name} holds infinities or NaN; E4M3 has no codes for them: save without fp8=True")
        self.scales[slot] = scales
        return scales

    def _codes(self, slot: Slot) -> Tensor:
        # scales are the wider type, so that they come first in a file
        return encode_tiles(self._value(slot), self.scales.pop(slot), WEIGHT_TILE)


def _described(model: Transformer) -> dict[str, Any]:
    """The model's config.json, without what its tensors are stored as: the one it came with, if that is still right."""
    origin = origin_of(model)
    if origin is None or not _describes(origin.raw, model.config):
        return {"bos_token_id": None, "eos_token_id": None, **names.config_to_json(dataclasses.asdict(model.config))}
    raw = dict(origin.raw)
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        raw |= {key: model.config.n_mtp_layers} if key in raw else {}
    return raw


def _with_dtypes(raw: dict[str, Any], save: _Save, shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    written = {entry.name: entry.dtype for entries in shards.values() for entry in entries}
    key = "dtype" if "dtype" in raw else "torch_dtype"
    if save.dtype is not None or key not in raw:
        raw[key] = str(written[names.hf_name("embed.weight", 0)]).removeprefix("torch.")
    quantization = raw.pop("quantization_config", None)
    if torch.float8_e4m3fn in written.values():
        # what a folder says of its own FP8, such as scale_fmt, need not be true of codes that are made here
        raw["quantization_config"] = (not save.quantizes and quantization) or names.quantization_to_json()
    return raw


def _describes(raw: Mapping[str, Any], config: ModelConfig) -> bool:
    """Whether a config.json is still the model's, which may have been loaded without its MTP blocks."""
    if "model_type" not in raw:
        return False
    read = ModelConfig(**names.config_from_json(raw, "config.json"))
    return dataclasses.replace(read, n_mtp_layers=config.n_mtp_layers) == config


def _copy_beside(origin: Origin | None, folder: Path) -> None:
    if origin is None:
        return
    if not origin.folder.is_dir():
        warnings.warn(
            f"{origin.folder}, which the model was loaded from, is gone; its tokenizer is not copied along",
            stacklevel=3,
        )
        return
    for path in sorted(origin.folder.iterdir()):
        if path.is_file() and BESIDE.fullmatch(path.name) and path.suffix not in TENSORS:
            shutil.copyfile(path, folder / path.name)
