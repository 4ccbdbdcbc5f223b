"""load_pretrained: a DeepSeek model from a folder of safetensors files, as published or for DeepSeek's inference code.

Headers and config are checked first. Then the model is made without memory, on torch's meta device, and filled tensor
by tensor from the mapped files. Nothing is unpickled, and no code is run.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from dsmini.checkpoint.held_experts import Holding, held_experts, hold_experts
from dsmini.checkpoint.load_plan import LoadPlan, plan_load
from dsmini.checkpoint.memory import refuse_more_parts, refuse_too_large
from dsmini.checkpoint.safetensors_folder import is_inference_layout
from dsmini.checkpoint.safetensors_reader import SafetensorsReader, refuse_bad_bias, refuse_bad_scales
from dsmini.checkpoint.slots import Slot, fp8_weights, scale_slot
from dsmini.checkpoint.tensor_names import is_derived, mtp_prefixes
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.huggingface import is_hugging_face, is_quantized
from dsmini.console.command import speaks
from dsmini.console.messages import rate
from dsmini.console.progress import Progress
from dsmini.machine import pick_device, slow_bf16
from dsmini.nn import Transformer
from dsmini.nn.fp8 import hold_fp8
from dsmini.nn.fp32 import FP32Module
from dsmini.nn.gate import Gate
from dsmini.numerics import WEIGHT_TILE, dequantize_tiles
from dsmini.reading import check_path, is_there, listed, read_table

HELD = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class PretrainedOrigin:
    """The source of a loaded model, from which save_pretrained writes the same folder again."""

    folder: Path
    raw: Mapping[str, Any]
    """Content of its config.json; empty if that is not a Hugging Face one."""
    dtypes: Mapping[str, torch.dtype]
    """Stored dtype of each tensor by its Hugging Face name, the MTP blocks' copies of embedding and head too."""
    nbytes: int
    """Bytes of tensors read."""
    seconds: float
    """Time of reading."""


ORIGIN = "pretrained_origin"
"""Name of the attribute of a loaded Transformer that has its PretrainedOrigin."""


def origin_of(model: Transformer) -> PretrainedOrigin | None:
    """Return the source of a loaded model; None for a model that was not loaded."""
    return getattr(model, ORIGIN, None)


def load_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    fp8: Literal["dequantize", "keep"] = "dequantize",
    device: str | torch.device = "cpu",
    *,
    say: Callable[[str], None] | None = None,
    holding: Holding | None = None,
) -> Transformer:
    """Return the model of a DeepSeek or Hugging Face folder (deepseek_v2, deepseek_v3, kimi_k2), ready to be evaluated.

    Folders in DeepSeek's inference layout work too: the files of all ranks next to their config JSON.

    Args:
        dtype: dtype of matrices and embedding; None: as each is stored. Norms and gates are FP32 in any case.
        fp8: treatment of FP8 weights. "dequantize": they are held in `dtype`, by default BF16. "keep": codes and
            scales are held, and dequantized where they are used; such a model cannot be trained.
        say: told how many bytes were read, and how fast. A long load shows a bar on the standard error.
        holding: the experts that this process holds of those that several divide, for
            dsmini.distributed.decode. Only their tensors are read. None: all.

    Warns: if config.json promises multi-token prediction blocks of which the folder holds nothing (transformers
        leaves them out when it saves a model); the model has none then. If those blocks' copies of embedding and
        head are not what the model's are, which are used. If matrices are held in BF16 for want of a dtype, and this
        CPU multiplies BF16 slowly.

    Raises: ValueError for a folder that does not hold the model its config describes, with all that is wrong; for a
        config that cannot be honoured; for a damaged file. Before memory for the model is taken.
    """
    model = read_pretrained(folder, dtype, fp8, device, say=say, holding=holding)
    if dtype is None:
        _warn_of_slow_bf16(model, Path(folder), kept=fp8 == "keep")
    return model


def read_pretrained(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    fp8: Literal["dequantize", "keep"] = "dequantize",
    device: str | torch.device = "cpu",
    *,
    say: Callable[[str], None] | None = None,
    holding: Holding | None = None,
) -> Transformer:
    """Load a model without the warning about slow BF16, to write or train it. See load_pretrained."""
    folder = Path(folder)
    require(fp8 in ("dequantize", "keep"), f"fp8={fp8!r} is unknown; use 'dequantize' or 'keep'")
    check_dtype(dtype)
    place = pick_device(str(device))
    raw, model, whole, reader = _open(folder)
    plan, config = whole, model.config
    if fp8 == "keep":
        plan.refuse_mixed_stacks()
    if holding is not None:
        hold_experts(model, holding(model))
        plan = whole.part(held_experts(model))
    _refuse_bad_values(model, plan, reader)
    held = _held_dtypes(model, whole, dtype, fp8 == "keep")
    nbytes = sum(tensor.numel() * held[name].itemsize for name, tensor in model.state_dict().items())
    refuse_too_large(nbytes, f"the model of {folder}", place)
    _allocate(model, held, place)
    console = Console(stderr=True, quiet=not speaks())
    with Progress(console, plan.nbytes, f"reading {folder.name}", unit="bytes") as progress:
        _fill(model, plan, reader, progress.add)
    origin = PretrainedOrigin(
        folder=folder.absolute(),
        raw=raw if is_hugging_face(raw) else {},
        dtypes=whole.dtypes(config.n_layers),
        nbytes=int(progress.done),
        seconds=progress.seconds,
    )
    setattr(model, ORIGIN, origin)
    if say is not None:
        say(rate("read", origin.nbytes, origin.seconds))
    return model.eval()


class PretrainedTensors:
    """The tensors of a folder's model in FP32, each read when it is asked for; FP8 is dequantized.

    Warns and raises: as load_pretrained, when it is made.
    """

    def __init__(self, folder: Path) -> None:
        _, model, self._plan, self._reader = _open(folder)
        self.config = model.config
        """Config of the model, without multi-token prediction blocks that the folder does not hold."""
        _refuse_bad_values(model, self._plan, self._reader)
        self._slots: dict[str, list[Slot]] = {}
        for slot in self._plan.names:
            self._slots.setdefault(slot.name, []).append(slot)
        originals = {ours: self._slots[ours][0] for ours in self._plan.copies.values()}
        stored = {ours: _read(self._plan, self._reader, slot, torch.float32) for ours, slot in originals.items()}
        _warn_of_copies(self._plan, self._reader, stored)

    def rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Return rows of a tensor of the state dict. Only those of stacked experts are read."""
        slots = self._slots[name]
        stacked = slots[0].expert is not None
        parts = [_read(self._plan, self._reader, slot, torch.float32) for slot in (slots[rows] if stacked else slots)]
        return (torch.stack(parts) if stacked else parts[0][rows]).float()


def _warn_of_slow_bf16(model: Transformer, folder: Path, kept: bool) -> None:
    cpu = torch.device("cpu")
    held = {p.dtype for p in model.parameters() if p.dim() > 1 and p.device == cpu}
    if torch.bfloat16 not in held or not slow_bf16(cpu):
        return
    origin = origin_of(model)
    assert origin is not None
    stored, cost = "is stored in bfloat16", "at twice the memory"
    if torch.float8_e4m3fn in origin.dtypes.values():
        stored = "is stored in FP8 and dequantized to bfloat16"
        if kept:
            stored, cost = "keeps FP8 weights and has the others in bfloat16", "at twice the memory of the others"
    warnings.warn(
        f"{folder} {stored}, which this CPU multiplies many times more slowly than float32; load it "
        f"with dtype=torch.float32 (--dtype float32 on the command line), {cost}",
        stacklevel=3,
    )


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError for a dtype that weights cannot have."""
    require(dtype is None or dtype in HELD, f"dtype={dtype} is not for weights; use torch.bfloat16 or torch.float32")


def _open(folder: Path) -> tuple[dict[str, Any], Transformer, LoadPlan, SafetensorsReader]:
    """Return a folder's config as it is there, its model on the meta device, the place of each tensor, and a reader."""
    raw, config = _read_config(folder)
    reader = SafetensorsReader(folder)
    tensors = {name: stored for name, stored in reader.tensors.items() if not is_derived(name)}
    config = _without_absent_mtp(config, tensors, folder)
    refuse_more_parts(config, len(tensors), str(folder))
    with torch.device("meta"):
        model = Transformer(config)
    plan = plan_load(model, tensors, folder, quantized=not is_hugging_face(raw) or is_quantized(raw))
    return raw, model, plan, reader


def _refuse_bad_values(model: Transformer, plan: LoadPlan, reader: SafetensorsReader) -> None:
    """Raise ValueError for scales and selection biases that have no meaning."""
    for scales in plan.scales.values():
        refuse_bad_scales(f"{plan.folder}: {plan.names[scales]}", reader.read(plan.names[scales]))
    for slot, name in plan.names.items():
        module, _, attribute = slot.name.rpartition(".")
        if attribute == "bias" and isinstance(model.get_submodule(module), Gate):
            refuse_bad_bias(f"{plan.folder}: {name}", reader.read(name))


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    check_path(folder, "folder")
    require(folder.is_dir(), f"there is no folder {folder}; name one that holds config.json and safetensors files")
    inference = is_inference_layout(folder)
    path = folder / "config.json"
    others = sorted(folder.glob("config*.json"))
    if inference and not is_there(path) and len(others) == 1:  # DeepSeek's are config_16B.json, config_671B.json
        path = others[0]
    if not is_there(path):
        fix = "name a folder that holds a model"
        if is_there(folder / "config.toml"):
            fix = "it is a training run, so use python -m dsmini.convert"
        elif inference:
            fix = "copy the one of DeepSeek's inference code there, such as config_671B.json"
        raise ValueError(f"{folder} has no config.json; {fix}")
    raw = read_table(path)
    require(
        inference or is_hugging_face(raw),
        f"{path} has no model_type; want the config.json of a deepseek_v2, deepseek_v3 or kimi_k2 model",
    )
    return raw, ModelConfig.from_file(path)


def _without_absent_mtp(config: ModelConfig, tensors: Iterable[str], folder: Path) -> ModelConfig:
    prefixes = mtp_prefixes(config.n_layers, config.n_mtp_layers)
    if not prefixes or any(name.startswith(prefixes) for name in tensors):
        return config
    warnings.warn(
        f"{folder} holds nothing of the {config.n_mtp_layers} multi-token prediction layers that its config.json "
        "promises; the model is loaded without them",
        stacklevel=5,
    )
    return dataclasses.replace(config, n_mtp_layers=0)


def _held_dtypes(model: Transformer, plan: LoadPlan, dtype: torch.dtype | None, keep: bool) -> dict[str, torch.dtype]:
    """Return the dtype in which each tensor of a model is held, by its name: that of E4M3 for weights kept in FP8."""
    kinds, held = plan.kinds(), {}
    for name in model.state_dict():
        codes = keep and torch.float8_e4m3fn in kinds[name]
        module = model.get_submodule(name.rpartition(".")[0])
        held[name] = torch.float8_e4m3fn if codes else _held(module, kinds[name], dtype)
    return held


def _allocate(model: Transformer, held_dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Allocate memory for every parameter and buffer of a model on the meta device; values come later."""
    weights = fp8_weights(model)
    for name, tensor in model.state_dict().items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if held_dtypes[name] == torch.float8_e4m3fn:
            holder, attribute = weights[name]
            blocks = scale_slot(Slot(name, None, tuple(tensor.shape[-2:])), holder, attribute).shape
            codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device=device)
            scales = torch.empty((*tensor.shape[:-2], *blocks), dtype=torch.float32, device=device)
            hold_fp8(holder, attribute, codes, scales)
            continue
        held = torch.empty(tensor.shape, dtype=held_dtypes[name], device=device)
        is_parameter = attribute in dict(module.named_parameters(recurse=False))
        setattr(module, attribute, nn.Parameter(held) if is_parameter else held)


def _held(module: nn.Module, kinds: set[torch.dtype], dtype: torch.dtype | None) -> torch.dtype:
    if isinstance(module, FP32Module):
        return torch.float64 if dtype == torch.float64 else torch.float32
    plain = {torch.bfloat16 if kind == torch.float8_e4m3fn else kind for kind in kinds}
    return dtype or functools.reduce(torch.promote_types, plain)


def _fill(model: Transformer, plan: LoadPlan, reader: SafetensorsReader, read: Callable[[int], None]) -> None:
    """Copy the folder's tensors into the model in the order of the files; free each before the next."""
    state, tensors = model.state_dict(), plan.tensors

    def place(item: tuple[Slot, str]) -> tuple[Path, int]:
        piece = tensors[item[1]].pieces[0]
        return piece.file, piece.start

    for slot, name in sorted(plan.names.items(), key=place):
        if slot.name in state:  # scales are not, where weights are dequantized
            target = state[slot.name] if slot.expert is None else state[slot.name][slot.expert]
            target.copy_(_read(plan, reader, slot, target.dtype))
            reader.release(name)
        read(tensors[name].nbytes)
    _warn_of_copies(plan, reader, state)
    for name in plan.copies:
        read(tensors[name].nbytes)


def _read(plan: LoadPlan, reader: SafetensorsReader, slot: Slot, dtype: torch.dtype) -> Tensor:
    """Return the tensor of a slot. FP8 codes are dequantized to a dtype that is not theirs; others may have another."""
    value = reader.read(plan.names[slot])
    if slot not in plan.scales or dtype == value.dtype:
        return value
    scales = reader.read(plan.names[plan.scales[slot]]).float()
    return dequantize_tiles(value, scales, WEIGHT_TILE, "e4m3", dtype)


def _warn_of_copies(plan: LoadPlan, reader: SafetensorsReader, originals: Mapping[str, Tensor]) -> None:
    """Warn if the MTP blocks' copies of embedding and head are not the originals, which are given by our name."""
    different = []
    for name, ours in plan.copies.items():
        if not _equal(reader.read(name), originals[ours]):
            different.append(name)
        reader.release(name)
    if different:
        warnings.warn(
            f"{plan.folder} has {listed(different)} other than the model's own; dsmini's multi-token prediction "
            "uses the model's embedding and head",
            stacklevel=5,
        )


def _equal(copy: Tensor, original: Tensor, rows: int = 1024) -> bool:
    pairs = zip(copy.split(rows), original.split(rows), strict=True)
    return all(torch.equal(a.to(b.dtype), b.cpu()) for a, b in pairs)
