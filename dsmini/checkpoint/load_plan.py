"""The plan of a load: the place in a model of each tensor of a folder, found from headers and shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsmini.checkpoint.safetensors_file import DTYPES, Stored
from dsmini.checkpoint.safetensors_folder import is_inference_layout
from dsmini.checkpoint.slots import Slot, fp8_weights, scale_slot, slots
from dsmini.checkpoint.tensor_names import hf_name, inference_name, is_indexer, mtp_copies
from dsmini.config.fields import require
from dsmini.nn import Transformer
from dsmini.reading import listed

PLAIN = ("BF16", "F32", "F16")
"""Stored dtypes of tensors that are not FP8."""
SCALES = ("F32", "F8_E8M0")
"""Stored dtypes of the scales of FP8 weights."""


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """The place in a model of each tensor of a folder. All of them are there and fit."""

    folder: Path
    tensors: Mapping[str, Stored]
    """Tensors of the folder, by its own names."""
    names: Mapping[Slot, str]
    """The folder's names of all weights, and of the scales of those that it stores in FP8."""
    scales: Mapping[Slot, Slot]
    """Scales of each FP8 weight."""
    copies: Mapping[str, str]
    """The MTP blocks' copies of embedding and head that are there, each with our name of the original."""

    @property
    def nbytes(self) -> int:
        """Bytes that a load reads."""
        return sum(self.tensors[name].nbytes for name in [*self.names.values(), *self.copies])

    def kinds(self) -> dict[str, set[torch.dtype]]:
        """Return the stored dtypes of the parts of each tensor of the state dict."""
        out: dict[str, set[torch.dtype]] = {}
        for slot, name in self.names.items():
            out.setdefault(slot.name, set()).add(DTYPES[self.tensors[name].dtype])
        return out

    def dtypes(self, n_layers: int) -> dict[str, torch.dtype]:
        """Return the stored dtype of each tensor by its Hugging Face name."""
        theirs = {hf_name(slot.name, n_layers, slot.expert): name for slot, name in self.names.items()}
        theirs |= {name: name for name in self.copies}
        return {hf: DTYPES[self.tensors[name].dtype] for hf, name in theirs.items()}

    def part(self, held: Mapping[str, Sequence[int]]) -> "LoadPlan":
        """Return the plan of a process that holds these experts, in this order, by the name of their module."""
        rows = {module: {expert: row for row, expert in enumerate(own)} for module, own in held.items()}

        def here(slot: Slot) -> Slot | None:
            if slot.expert is None:
                return slot
            row = rows[slot.name.rpartition(".")[0]].get(slot.expert)
            return None if row is None else slot._replace(expert=row)

        names = {mine: name for slot, name in self.names.items() if (mine := here(slot))}
        scales = {mine: own for slot, other in self.scales.items() if (mine := here(slot)) and (own := here(other))}
        return replace(self, names=names, scales=scales)

    def refuse_mixed_stacks(self) -> None:
        """Raise ValueError if experts that are stacked in one tensor are FP8 codes in part."""
        mixed = [name for name, kinds in self.kinds().items() if torch.float8_e4m3fn in kinds and len(kinds) > 1]
        require(
            not mixed,
            f"{self.folder} has some experts in FP8 and others not, in {listed(mixed)}; load it with fp8='dequantize'",
        )


def plan_load(model: Transformer, tensors: Mapping[str, Stored], folder: Path, quantized: bool) -> LoadPlan:
    """Find the model's tensors among the folder's.

    Args:
        model: may be on the meta device.
        quantized: the folder's config allows FP8 weights.

    Raises: ValueError listing all tensors that are missing or unknown, or do not fit.
    """
    n_layers = model.config.n_layers
    inference = is_inference_layout(folder)
    search = _Search(tensors)
    names: dict[Slot, str] = {}
    scales: dict[Slot, Slot] = {}

    def take(slot: Slot, kinds: tuple[str, ...]) -> Stored | None:
        expert = slot.expert
        name = inference_name(slot.name, expert) if inference else hf_name(slot.name, n_layers, expert)
        got = search.take(name, slot.shape, kinds)
        if got is not None:
            names[slot] = name
        return got

    weights = fp8_weights(model)
    for slot in slots(model.state_dict()):
        may_be_fp8 = quantized and slot.name in weights
        got = take(slot, ("F8_E4M3", *PLAIN) if may_be_fp8 else PLAIN)
        if got is not None and may_be_fp8 and got.dtype == "F8_E4M3":
            scales[slot] = scale_slot(slot, *weights[slot.name])
            take(scales[slot], SCALES)
    copies = mtp_copies(n_layers, range(model.config.n_mtp_layers))
    copies = {theirs: ours for theirs, ours in copies.items() if theirs in tensors}
    for theirs, ours in copies.items():
        search.take(theirs, tuple(model.get_parameter(ours).shape), PLAIN)
    search.refuse_misfits(folder)
    return LoadPlan(folder=folder, tensors=tensors, names=names, scales=scales, copies=copies)


class _Search:
    """A look-up in a folder's tensors that collects everything that is wrong with them."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def take(self, name: str, shape: tuple[int, ...], kinds: tuple[str, ...]) -> Stored | None:
        """Return the tensor of this name, wanted in this shape and one of these dtypes; None if it is missing."""
        self.used.add(name)
        got = self.tensors.get(name)
        if got is None:
            self.missing.append(name)
        elif got.shape != shape:
            self.wrong.append(f"{name} is {list(got.shape)}, want {list(shape)}")
        elif got.dtype not in kinds:
            self.wrong.append(f"{name} is {got.dtype}, want {' or '.join(kinds)}")
        return got

    def refuse_misfits(self, folder: Path) -> None:
        """Raise ValueError with all that is missing, unknown or wrong."""
        unknown = sorted(self.tensors.keys() - self.used)
        lost = [name for name in self.missing if is_indexer(name)]
        require(
            not lost or lost != self.missing or any(map(is_indexer, self.tensors)),
            f"{folder} has an indexer in its config and no tensor of one, of which it wants {len(lost):,}; fetch the "
            "files of DeepSeek-V3.2, or give V3's config.json to V3's tensors and add a fresh indexer by python -m "
            "dsmini.convert --dsa",
        )
        parts = [f"it lacks {listed(self.missing)}"] if self.missing else []
        parts += [f"it has tensors that belong nowhere: {listed(unknown)}"] if unknown else []
        parts += [*self.wrong[:50], *([f"and {len(self.wrong) - 50:,} more"] if len(self.wrong) > 50 else [])]
        require(
            not parts,
            f"{folder} does not hold the model that its config describes: {'; '.join(parts)}; "
            "fetch its files again, or mend the config",
        )
