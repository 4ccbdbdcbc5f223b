"""Model folders for tests, read and written by the safetensors library instead of our code."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsmini import ModelConfig, Transformer, save_pretrained
from dsmini.checkpoint.load import parts_of
from dsmini.checkpoint.tensor_files import mtp_copies
from dsmini.checkpoint.vectors import config_of as config_of_generation
from dsmini.checkpoint.vectors import drawn
from dsmini.config.published import config_to_json
from tests.helpers.configs import written
from tests.helpers.quantizer import tiles

FP8 = torch.float8_e4m3fn
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 1) -> Path:
    """Write a folder of these tensors in this many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    parts = {file: list(tensors)[i::shards] for i, file in enumerate(files if shards > 1 else [WEIGHTS])}
    for file, names in parts.items():
        copies = {name: tensors[name].detach().contiguous().clone() for name in names}
        save_file(copies, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, names in parts.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not out.keys() & part.keys()
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        out |= part
    return out


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def different(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> set[str]:
    """Return the names of tensors that differ in dtype, shape or any bit, or that only one side has."""
    same = {name for name in a.keys() & b.keys() if _bits(a[name]) == _bits(b[name])}
    return (a.keys() | b.keys()) - same


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def is_matrix(name: str) -> bool:
    """Return True if DeepSeek stores a tensor of this name in FP8."""
    if ".indexer." in name:
        return name.endswith(("wq_b.weight", "wk.weight"))
    return name.endswith(("_proj.weight", "with_mqa.weight")) and "eh_proj" not in name


def in_fp8(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantize the matrices block by block; return codes with scales, and the dequantized FP32 values.

    The magnitudes of the blocks differ widely, so that a misplaced scale shows.
    """
    out, meant = dict(tensors), dict(tensors)
    for name in filter(is_matrix, tensors):
        values = tensors[name].float()
        scales = torch.empty([-(-n // 128) for n in values.shape])
        codes, exact = torch.empty(values.shape, dtype=FP8), torch.empty(values.shape)
        for i, j, block in tiles(*values.shape, (128, 128)):
            grown = values[block] * float(torch.randn(()).mul(0.5).exp())
            scales[i, j] = grown.abs().max() / 448
            codes[block] = (grown / scales[i, j]).to(FP8)
            exact[block] = codes[block].float() * scales[i, j]
        out |= {name: codes, name.replace(".weight", ".weight_scale_inv"): scales}
        meant[name] = exact
    return out, meant


def to_hf(model: Transformer) -> dict[str, Tensor]:
    """Return a model's tensors as a folder stores them: experts one by one, with the MTP blocks' copies."""
    state = model.state_dict()
    every = [one for part in parts_of(model) for one in (part, part.scales) if one is not None and one.ours in state]
    out = {part.name: state[part.ours] if part.expert is None else state[part.ours][part.expert] for part in every}
    return out | {theirs: state[ours] for theirs, ours in mtp_copies(model.config).items()}


def tensors_of(model: Transformer, dtype: torch.dtype = torch.float32, copies: bool = True) -> dict[str, Tensor]:
    """Return a model's tensors as a folder stores them: in this dtype, except routing biases and tables of experts."""
    out = {name: t if name.endswith("_bias") else t.to(dtype) for name, t in to_hf(model).items()}
    out |= {name: t.long() for name, t in to_hf(model).items() if name.endswith("tid2eid")}
    left_out = () if copies else mtp_copies(model.config)
    return {name: t for name, t in out.items() if name not in left_out}


def config_json(config: ModelConfig, **more: Any) -> dict[str, Any]:
    return config_to_json(dataclasses.asdict(config)) | {"torch_dtype": "float32"} | more


def change(folder: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder."""
    held = read(folder)
    how(held)
    write(folder, held, config_of(folder), shards=len(list(folder.glob("*.safetensors"))))


def damage(folder: Path, case: dict[str, Any]) -> None:
    """Damage a folder as a case of tests/checkpoint/folders.toml says."""

    def how(held: dict[str, Tensor]) -> None:
        for name in [name for name in held if any(re.fullmatch(drop, name) for drop in case.get("drop", ()))]:
            del held[name]
        for name, (*shape, last) in case.get("add", {}).items():
            dtype = last if isinstance(last, str) else "float32"
            values = torch.full(shape if dtype == last else [*shape, last], case.get("fill", 1.0))
            held[name] = values.to(getattr(torch, dtype))

    for old, new in case.get("rename", {}).items():
        (folder / old).rename(folder / new)
    for name in case.get("remove", ()):
        (folder / name).unlink()
    for name, text in case.get("write", {}).items():
        (folder / name).write_text(text)
    if "edit" in case:
        text = (folder / WEIGHTS).read_bytes().decode("latin-1")
        (folder / WEIGHTS).write_bytes(re.sub(*case["edit"], text, count=1).encode("latin-1"))
    if "config" in case:
        changes = {key: None if value == "none" else value for key, value in case["config"].items()}
        written(folder, config_of(folder) | changes, "config.json")
    if "index" in case:
        held = json.loads((folder / INDEX).read_text())
        held["weight_map"] |= case["index"]
        written(folder, held, INDEX)
    if "rank" in case:
        held = load_file(folder / case["rank"])
        how(held)
        save_file(held, folder / case["rank"])
    elif {"drop", "add"} & case.keys():
        change(folder, how)


def inspected(folder: Path, generation: str) -> Path:
    """Write a small model in FP8, V4's experts in FP4, in several files."""
    model = drawn(dataclasses.replace(config_of_generation(generation), dim=64, moe_inter_dim=32))
    with torch.no_grad():  # as small as those of large models, whose scales are far from 1
        for name, p in model.named_parameters():
            if ".experts." in name:
                p /= 64
    save_pretrained(model, folder, fp8=True, fp4=generation == "v4", shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder
