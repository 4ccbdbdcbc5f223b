"""load_pretrained: a DeepSeek model from a folder of safetensors files, as published, or as DeepSeek's code runs it.

All that is wrong with a folder is found first, from its headers and its config. Then the model is made without memory,
on torch's meta device, and filled tensor by tensor from the mapped files. Nothing is unpickled, and no code is run.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from dsmini import names
from dsmini.checkpoint.safetensors_file import DTYPES, Reader, Stored
from dsmini.checkpoint.safetensors_folder import folder_tensors, is_inference_layout
from dsmini.checkpoint.slots import Slot, fp8_weights, scale_slot, slots
from dsmini.config import ModelConfig
from dsmini.console.messages import rate
from dsmini.console.progress import Progress
from dsmini.fields import parse_file, require
from dsmini.measure.machine import pick_device
from dsmini.nn import Transformer
from dsmini.nn.fp32 import FP32Module
from dsmini.numerics import WEIGHT_TILE, dequantize_tiles

PLAIN = ("BF16", "F32", "F16")
"""What tensors may be stored as that are not FP8."""
SCALES = ("F32", "F8_E8M0")
HELD = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a loaded model came from: what save_pretrained needs to write the same folder again."""

    folder: Path
    raw: Mapping[str, Any]
    """Its config.json; empty if that was no Hugging Face one."""
    dtypes: Mapping[str, torch.dtype]
    """What each tensor was stored as, by its Hugging Face name, the MTP blocks' copies of embedding and head too."""
    nbytes: int
    """Bytes of tensors read."""
    seconds: float


ORIGIN = "pretrained_origin"
"""The attribute of a loaded Transformer that has its Origin."""


def origin_of(model: Transformer) -> Origin | None:
    """Where the model was loaded from; None if it was not."""
    return getattr(model, ORIGIN, None)


def load_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    fp8: Literal["dequantize", "keep"] = "dequantize",
    device: str | torch.device = "cpu",
    *,
    say: Callable[[str], None] | None = None,
) -> Transformer:
    """The model of a DeepSeek or Hugging Face folder (deepseek_v2, deepseek_v3, kimi_k2), ready to be evaluated.

    Also of a folder in DeepSeek's inference layout, the files of all ranks beside its config JSON.

    Args:
        dtype: of matrices and embedding; None: as each is stored. Norms and gates are held in FP32 in any case.
        fp8: what becomes of FP8 weights. "dequantize": they are held in `dtype`, by default BF16. "keep": codes and
            scales are held, and dequantised where they are used; such a model cannot be trained.
        say: told how many bytes were read, and how fast. A long load shows a bar on the standard error.

    Warns: if config.json promises multi-token prediction blocks of which the folder holds nothing (transformers
        leaves them out when it saves a model); the model has none then. Also if those blocks' copies of embedding and
        head are not what the model's are, which are used.

    Raises: ValueError for a folder that does not hold the model its config describes, with all that is wrong; for a
        config that cannot be honoured; for a damaged file. Before memory for the model is taken.
    """
    folder = Path(folder)
    require(fp8 in ("dequantize", "keep"), f"fp8={fp8!r} is unknown; use 'dequantize' or 'keep'")
    check_dtype(dtype)
    place = pick_device(str(device))
    raw, config = _read_config(folder)
    tensors = {name: t for name, t in folder_tensors(folder).items() if not names.is_derived(name)}
    config = _without_absent_mtp(config, tensors, folder)
    layers = config.n_layers + config.n_mtp_layers
    require(  # said before so many layers are made to be compared
        layers <= len(tensors),
        f"{folder} holds {len(tensors)} tensors for the {layers} layers of its config.json; use the model's own",
    )
    with torch.device("meta"):
        model = Transformer(config)
    plan = _match(model, tensors, folder, quantized="model_type" not in raw or bool(raw.get("quantization_config")))
    if fp8 == "keep":
        plan.refuse_mixed_stacks()
    _allocate(model, plan, dtype, fp8 == "keep", place)
    with Progress(Console(stderr=True), plan.nbytes, f"reading {folder.name}", unit="bytes") as progress:
        _fill(model, plan, progress.add)
    origin = Origin(
        folder=folder.absolute(),
        raw=raw if "model_type" in raw else {},
        dtypes=plan.dtypes(config.n_layers),
        nbytes=int(progress.done),
        seconds=progress.seconds,
    )
    setattr(model, ORIGIN, origin)
    if say is not None:
        say(rate("read", origin.nbytes, origin.seconds))
    return model.eval()


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises: ValueError for a dtype that weights cannot have."""
    require(
        dtype is None or dtype in HELD, f"dtype={dtype} is no dtype of weights; use torch.bfloat16 or torch.float32"
    )


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    require(folder.is_dir(), f"there is no folder {folder}; name one that holds config.json and safetensors files")
    inference = is_inference_layout(folder)
    path = folder / "config.json"
    others = sorted(folder.glob("config*.json"))
    if inference and not path.exists() and len(others) == 1:  # DeepSeek's are config_16B.json, config_671B.json
        path = others[0]
    if not path.is_file():
        fix = "name a folder that holds a model"
        if (folder / "config.toml").is_file():
            fix = "it is a training run, so use python -m dsmini.convert"
        elif inference:
            fix = "copy the one of DeepSeek's inference code there, such as config_671B.json"
        raise ValueError(f"{folder} has no config.json; {fix}")
    raw = parse_file(path, json.loads)
    require(
        inference or "model_type" in raw,
        f"{path} has no model_type; want the config.json of a deepseek_v2, deepseek_v3 or kimi_k2 model",
    )
    return raw, ModelConfig.from_file(path)


def _without_absent_mtp(config: ModelConfig, tensors: Iterable[str], folder: Path) -> ModelConfig:
    prefixes = tuple(f"model.layers.{config.n_layers + depth}." for depth in range(config.n_mtp_layers))
    if not prefixes or any(name.startswith(prefixes) for name in tensors):
        return config
    warnings.warn(
        f"{folder} holds nothing of the {config.n_mtp_layers} multi-token prediction layers that its config.json "
        "promises; the model is loaded without them",
        stacklevel=3,
    )
    return dataclasses.replace(config, n_mtp_layers=0)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which tensor of a folder goes where. All of them are there and fit."""

    folder: Path
    stored: Mapping[Slot, Stored]
    """Weights, and for each that is stored in FP8 its scales."""
    scales: Mapping[Slot, Slot]
    """Of FP8 weights."""
    copies: Mapping[str, tuple[str, Stored]]
    """The MTP blocks' copies that are there, by their name, with ours."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in [*self.stored.values(), *(t for _, t in self.copies.values())])

    def kinds(self) -> dict[str, set[torch.dtype]]:
        """What the parts of each tensor of the state dict are stored as."""
        out: dict[str, set[torch.dtype]] = {}
        for slot, stored in self.stored.items():
            out.setdefault(slot.name, set()).add(DTYPES[stored.dtype])
        return out

    def dtypes(self, n_layers: int) -> dict[str, torch.dtype]:
        """What each tensor is stored as, by its Hugging Face name."""
        own = {names.hf_name(slot.name, n_layers, slot.expert): t.dtype for slot, t in self.stored.items()}
        return {name: DTYPES[t] for name, t in {**own, **{n: t.dtype for n, (_, t) in self.copies.items()}}.items()}

    def refuse_mixed_stacks(self) -> None:
        """Experts that are stacked in one tensor are all codes, or none is."""
        mixed = [name for name, kinds in self.kinds().items() if torch.float8_e4m3fn in kinds and len(kinds) > 1]
        require(
            not mixed,
            f"{self.folder} has some experts in FP8 and others not, in {', '.join(mixed)}; load it with "
            "fp8='dequantize'",
        )


def _match(model: Transformer, tensors: Mapping[str, Stored], folder: Path, quantized: bool) -> _Plan:
    """Find the model's tensors among the folder's; ValueError lists all that are missing, unknown, or do not fit."""
    n_layers = model.config.n_layers
    inference = is_inference_layout(folder)

    def spell(slot: Slot) -> str:
        if inference:
            return names.inference_name(slot.name, slot.expert)
        return names.hf_name(slot.name, n_layers, slot.expert)

    missing: list[str] = []
    wrong: list[str] = []
    used: set[str] = set()

    def take(name: str, shape: tuple[int, ...], kinds: tuple[str, ...]) -> Stored | None:
        used.add(name)
        got = tensors.get(name)
        if got is None:
            missing.append(name)
        elif got.shape != shape:
            wrong.append(f"{name} is {list(got.shape)}, want {list(shape)}")
        elif got.dtype not in kinds:
            wrong.append(f"{name} is {got.dtype}, want {' or '.join(kinds)}")
        return got

    stored: dict[Slot, Stored] = {}
    scales: dict[Slot, Slot] = {}
    weights = fp8_weights(model)
    for slot in slots(model.state_dict()):
        may_be_fp8 = quantized and slot.name in weights
        got = take(spell(slot), slot.shape, ("F8_E4M3", *PLAIN) if may_be_fp8 else PLAIN)
        if got is None:
            continue
        stored[slot] = got
        if may_be_fp8 and got.dtype == "F8_E4M3":
            scale = scales[slot] = scale_slot(slot, *weights[slot.name])
            if (factor := take(spell(scale), scale.shape, SCALES)) is not None:
                stored[scale] = factor
    copies: dict[str, tuple[str, Stored]] = {}
    for theirs, ours in names.mtp_copies(n_layers, range(model.config.n_mtp_layers)).items():
        if theirs in tensors:
            shape = tuple(model.get_parameter(ours).shape)
            copies[theirs] = (ours, tensors[theirs])
            take(theirs, shape, PLAIN)
    unknown = sorted(tensors.keys() - used)
    parts = [f"it lacks {', '.join(missing)}"] if missing else []
    parts += [f"it has tensors that belong nowhere: {', '.join(unknown)}"] if unknown else []
    parts += wrong
    if parts:
        raise ValueError(
            f"{folder} does not hold the model that its config describes: {'; '.join(parts)}; "
            "fetch its files again, or mend the config"
        )
    return _Plan(folder=folder, stored=stored, scales=scales, copies=copies)


def _allocate(model: Transformer, plan: _Plan, dtype: torch.dtype | None, keep: bool, device: torch.device) -> None:
    """Give every parameter and buffer of a model on the meta device its memory, not yet its values."""
    weights = fp8_weights(model)
    kinds = plan.kinds()
    for name, tensor in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if keep and torch.float8_e4m3fn in kinds[name]:
            holder, attribute = weights[name]
            blocks = scale_slot(Slot(name, None, tuple(tensor.shape[-2:])), holder, attribute).shape
            codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device=device)
            scales = torch.empty((*tensor.shape[:-2], *blocks), dtype=torch.float32, device=device)
            holder.hold_fp8(attribute, codes, scales)
            continue
        held = torch.empty(tensor.shape, dtype=_held(module, kinds[name], dtype), device=device)
        is_parameter = attribute in dict(module.named_parameters(recurse=False))
        setattr(module, attribute, nn.Parameter(held) if is_parameter else held)


def _held(module: nn.Module, kinds: set[torch.dtype], dtype: torch.dtype | None) -> torch.dtype:
    if isinstance(module, FP32Module):
        return torch.float64 if dtype == torch.float64 else torch.float32
    plain = {torch.bfloat16 if kind == torch.float8_e4m3fn else kind for kind in kinds}
    return dtype or functools.reduce(torch.promote_types, plain)


def _fill(model: Transformer, plan: _Plan, read: Callable[[int], None]) -> None:
    """Copy the folder's tensors into the model, in the order of the files, letting go of each before the next."""
    state, reader = model.state_dict(), Reader()
    in_order = sorted(plan.stored.items(), key=lambda item: (item[1].pieces[0].file, item[1].pieces[0].start))
    for slot, stored in in_order:
        if slot.name in state:  # scales are not, where weights are dequantised
            target = state[slot.name] if slot.expert is None else state[slot.name][slot.expert]
            value = reader.read(stored)
            if slot in plan.scales and target.dtype != value.dtype:
                scales = reader.read(plan.stored[plan.scales[slot]]).float()
                value = dequantize_tiles(value, scales, WEIGHT_TILE, "e4m3", target.dtype)
            target.copy_(value)
            reader.release(stored)
        read(stored.nbytes)
    different = []
    for theirs, (ours, stored) in plan.copies.items():
        if not _equal(reader.read(stored), state[ours]):
            different.append(theirs)
        reader.release(stored)
        read(stored.nbytes)
    if different:
        warnings.warn(
            f"{plan.folder} has {', '.join(different)} other than the model's own; dsmini's multi-token prediction "
            "uses the model's embedding and head",
            stacklevel=3,
        )


def _equal(copy: Tensor, original: Tensor, rows: int = 1024) -> bool:
    pairs = zip(copy.split(rows), original.split(rows), strict=True)
    return all(torch.equal(a.to(b.dtype), b.cpu()) for a, b in pairs)
