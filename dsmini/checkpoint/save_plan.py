"""The plan of a save: the tensors of a model's folder, and the dtype of each."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dsmini.checkpoint.held_experts import held_experts
from dsmini.checkpoint.pretrained import origin_of
from dsmini.checkpoint.safetensors_file import Entry
from dsmini.checkpoint.slots import Slot, fp8_weights, scale_slot, slots
from dsmini.checkpoint.tensor_names import hf_name, mtp_copies
from dsmini.nn import Transformer
from dsmini.nn.fp8 import scale_names
from dsmini.nn.gate import Gate
from dsmini.numerics import SMALLEST_AMAX, WEIGHT_TILE, dequantize_tiles, encode_tiles, tile_scales


class SavePlan:
    """The tensors of a model's folder, each with the dtype that it is written in.

    Args:
        fp8: write matrices as FP8 codes; see save_pretrained.
        dtype: dtype of all that is not FP8; None: as it was stored, or is held.
    """

    def __init__(self, model: Transformer, fp8: bool, dtype: torch.dtype | None) -> None:
        self.model, self.fp8, self.dtype = model, fp8, dtype
        self.n_layers = model.config.n_layers
        self.state = model.state_dict()
        self.held = held_experts(model)
        self.weight_of: dict[str, Slot] = {}
        """The weight that each written tensor is, or whose scales it holds, in the order of the model."""
        self.weights = fp8_weights(model)
        origin = origin_of(model)
        self.stored: Mapping[str, torch.dtype] = {} if origin is None else origin.dtypes
        self.loaded = origin is not None
        self.gates = {f"{name}." for name, module in model.named_modules() if isinstance(module, Gate)}
        self.quantizes = fp8 and any(self.state[name].dtype != torch.float8_e4m3fn for name in self.weights)
        self.not_finite: str | None = None
        """Name of the first written tensor with infinities or NaN."""
        self.scales: dict[Slot, Tensor] = {}
        """Scales of weights that are being quantized: made when they are written, and used again for the codes."""

    def units(self) -> Iterator[Sequence[Entry]]:
        """Yield the entries of the folder in the order of the model, a weight and its scales together."""
        yield from self._units(slots(self.state, self.model.config.n_routed_experts))
        for theirs, ours in mtp_copies(self.n_layers, range(self.model.config.n_mtp_layers)).items():
            if not self.loaded or theirs in self.stored:
                self.weight_of[theirs] = Slot(ours, None, tuple(self.state[ours].shape))
                yield [self._entry(theirs, self.weight_of[theirs], self._dtype(theirs, ours))]

    def _units(self, parts: Iterable[Slot]) -> Iterator[Sequence[Entry]]:
        """Yield the entries of these parts of the model."""
        scales = {f"{p[: -len(a)]}{scale_names(m)[a]}" for p, (m, a) in self.weights.items()}
        for slot in parts:
            if slot.name in scales:
                continue
            unit = self._matrix(slot) if slot.name in self.weights else [self._plain(slot)]
            self.weight_of |= dict.fromkeys((entry.name for entry in unit), slot)
            yield unit

    def _hf_name(self, slot: Slot) -> str:
        return hf_name(slot.name, self.n_layers, slot.expert)

    def _name(self, slot: Slot) -> str:
        """Return the name that a part of the model is written under."""
        return self._hf_name(slot)

    def _value(self, slot: Slot) -> Tensor:
        whole = self.state[slot.name]
        return whole if slot.expert is None else whole[self.held[slot.name.rpartition(".")[0]].index(slot.expert)]

    def _dtype(self, theirs: str, ours: str) -> torch.dtype:
        if self.dtype is not None:
            gate = any(ours.startswith(prefix) for prefix in self.gates)
            return torch.float32 if gate else self.dtype
        stored = self.stored.get(theirs)
        held = self.state[ours].dtype
        if stored == torch.float8_e4m3fn:  # and dequantized since
            return torch.bfloat16 if held == torch.float8_e4m3fn else held
        return stored or held

    def _entry(self, theirs: str, slot: Slot, dtype: torch.dtype) -> Entry:
        return Entry(theirs, dtype, slot.shape, partial(self._converted, theirs, slot, dtype))

    def _converted(self, theirs: str, slot: Slot, dtype: torch.dtype) -> Tensor:
        value = self._value(slot)
        self._look_at(theirs, value)
        return value.to(dtype)

    def _look_at(self, theirs: str, value: Tensor) -> None:
        if self.not_finite is None and not _is_finite(value):
            self.not_finite = theirs

    def _plain(self, slot: Slot) -> Entry:
        return self._entry(self._name(slot), slot, self._dtype(self._hf_name(slot), slot.name))

    def _matrix(self, slot: Slot) -> list[Entry]:
        """Return the entry of a weight that may be FP8, and if it is, that of its scales."""
        module, attribute = self.weights[slot.name]
        scale = scale_slot(slot, module, attribute)
        theirs, theirs_scale = self._name(slot), self._name(scale)
        kept = self.state[slot.name].dtype == torch.float8_e4m3fn
        if kept and (self.fp8 or self.dtype is None):
            stored = self.stored.get(self._hf_name(scale), torch.float32)
            return [
                self._entry(theirs, slot, torch.float8_e4m3fn),
                self._entry(theirs_scale, scale, stored),
            ]
        if self.fp8:
            return [
                Entry(theirs, torch.float8_e4m3fn, slot.shape, partial(self._codes, slot)),
                Entry(theirs_scale, torch.float32, scale.shape, partial(self._new_scales, slot)),
            ]
        if kept:
            assert self.dtype is not None
            return [Entry(theirs, self.dtype, slot.shape, partial(self._dequantized, slot, scale, self.dtype))]
        return [self._plain(slot)]

    def _dequantized(self, slot: Slot, scale: Slot, dtype: torch.dtype) -> Tensor:
        self._look_at(self._name(slot), self._value(slot))
        return dequantize_tiles(self._value(slot), self._value(scale).float(), WEIGHT_TILE, "e4m3", dtype)

    def _new_scales(self, slot: Slot) -> Tensor:
        scales = tile_scales(self._value(slot), WEIGHT_TILE, "fp32", "e4m3", SMALLEST_AMAX)
        if not scales.isfinite().all():
            raise ValueError(f"{slot.name} holds infinities or NaN; E4M3 has no codes for them; save without fp8=True")
        self.scales[slot] = scales
        return scales

    def _codes(self, slot: Slot) -> Tensor:
        # scales are the wider type, so that they come first in a file
        return encode_tiles(self._value(slot), self.scales.pop(slot), WEIGHT_TILE)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither infinities nor NaN, without a copy of it."""
    if tensor.dtype == torch.float8_e4m3fn:  # its largest code, with either sign, is NaN
        return all(int((part.view(torch.uint8) & 0x7F).max()) < 0x7F for part in tensor.reshape(-1).split(1 << 20))
    least, most = torch.aminmax(tensor)
    return math.isfinite(least) and math.isfinite(most)
