"""load_pretrained: a DeepSeek model from a folder of safetensors files, as published or for DeepSeek's inference code.

Headers and config are checked first: each tensor of the folder has its place in the model, or is named as wrong. Then
the model is made without memory, on torch's meta device, and filled tensor by tensor from the mapped files. Nothing is
unpickled, and no code is run.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from dsmini.checkpoint.run_folder import find_model
from dsmini.checkpoint.tensor_files import (
    DTYPES,
    SafetensorsReader,
    Stored,
    fault_of,
    folder_name,
    in_released_names,
    inference_name,
    is_derived,
    is_indexer,
    is_inference_layout,
    is_stacked,
    is_v4,
    mtp_copies,
    mtp_prefixes,
)
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.published import is_hugging_face, is_quantized
from dsmini.console.command import speaks
from dsmini.console.progress import Progress
from dsmini.machine import pick_device, refuse_too_large
from dsmini.nn import DSA, MLA, Indexer, Transformer
from dsmini.nn.fp8 import SCALES as FP8_SCALES
from dsmini.nn.fp8 import fp8_weights, hold_fp8
from dsmini.nn.gate import check_table
from dsmini.nn.layers import FP32Module
from dsmini.numerics import FP4_BLOCK, WEIGHT_TILE, dequantize_fp4, dequantize_tiles
from dsmini.reading import LISTED, check_path, is_there, listed, read_table

HELD = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = ("BF16", "F32", "F16", "F64")
"""Stored dtypes of tensors that are not FP8."""
TABLES = ("I32", "I64")
"""Stored dtypes of V4's tables of experts."""
SCALES = ("F32", "F8_E8M0")
"""Stored dtypes of the scales of FP8 weights."""
FP8 = torch.float8_e4m3fn
FP4 = torch.uint8
"""Dtype of a matrix in FP4, two codes a byte. Folders store them as int8."""
RELEASED = 16 << 20
"""Bytes that are read between two releases of the mapped files, so that these do not count as memory twice."""
Treatment = Literal["dequantize", "keep"]


@dataclass(frozen=True)
class Part:
    """A part of a model that is one tensor of a folder."""

    ours: str
    """Name in the state dict."""
    expert: int | None
    """Index in a stacked tensor; None if it is not stacked."""
    shape: tuple[int, ...]
    name: str
    """Name in the folder."""
    scales: "Part | None" = None
    """The scales of a matrix where it is stored in FP8 or FP4; None for what never is."""

    @property
    def tensors(self) -> "list[Part]":
        """The part, and its scales."""
        return [self] if self.scales is None else [self, self.scales]

    def in_fp4(self) -> "Part":
        """Return the part as it is stored in FP4: two numbers a byte, and a scale for each block of a row."""
        rows, columns = self.shape
        assert self.scales is not None
        scales = dataclasses.replace(self.scales, shape=(rows, columns // FP4_BLOCK))
        return dataclasses.replace(self, shape=(rows, columns // 2), scales=scales)


def parts_of(model: Transformer, inference: bool = False) -> Iterator[Part]:
    """Yield the parts of a model, experts one by one. This is the walk of both directions: to load and to save.

    Args:
        model: may be on the meta device, and may hold FP8 weights, whose scales are not parts by themselves.
        inference: name them as DeepSeek's inference code does; False: as a Hugging Face folder.

    Raises: ValueError for a tensor that DeepSeek's architecture does not have.
    """

    def theirs(ours: str, expert: int | None) -> str:
        return inference_name(ours, expert) if inference else folder_name(ours, model.config, expert)

    scales_of = {}
    for ours in fp8_weights(model):
        path, _, attribute = ours.rpartition(".")
        scales_of[ours] = f"{path}.{FP8_SCALES[attribute]}"
    for ours, tensor in model.state_dict().items():
        if ours in scales_of.values():
            continue
        stacked = is_stacked(ours)
        whole = tensor.shape if tensor.dtype != FP4 else (*tensor.shape[:-1], 2 * tensor.shape[-1])
        for expert in range(len(tensor)) if stacked else (None,):
            shape, scales = tuple(whole[1:] if stacked else whole), None
            if scale := scales_of.get(ours):
                scales = Part(scale, expert, blocks_of(shape), theirs(scale, expert))
            yield Part(ours, expert, shape, theirs(ours, expert), scales)


def blocks_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix [rows, columns]."""
    return tuple(-(-n // t) for n, t in zip(shape, WEIGHT_TILE, strict=True))


@dataclass(frozen=True, kw_only=True)
class PretrainedOrigin:
    """The source of a loaded model, from which save_pretrained writes the same folder again."""

    folder: Path
    raw: Mapping[str, Any]
    """Content of its config.json; empty if that is not a Hugging Face one."""
    dtypes: Mapping[str, torch.dtype]
    """Stored dtype of each tensor by its Hugging Face name, the MTP blocks' copies of embedding and head too."""


def origin_of(model: Transformer) -> PretrainedOrigin | None:
    """Return the source of a loaded model; None for a model that was not loaded."""
    return getattr(model, "pretrained_origin", None)


def load_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    fp8: Treatment = "dequantize",
    device: str | torch.device = "cpu",
    qat: bool | None = None,
) -> Transformer:
    """Return the model of a DeepSeek or Hugging Face folder (deepseek_v2 to deepseek_v4, kimi_k2, glm_moe_dsa).

    Folders in DeepSeek's inference layout work too: the files of all ranks next to their config JSON. The model is
    ready to be evaluated. A long load shows a bar on the standard error.

    Args:
        folder: its path, or "toy" for the model that dsmini comes with, whose tokens are bytes.
        dtype: dtype of matrices and embedding; None: as each is stored. Norms and gates are FP32, or else FP64.
        fp8: treatment of weights in FP8, and of experts in FP4. "dequantize": they are held in `dtype`, by default
            BF16. "keep": codes and scales are held, and dequantized where they are used; such a model cannot be
            trained. Experts of a layer that are stored in several ways are dequantized.
        qat: V4's rounding of entries and of the indexer, as ModelConfig.qat; None: as the config says. DeepSeek's code
            always rounds, so its own inference JSON says yes, and a Hugging Face folder no.

    Warns: of experts that are dequantized though codes are to be kept. If config.json promises multi-token prediction
        blocks of which the folder holds nothing (transformers leaves them out when it saves a model); the model has
        none then. If those blocks' copies of embedding and head are not what the model's are, which are used. If
        layers that take another one's choice have indexers there, which are dropped.

    Raises: ValueError for a folder that does not hold the model its config describes, with all that is wrong, for a
        config that cannot be honoured, and for a damaged file, before memory for the model is taken; for tensors with
        infinities or NaN, scales that are not positive, and tables of experts that `check_table` refuses, when they
        are read.
    """
    require(fp8 in ("dequantize", "keep"), f"fp8={fp8!r} is unknown; use 'dequantize' or 'keep'")
    check_dtype(dtype)
    place = pick_device(str(device))
    there = PretrainedTensors(find_model(Path(folder)), qat)
    model, kinds = there.model, there.kinds()
    mixed = [name for name, of in kinds.items() if of & {FP8, FP4} and len(of) > 1]
    if fp8 == "keep" and mixed:
        warnings.warn(
            f"{there.folder} has experts in several formats, which are dequantized: {listed(mixed)}", stacklevel=2
        )
    held = {name: _held(model, name, of, dtype, fp8 == "keep") for name, of in kinds.items()}
    nbytes = sum(_held_shape(t, held[name]).numel() * held[name].itemsize for name, t in model.state_dict().items())
    refuse_too_large(nbytes, f"the model of {there.folder}", place)
    _allocate(model, held, place)
    with Progress(Console(stderr=True, quiet=not speaks()), label=f"reading {there.folder.name}", unit="bytes") as bar:
        there.fill(model, bar)
    origin = PretrainedOrigin(
        folder=there.folder.absolute(),
        raw=there.raw if is_hugging_face(there.raw) else {},
        dtypes=there.dtypes(),
    )
    model.pretrained_origin = origin  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model.eval()


class PretrainedTensors:
    """The tensors of a folder, each with its place in the model that the folder's config describes.

    Args:
        qat: as in load_pretrained.

    Warns and raises: as load_pretrained, for headers and config, when it is made. No tensor is read.
    """

    def __init__(self, folder: Path, qat: bool | None = None) -> None:
        self.folder = folder
        self.raw: dict[str, Any]
        """Content of the config file."""
        self.raw, config = _read_config(folder)
        config = config if qat is None else dataclasses.replace(config, qat=qat)
        self.reader: SafetensorsReader = SafetensorsReader(folder)
        if is_v4(config):
            self.reader.tensors = in_released_names(self.reader.tensors)
        self.reader.tensors = _without_shared_indexers(config, self.reader.tensors, folder)
        tensors = {name: stored for name, stored in self.reader.tensors.items() if not is_derived(name)}
        self.config: ModelConfig = _without_absent_mtp(config, tensors, folder)
        """Config of the model, without multi-token prediction blocks that the folder does not hold."""
        refuse_more_parts(self.config, len(tensors), str(folder))
        self.model: Transformer = meta_model(self.config)
        """The model without memory."""
        self.parts: dict[str, list[Part]] = {}
        """The parts of each tensor of the state dict, with scales where they are stored in FP8 or FP4."""
        self.copies: dict[str, str] = {
            theirs: ours for theirs, ours in mtp_copies(self.config).items() if theirs in tensors
        }
        """The MTP blocks' copies of embedding and head that are there, each with our name of the original."""
        self._find(tensors, is_inference_layout(folder))

    def _find(self, tensors: Mapping[str, Stored], inference: bool) -> None:
        """Find the model's tensors among the folder's. Raises: ValueError listing all that do not fit."""
        plain = is_hugging_face(self.raw) and not is_quantized(self.raw)
        wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        faults: list[str] = []
        for part in parts_of(self.model, inference):
            stored = tensors.get(part.name)
            dtype, scaled = stored.dtype if stored else "", part.scales is not None and not plain
            codes = (("F8_E4M3", "I8") if is_v4(self.config) and part.expert is not None else ("F8_E4M3",)) * scaled
            kinds = (*codes, *(TABLES if part.name.endswith("tid2eid") else PLAIN))
            if dtype == "I8" and dtype in codes:
                if part.shape[1] % FP4_BLOCK:
                    faults.append(
                        f"{part.name} is FP4, and rows of {part.shape[1]} have no whole blocks of {FP4_BLOCK}"
                    )
                part = part.in_fp4()
            elif dtype not in codes:
                part = dataclasses.replace(part, scales=None)
            wanted[part.name] = (part.shape, kinds)
            if part.scales:
                wanted[part.scales.name] = (part.scales.shape, SCALES if dtype == "F8_E4M3" else SCALES[1:])
            self.parts.setdefault(part.ours, []).append(part)
        for theirs, ours in self.copies.items():
            wanted[theirs] = (tuple(self.model.get_parameter(ours).shape), PLAIN)
        missing = [name for name in wanted if name not in tensors]
        lost = [name for name in missing if is_indexer(name)]
        require(
            not lost or lost != missing or any(map(is_indexer, tensors)) or is_v4(self.config),
            f"{self.folder} has an indexer in its config and no tensor of one, of which it wants {len(lost):,}; fetch "
            "the files of DeepSeek-V3.2, or give V3's config.json to V3's tensors and add a fresh indexer by python -m "
            "dsmini.convert --dsa",
        )
        unknown = sorted(tensors.keys() - wanted.keys())
        faults += [f"it lacks {listed(missing)}"] if missing else []
        faults += [f"it has tensors that belong nowhere: {listed(unknown)}"] if unknown else []
        for name, (shape, kinds) in wanted.items():
            got = tensors.get(name)
            if got and got.shape != shape:
                faults.append(f"{name} is {list(got.shape)}, want {list(shape)}")
            elif got and got.dtype not in kinds:
                faults.append(f"{name} is {got.dtype}, want {' or '.join(kinds)}")
        more = [f"and {len(faults) - LISTED:,} more"] if len(faults) > LISTED else []
        require(
            not faults,
            f"{self.folder} does not hold the model that its config describes: {'; '.join([*faults[:LISTED], *more])}; "
            "fetch its files again, or mend the config",
        )

    @property
    def n_parameters(self) -> int:
        """Number of parameters in the folder, numbers in FP4 one by one, without scales, tables and copies."""
        tensors, learned = self.reader.tensors, {name for name, _ in self.model.named_parameters()}
        parts = [part for ours, of in self.parts.items() if ours in learned for part in of]
        return sum(math.prod(tensors[part.name].shape) * (1 + (self.stored(part.name) == FP4)) for part in parts)

    def stored(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor of the folder; FP4 for codes of two numbers a byte."""
        dtype = self.reader.tensors[name].dtype
        return FP4 if dtype == "I8" else DTYPES[dtype]

    def kinds(self) -> dict[str, set[torch.dtype]]:
        """Return the stored dtypes of the parts of each tensor of the state dict."""
        return {ours: {self.stored(part.name) for part in parts} for ours, parts in self.parts.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the stored dtype of each tensor by its name in a Hugging Face folder."""
        every = [one for part in chain(*self.parts.values()) for one in part.tensors]
        out = {folder_name(one.ours, self.config, one.expert): self.stored(one.name) for one in every}
        return out | {name: self.stored(name) for name in self.copies}

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """Return the tensor of a part. Codes are dequantized to a dtype that is not theirs; others may differ."""
        return self.decoded(self.held(part) if dtype not in (FP8, FP4) else [self._sound(part.name)], dtype)

    def held(self, part: Part) -> list[Tensor]:
        """Return a part, and its scales if it has some, as they are stored. Raises: ValueError as _sound does."""
        return [self._sound(one.name) for one in part.tensors]

    @staticmethod
    def decoded(held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the numbers of a part that is held so."""
        value, *scales = held
        if value.dtype in (torch.int8, FP4):
            return dequantize_fp4(value, scales[0], dtype) if scales else value.view(FP4)
        return dequantize_tiles(value, scales[0].float(), WEIGHT_TILE, "e4m3", dtype) if scales else value

    def _sound(self, name: str) -> Tensor:
        """Return a tensor as it is stored. Raises: ValueError for values without a meaning."""
        value = self.reader.read(name)
        if fault := fault_of(name, value):
            raise ValueError(f"{self.folder}: {name} holds {fault}; fetch the file again")
        if name.endswith("tid2eid"):
            try:
                check_table(value, self.config.n_routed_experts)
            except ValueError as error:
                raise ValueError(f"{self.folder}: {name.removesuffix('tid2eid')}{error}") from None
        return value

    def rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return rows of a tensor of the state dict, FP32 or whole numbers. Only those of stacked experts are read."""
        of = self.parts[name]
        if of[0].expert is None:
            value = self.read(of[0], torch.float32)[rows]
            return value.float() if value.is_floating_point() else value
        return torch.stack([self.read(part, torch.float32) for part in of[rows]]).float()

    def check(self) -> None:
        """Refuse values without a meaning, and warn of copies that are not the originals, before rows are read."""
        for parts in self.parts.values():
            for one in chain(*(part.tensors for part in parts)):
                self._sound(one.name)
            self.reader.release()
        self._warn_of_copies({ours: self.rows(ours) for ours in self.copies.values()})

    def _warn_of_copies(self, originals: Mapping[str, Tensor]) -> None:
        """Warn if the MTP blocks' copies of embedding and head are not the originals, given by our names."""
        if different := [n for n, ours in self.copies.items() if not _equal(self._sound(n), originals[ours])]:
            warnings.warn(
                f"{self.folder} has {listed(different)} other than the model's own; dsmini's multi-token prediction "
                "uses the model's embedding and head",
                stacklevel=4,
            )

    def fill(self, model: Transformer, bar: Progress) -> None:
        """Copy tensors into a model in the order of the files, and let go of each file's memory on the way."""
        state, order = model.state_dict(), {name: number for number, name in enumerate(self.reader.tensors)}
        parts = sorted(chain(*self.parts.values()), key=lambda part: order[part.name])
        bar.total = sum(self.reader.tensors[one.name].nbytes for part in parts for one in part.tensors)
        released = 0.0
        for part in parts:
            for one in part.tensors:
                if one.ours in state:  # scales are not, where weights are dequantized
                    target = state[one.ours]
                    if part.expert is not None:
                        target = target[part.expert]
                    target.copy_(self.read(one, target.dtype))
                bar.add(self.reader.tensors[one.name].nbytes)
            if bar.done - released > RELEASED:
                self.reader.release()
                released = bar.done
        self._warn_of_copies(state)
        self.reader.release()


def meta_model(config: ModelConfig, compute_dtype: torch.dtype | None = None) -> Transformer:
    """Return a model that has shapes and no memory."""
    with torch.device("meta"):
        return Transformer(config, compute_dtype=compute_dtype)


def refuse_more_parts(config: ModelConfig, n_tensors: int, source: str) -> None:
    """Raise ValueError if a config has more layers or experts than a folder has tensors; then none of them is made.

    Args:
        n_tensors: number of tensors, each expert's counted by itself.
        source: the folder, for the error.
    """
    layers = config.n_layers + config.n_mtp_layers
    experts = max(0, layers - config.n_dense_layers) * config.n_routed_experts
    for parts, name in ((layers, "layers"), (experts, "experts")):
        require(
            parts <= n_tensors,
            f"{source} holds {n_tensors:,} tensors for the {parts} {name} of its config; use the model's own",
        )


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError for a dtype that weights cannot have."""
    require(dtype is None or dtype in HELD, f"dtype={dtype} is not for weights; use torch.bfloat16 or torch.float32")


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    check_path(folder, "folder")
    require(folder.is_dir(), f"there is no folder {folder}; name one that holds config.json and safetensors files")
    inference, path = is_inference_layout(folder), folder / "config.json"
    others = sorted(folder.glob("config*.json"))
    if inference and not is_there(path) and len(others) == 1:  # DeepSeek's are config_16B.json, config_671B.json
        path = others[0]
    fix = "copy the one of DeepSeek's inference code there" if inference else "name a folder that holds a model"
    if is_there(folder / "config.toml"):
        fix = "it is a training run, so use python -m dsmini.convert"
    require(is_there(path), f"{folder} has no config.json; {fix}")
    raw = read_table(path)
    require(
        inference or is_hugging_face(raw),
        f"{path} has no model_type; want the config.json of a deepseek_v2, v3, v32 or v4, kimi_k2 or glm_moe_dsa model",
    )
    return raw, ModelConfig.from_file(path)


def _without_shared_indexers(config: ModelConfig, tensors: dict[str, Stored], folder: Path) -> dict[str, Stored]:
    """Leave out the indexers of shared layers, which some writers store: the config decides who has one."""
    shared = [i for i in range(config.n_layers) if config.index_source(i) != i]
    prefixes = tuple(f"model.layers.{i}.self_attn.indexer." for i in shared)
    if dropped := [name for name in tensors if name.startswith(prefixes)]:
        warnings.warn(
            f"{folder} has indexers in layers that take another layer's choice, which are dropped: {listed(dropped)}",
            stacklevel=4,
        )
    return {name: stored for name, stored in tensors.items() if not name.startswith(prefixes)}


def _without_absent_mtp(config: ModelConfig, tensors: Iterable[str], folder: Path) -> ModelConfig:
    prefixes = mtp_prefixes(config)
    if not prefixes or any(name.startswith(prefixes) for name in tensors):
        return config
    warnings.warn(
        f"{folder} holds nothing of the {config.n_mtp_layers} multi-token prediction layers that its config.json "
        "promises; the model is loaded without them",
        stacklevel=4,
    )
    dense = min(config.n_dense_layers, config.n_layers)
    return dataclasses.replace(config, n_mtp_layers=0, n_dense_layers=dense)


def _held(model: Transformer, name: str, kinds: set[torch.dtype], dtype: torch.dtype | None, keep: bool) -> torch.dtype:
    """Return the dtype in which a tensor is held that was stored in these."""
    if keep and kinds & {FP8, FP4} and len(kinds) == 1:
        return next(iter(kinds))
    path, _, attribute = name.rpartition(".")
    layer = model.get_submodule(path)
    made = getattr(layer, attribute).dtype
    if not made.is_floating_point:
        return made
    plain = {torch.bfloat16 if kind in (FP8, FP4) else kind for kind in kinds}
    wanted = dtype or functools.reduce(torch.promote_types, plain)
    return torch.float32 if isinstance(layer, FP32Module) and wanted != torch.float64 else wanted


def _held_shape(tensor: Tensor, held: torch.dtype) -> torch.Size:
    """Return the shape of a tensor of the model as it is held: FP4 has two numbers a byte."""
    return torch.Size((*tensor.shape[:-1], tensor.shape[-1] // 2)) if held == FP4 else tensor.shape


def _allocate(model: Transformer, held: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Allocate memory for every parameter and buffer of a model on the meta device; values come later."""
    empty = {
        name: torch.empty(_held_shape(t, held[name]), dtype=held[name], device=device)
        for name, t in model.state_dict().items()
    }
    codes = {name: tensor for name, tensor in empty.items() if tensor.dtype in (FP8, FP4)}
    model.load_state_dict({name: t for name, t in empty.items() if name not in codes}, strict=False, assign=True)
    for name, tensor in codes.items():
        if tensor.dtype == FP8:
            blocks = (*tensor.shape[:-2], *blocks_of(tensor.shape[-2:]))
            hold_fp8(model, name, tensor, torch.empty(blocks, dtype=torch.float32, device=device))
        else:
            blocks = (*tensor.shape[:-1], 2 * tensor.shape[-1] // FP4_BLOCK)
            scales = torch.empty(blocks, dtype=torch.float8_e8m0fnu, device=device)
            hold_fp8(model, name, tensor, scales, tile=(1, FP4_BLOCK), format="e2m1")


def _equal(copy: Tensor, original: Tensor, rows: int = 1024) -> bool:
    pairs = zip(copy.split(rows), original.split(rows), strict=True)
    return all(torch.equal(a.to(b.dtype), b.cpu()) for a, b in pairs)


# --- a dense model as the start of a sparse one: V3 becomes V3.2


def add_indexers(
    model: Transformer,
    *,
    n_heads: int | None = None,
    head_dim: int | None = None,
    topk: int | None = None,
    seed: int = 0,
) -> None:
    """Give every attention layer of a model, those of multi-token prediction too, a random indexer, in place.

    All other weights stay as they are, codes of FP8 included. With no more than topk tokens the model answers as
    before; with more it chooses at random until its indexers are trained.

    Args:
        n_heads, head_dim, topk: index_n_heads, index_head_dim and index_topk of the model; None: as `fresh_sizes` says.

    Raises: ValueError for a model whose attention is not plain MLA, and sizes that ModelConfig refuses.
    """
    old = model.config
    require(
        old.attention == "mla" and all(type(part) is MLA for part in _attentions(model)),
        f"an indexer belongs to MLA, and this model has attention='{old.attention}'; use a model of DeepSeek-V3",
    )
    given = {"index_n_heads": n_heads, "index_head_dim": head_dim, "index_topk": topk}
    sizes = fresh_sizes(old) | {name: size for name, size in given.items() if size is not None}
    model.config = dataclasses.replace(old, attention="dsa", **sizes)
    generator = torch.Generator().manual_seed(seed)
    dtype = model.embed.weight.dtype
    for attention in _attentions(model):
        indexer = Indexer(model.config)
        for part in indexer.children():
            part.reset_parameters(generator)  # pyright: ignore[reportCallIssue]
        plain: object = attention
        plain.__class__ = DSA  # in place, so that no weight is copied
        attention.indexer = indexer.to(device=model.device, dtype=dtype).train(attention.training)


def fresh_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of an indexer for a model. For V3 they are V3.2's own.

    It has half of attention's heads, each as wide as one without its rotary part or the next power of two, and picks a
    quarter of the context, 2,048 keys at most.
    """
    width = max(config.qk_nope_head_dim, config.qk_rope_head_dim)
    return {
        "index_n_heads": max(1, config.n_heads // 2),
        "index_head_dim": 1 << (width - 1).bit_length(),
        "index_topk": max(1, min(2048, config.max_seq_len // 4)),
    }


def _attentions(model: Transformer) -> list[MLA]:
    return [part for part in model.modules() if isinstance(part, MLA)]
