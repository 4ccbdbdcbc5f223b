"""save_pretrained and save_inference: write a folder that transformers loads, or that DeepSeek's inference code reads.

Tensors are made one at a time when their turn comes, in the dtype that they are written in. An unchanged model gives
the folder it was loaded from. In the inference layout each rank of a group has a file: rows or columns of attention,
feed-forwards, embedding and head are divided over the ranks, routed experts are dealt out whole, and every rank has all
else, as in DeepSeek's convert.py.
"""

import dataclasses
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from dsmini.atomic import as_json, new_folder
from dsmini.checkpoint.load import FP8, Part, check_dtype, origin_of, parts_of
from dsmini.checkpoint.tensor_files import (
    INDEX,
    ONE_FILE,
    Entry,
    hf_name,
    inference_split,
    mtp_copies,
    write_safetensors,
)
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.published import (
    BIASED_DIM,
    UNKNOWN_IDS,
    config_from_json,
    config_to_json,
    inference_to_json,
    with_dtypes,
    with_mtp_layers,
)
from dsmini.console.progress import Progress
from dsmini.nn import Transformer
from dsmini.nn.fp8 import fp8_weights
from dsmini.nn.gate import Gate
from dsmini.numerics import SMALLEST_AMAX, WEIGHT_TILE, dequantize_tiles, encode_tiles, tile_scales
from dsmini.reading import brief, check_path

# files of a model's folder apart from its tensors and config.json; code is copied and never run
BESIDE = re.compile(
    r".*token.*|.*\.tiktoken|special_tokens_map\.json|added_tokens\.json|chat_template.*|generation_config\.json|vocab\..*|"
    r"merges\.txt|.*\.model|.*\.py|LICENSE.*"
)
TENSORS = (".safetensors", ".bin", ".pt", ".pth")
LOST = ", which no config says: the folder would be read as another model; save model.state_dict() with your code"
IDEAS = ("mask", "options", "scale", "eps", "rope", "topk", "interleaved", "fp8", "exchange", "pre_norm")
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
        fp8: write the matrices of attention and feed-forwards as E4M3 codes with FP32 scales for 128x128 blocks.
            Matrices held in FP8 are written as they are, also without it.
        dtype: dtype of all that is not FP8, except gates, which stay FP32; without `fp8` of all. None: see above.
        shard_size: maximum size of a file in bytes, or a text such as "5GB"; a larger tensor has a file of its own.
        files: texts of further files, by name; they replace copied ones of the same name.
        config: further keys of config.json, such as eos_token_id.

    Raises: ValueError if the folder holds anything already, if neither deepseek_v2 nor deepseek_v3 describes the
        model, if a layer computes what no config says, or if a tensor would have infinities or NaN.
    """
    path = Path(path)
    limit = parse_size(shard_size)
    refuse_filled(path)
    refuse_changed_ideas(model)
    raw = _described(model)
    plan = SavePlan(model, fp8, dtype)
    shards: list[list[Entry]] = [[]]
    for unit in plan.units():
        if shards[-1] and sum(entry.nbytes for entry in [*shards[-1], *unit]) > limit:
            shards.append([])
        shards[-1] += unit
    several = len(shards) > 1
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    named = dict(zip(names if several else [ONE_FILE], shards, strict=True))
    written = {entry.name: entry for entries in shards for entry in entries}
    raw = with_dtypes(
        raw,
        str(written[hf_name("embed.weight", 0)].dtype).removeprefix("torch."),
        replace=dtype is not None,
        fp8=plan.has_fp8,
        keep_quantization=not plan.quantizes,
    )
    texts = {**(files or {}), "config.json": as_json(raw | dict(config or {}))}
    if several:
        weight_map = {entry.name: file for file, entries in named.items() for entry in entries}
        total = sum(entry.nbytes for entry in written.values())
        texts[INDEX] = as_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return _write(model, path, named, texts)


def save_inference(
    model: Transformer,
    path: str | Path,
    ranks: int = 1,
    fp8: bool = False,
    *,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
) -> Saved:
    """Write the model as a new folder for DeepSeek's inference code on this many ranks. See save_pretrained.

    The JSON file of its sizes is config.json. Multi-token prediction blocks are left out, as DeepSeek leaves them.

    Warns: if there are such blocks; if gates have a bias that DeepSeek's code has no place for.

    Raises: ValueError if the folder holds anything already, if the layout cannot hold the model on these ranks, or if a
        layer computes what no config says.
    """
    path = Path(path)
    refuse_filled(path)
    refuse_changed_ideas(model)
    config, origin = model.config, origin_of(model)
    raw = inference_to_json(dataclasses.asdict(config), config.extended)
    _refuse_ranks(config, ranks)
    plans = [SavePlan(model, fp8, dtype, ranks, rank) for rank in range(ranks)]
    shards = {
        f"model{plan.rank}-mp{ranks}.safetensors": [entry for unit in plan.units() for entry in unit] for plan in plans
    }
    raw["dtype"] = "fp8" if plans[0].has_fp8 else "bf16"
    stated = origin and not plans[0].quantizes and origin.raw.get("quantization_config")
    if plans[0].has_fp8 and stated and stated.get("scale_fmt") == "ue8m0":
        raw["scale_fmt"] = "ue8m0"
    return _write(model, path, shards, {**(files or {}), "config.json": as_json(raw)}, _losses(config, path))


def _write(
    model: Transformer,
    path: Path,
    shards: Mapping[str, Sequence[Entry]],
    texts: Mapping[str, str],
    losses: Sequence[str] = (),
) -> Saved:
    """Write a new folder, whole or not at all: the tensors of each file, what the model came with, and further texts.

    Args:
        losses: what the folder does not hold of the model, for warnings.
    """
    nbytes, words = sum(entry.nbytes for entries in shards.values() for entry in entries), list(losses)
    origin = origin_of(model)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(new_folder(path))
        except OSError as error:
            raise ValueError(f"cannot make the folder {path}: {error.strerror}; choose another") from None
        with Progress(Console(stderr=True), nbytes, f"writing {path.name}", unit="bytes") as progress, torch.no_grad():
            for name, entries in shards.items():
                try:
                    write_safetensors(folder / name, entries, {"format": "pt"}, progress.add)
                except OSError as error:  # it names no file where the disk is full
                    raise OSError(error.errno, error.strerror, str(path)) from None
        if origin and not origin.folder.is_dir():
            words.append(f"{origin.folder}, from which the model was loaded, is gone; its tokenizer is not copied")
        for file in sorted(origin.folder.iterdir()) if origin and origin.folder.is_dir() else ():
            if file.is_file() and BESIDE.fullmatch(file.name) and file.suffix not in TENSORS:
                shutil.copyfile(file, folder / file.name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    for warning in words:
        warnings.warn(warning, stacklevel=3)
    return Saved(nbytes, list(shards))


class SavePlan:
    """The tensors of a folder, or of a rank's file in the inference layout, each with the dtype that it is written in.

    Args:
        fp8: write matrices as FP8 codes; see save_pretrained.
        dtype: dtype of all that is not FP8; None: as it was stored, or is held.
        ranks: number of ranks of the inference layout; None: a Hugging Face folder.
        rank: the rank of the file.
    """

    def __init__(
        self, model: Transformer, fp8: bool, dtype: torch.dtype | None, ranks: int | None = None, rank: int = 0
    ) -> None:
        check_dtype(dtype)
        self.model, self.fp8, self.dtype, self.ranks, self.rank = model, fp8, dtype, ranks, rank
        self.state = model.state_dict()
        origin = origin_of(model)
        self.stored: Mapping[str, torch.dtype] | None = None if origin is None else origin.dtypes
        """Stored dtypes of a loaded model by their Hugging Face names."""
        self.gates = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Gate))
        held = [self.state[name].dtype == FP8 for name in fp8_weights(model)]
        self.quantizes = fp8 and not all(held)
        self.has_fp8 = bool(held) and (fp8 or (dtype is None and any(held)))
        """True if some tensors are written as FP8 codes."""

    def parts(self) -> Iterator[Part]:
        """Yield the parts of the model that are written; last the MTP blocks' copies of embedding and head."""
        config = self.model.config
        if self.ranks is not None:
            n = config.n_routed_experts // self.ranks
            for part in parts_of(self.model, self.ranks):
                mine = part.expert is None or part.expert // n == self.rank
                if mine and not part.ours.startswith("mtp."):
                    yield part
            return
        yield from parts_of(self.model)
        for theirs, ours in mtp_copies(config.n_layers, range(config.n_mtp_layers)).items():
            if self.stored is None or theirs in self.stored:
                yield Part(ours, None, tuple(self.state[ours].shape), theirs)

    def units(self) -> Iterator[Sequence[Entry]]:
        """Yield the entries in the order of the model, a weight and its scales together.

        Raises: ValueError if a rank's part would cut a block of FP8 scales.
        """
        for part in self.parts():
            scales, held = part.scales, self.state[part.ours].dtype
            if scales is not None and (self.fp8 or (held == FP8 and self.dtype is None)):
                self._refuse_cut_blocks(part)
                kind = self._stored_as(scales, torch.float32) if held == FP8 else torch.float32
                written = ((part, FP8, partial(self._codes, part)), (scales, kind, partial(self._scales, part, kind)))
            else:
                dtype = self._stored_as(part, held)
                if dtype == FP8:  # and dequantized since
                    dtype = held
                if self.dtype is not None:
                    dtype = torch.float32 if part.ours.startswith(self.gates) else self.dtype
                written = ((part, dtype, partial(self._plain, part, dtype)),)
            yield [Entry(one.name, dtype, one.shape, make) for one, dtype, make in written]

    def value(self, part: Part) -> Tensor:
        """Return the values of a part of the model, as they are held."""
        whole = self.state[part.ours]
        whole = whole if part.expert is None else whole[part.expert]
        dim = None if self.ranks is None else inference_split(part.name)
        return whole if dim is None else whole.chunk(self.ranks or 1, dim)[self.rank]

    def _stored_as(self, part: Part, otherwise: torch.dtype) -> torch.dtype:
        """Return the dtype in which a part was stored; another if the model was not loaded."""
        name = part.name if self.ranks is None else hf_name(part.ours, self.model.config.n_layers, part.expert)
        return (self.stored or {}).get(name, otherwise)

    def _refuse_cut_blocks(self, part: Part) -> None:
        dim = inference_split(part.name) if self.ranks else None
        if dim is not None and self.ranks != 1:
            n, tile = part.shape[dim], WEIGHT_TILE[dim]
            require(
                n % tile == 0,
                f"{part.name} in FP8 has {n} {('rows', 'columns')[dim]} on each of {self.ranks} ranks, want a "
                f"multiple of {tile}, the side of a block with one scale; use fewer ranks, or another dtype",
            )

    def _plain(self, part: Part, dtype: torch.dtype) -> Tensor:
        value = self.value(part)
        if value.dtype != FP8 or part.scales is None:
            return value.to(dtype)
        return dequantize_tiles(value, self.value(part.scales).float(), WEIGHT_TILE, "e4m3", dtype)

    def _scales(self, part: Part, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the scales of a weight, new ones if it is not held in FP8."""
        value = self.value(part)
        if value.dtype == FP8 and part.scales is not None:
            return self.value(part.scales).to(dtype)
        return tile_scales(value, WEIGHT_TILE, "fp32", "e4m3", SMALLEST_AMAX)

    def _codes(self, part: Part) -> Tensor:
        value = self.value(part)
        return value if value.dtype == FP8 else encode_tiles(value, self._scales(part), WEIGHT_TILE)


def refuse_changed_ideas(model: Transformer) -> None:
    """Raise ValueError for a model that computes what no config says, since it would be read back as another.

    That is a layer with a hook, or whose class is not dsmini's or torch's, and one of IDEAS that the config does not
    give. A folder never holds code.
    """
    with torch.device("meta"):
        plain = dict(Transformer(model.config).named_modules())
    for name, module in model.named_modules():
        kind, where = type(module), f"{name}." if name else "the model's "
        ours = kind.__module__.split(".")[0] in ("dsmini", "torch") and "forward" not in vars(module)
        ours = ours and not module._forward_hooks and not module._forward_pre_hooks
        require(ours, f"{name or 'the model'} is a {kind.__qualname__} with code of its own{LOST}")
        for option in IDEAS:
            given = vars(module).get(option)  # buffers of such names are weights
            require(given == getattr(plain.get(name), option, None), f"{where}{option} is {brief(given)}{LOST}")


def parse_size(size: int | str) -> int:
    """Return bytes from a number or a text such as "5GB", "500MB" or "2GiB"."""
    part = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]I?|)B?", str(size).strip().upper())
    nbytes = 0 if part is None else int(float(part[1]) * UNITS[part[2]])
    require(nbytes > 0, f"shard size {brief(size)} is not the size of a file; use for example 5GB or 500MB")
    return nbytes


def refuse_filled(path: Path) -> None:
    """Raise ValueError unless `path` is a new or an empty folder that can be made."""
    check_path(path, "folder")
    try:
        filled = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise ValueError(f"cannot look into {path}: {error.strerror}; choose another folder") from None
    require(not filled, f"{path} holds files already; choose a new folder, or remove that one")


def _described(model: Transformer) -> dict[str, Any]:
    """Return a config.json without the dtypes of tensors: the one that was loaded, if it still fits the model."""
    origin = origin_of(model)
    if origin is not None and origin.raw:
        read = ModelConfig(**config_from_json(origin.raw, "config.json"))
        # it may have been loaded without its MTP blocks
        if dataclasses.replace(read, n_mtp_layers=model.config.n_mtp_layers) == model.config:
            return with_mtp_layers(origin.raw, model.config.n_mtp_layers)
    return {**UNKNOWN_IDS, **config_to_json(dataclasses.asdict(model.config))}


def _refuse_ranks(config: ModelConfig, ranks: int) -> None:
    require(ranks >= 1, f"ranks={ranks} is not positive; use 1 or more")
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_heads")}
    blocks = [config.is_moe(layer) for layer in range(config.n_layers)]
    if any(blocks):
        sizes["n_routed_experts"] = config.n_routed_experts
        sizes["the width of shared experts"] = config.n_shared_experts * config.moe_inter_dim
    if not all(blocks):
        sizes["inter_dim"] = config.inter_dim
    for name, size in sizes.items():
        fix = f"use {math.gcd(*sizes.values())} or a divisor of it"
        require(size % ranks == 0, f"{name}={size} is not divisible by ranks={ranks}; {fix}")


def _losses(config: ModelConfig, path: Path) -> list[str]:
    """Return a sentence for each part of a model that DeepSeek's inference code does not read."""
    out = []
    if config.n_mtp_layers:
        out.append(
            f"{path} has no multi-token prediction layers, of which the model has {config.n_mtp_layers}: DeepSeek's "
            "inference layout leaves them out"
        )
    biased = config.topk_method == "noaux_tc" and config.n_dense_layers < config.n_layers
    if biased and config.dim != BIASED_DIM:
        out.append(
            f"{path} has routing biases, for which DeepSeek's inference code has a place at dim={BIASED_DIM} alone, "
            f"and the model has dim={config.dim}; dsmini reads them"
        )
    return out
