"""save_inference: write the folder that DeepSeek's inference code reads, a file for each rank of a group.

The tensors and their places are those of DeepSeek's convert.py: rows or columns of attention, feed-forwards, embedding
and head are divided over the ranks, routed experts are dealt out whole, and every rank has all else.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsmini.atomic import as_json
from dsmini.checkpoint.export import Saved, copy_beside, not_finite, refuse_filled, write_folder
from dsmini.checkpoint.pretrained import check_dtype, origin_of
from dsmini.checkpoint.safetensors_file import Entry
from dsmini.checkpoint.save_plan import SavePlan
from dsmini.checkpoint.slots import Slot, slots
from dsmini.checkpoint.tensor_names import inference_name, inference_split
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.inference_json import BIASED_DIM, inference_to_json
from dsmini.console.messages import rate
from dsmini.nn import Transformer
from dsmini.numerics import WEIGHT_TILE


def save_inference(
    model: Transformer,
    path: str | Path,
    ranks: int = 1,
    fp8: bool = False,
    *,
    dtype: torch.dtype | None = None,
    files: Mapping[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Saved:
    """Write the model as a new folder for DeepSeek's inference code on this many ranks. See save_pretrained.

    The JSON file of its sizes is config.json. Multi-token prediction blocks are left out, as DeepSeek leaves them.

    Warns: if there are such blocks; if gates have a bias that DeepSeek's code has no place for; as save_pretrained.

    Raises: ValueError if the folder holds anything already, or if the layout cannot hold the model on these ranks.
    """
    path = Path(path)
    check_dtype(dtype)
    refuse_filled(path)
    config = model.config
    raw = inference_to_json(dataclasses.asdict(config), config.extended)
    _refuse_ranks(config, ranks)
    plans = [RankPlan(model, fp8, dtype, rank, ranks) for rank in range(ranks)]
    shards = {f"model{plan.rank}-mp{ranks}.safetensors": plan.entries() for plan in plans}
    raw |= _dtypes(plans[0], shards)

    def write_beside(folder: Path) -> None:
        copy_beside(origin_of(model), folder)
        for name, text in {**(files or {}), "config.json": as_json(raw)}.items():
            (folder / name).write_text(text, encoding="utf-8")

    saved = write_folder(path, shards, write_beside)
    damaged = next((plan.not_finite for plan in plans if plan.not_finite is not None), None)
    for warning in (*_losses(config, path), *([] if damaged is None else [not_finite(path, damaged)])):
        warnings.warn(warning, stacklevel=2)
    if say is not None:
        say(rate("wrote", saved.nbytes, saved.seconds))
    return saved


class RankPlan(SavePlan):
    """The tensors of one rank's file, each with the dtype that it is written in."""

    def __init__(self, model: Transformer, fp8: bool, dtype: torch.dtype | None, rank: int, ranks: int) -> None:
        super().__init__(model, fp8, dtype)
        self.rank, self.ranks = rank, ranks

    def units(self) -> Iterator[Sequence[Entry]]:
        yield from self._units(self._parts())

    def entries(self) -> list[Entry]:
        """Return all entries of the file. Raises: ValueError if a rank's part would cut a block of FP8 scales."""
        out = [entry for unit in self.units() for entry in unit]
        for entry in out:
            dim = inference_split(entry.name)
            if entry.dtype == torch.float8_e4m3fn and dim is not None and self.ranks > 1:
                n, tile = entry.shape[dim], WEIGHT_TILE[dim]
                require(
                    n % tile == 0,
                    f"{entry.name} in FP8 has {n} {('rows', 'columns')[dim]} on each of {self.ranks} ranks, want a "
                    f"multiple of {tile}, the side of a block with one scale; use fewer ranks, or another dtype",
                )
        return out

    def _parts(self) -> Iterator[Slot]:
        """Yield the parts of the model that are in this rank's file, with the shapes that they have there."""
        n = self.model.config.n_routed_experts // self.ranks
        for slot in slots(self.state):
            if slot.name.startswith("mtp.") or (slot.expert is not None and slot.expert // n != self.rank):
                continue
            shape, dim = list(slot.shape), inference_split(self._name(slot))
            if dim is not None:
                shape[dim] //= self.ranks
            yield slot._replace(shape=tuple(shape))

    def _name(self, slot: Slot) -> str:
        return inference_name(slot.name, slot.expert)

    def _value(self, slot: Slot) -> Tensor:
        whole, dim = super()._value(slot), inference_split(self._name(slot))
        return whole if dim is None else whole.chunk(self.ranks, dim)[self.rank]


def _refuse_ranks(config: ModelConfig, ranks: int) -> None:
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_heads")}
    blocks = [config.is_moe(layer) for layer in range(config.n_layers)]
    if any(blocks):
        sizes["n_routed_experts"] = config.n_routed_experts
        sizes["the width of shared experts"] = config.n_shared_experts * config.moe_inter_dim
    if not all(blocks):
        sizes["inter_dim"] = config.inter_dim
    require(ranks >= 1, f"ranks={ranks} is not positive; use 1 or more")
    for name, size in sizes.items():
        require(
            size % ranks == 0,
            f"{name}={size} is not divisible by ranks={ranks}; use {math.gcd(*sizes.values())} or a divisor of it",
        )


def _dtypes(plan: RankPlan, shards: Mapping[str, Sequence[Entry]]) -> dict[str, str]:
    """Return the keys of the JSON file that say how matrices are stored, and how their scales were rounded."""
    fp8 = any(entry.dtype == torch.float8_e4m3fn for entries in shards.values() for entry in entries)
    origin = origin_of(plan.model)
    stated = None if origin is None or plan.quantizes else origin.raw.get("quantization_config")
    rounded = fp8 and stated is not None and stated.get("scale_fmt") == "ue8m0"
    return {"dtype": "fp8" if fp8 else "bf16"} | ({"scale_fmt": "ue8m0"} if rounded else {})


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
