"""A model's tensors, or their gradients, under the names of a Hugging Face folder, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dsmini import Transformer
from dsmini.checkpoint.slots import slots
from dsmini.checkpoint.tensor_names import hf_name, mtp_copies


def to_hf(model: Transformer) -> dict[str, Tensor]:
    """Return a model's tensors as a folder stores them: experts one by one, with the MTP blocks' copies."""
    state, n_layers = model.state_dict(), model.config.n_layers
    out = {
        hf_name(slot.name, n_layers, slot.expert): state[slot.name]
        if slot.expert is None
        else state[slot.name][slot.expert]
        for slot in slots(state)
    }
    copies = mtp_copies(n_layers, range(model.config.n_mtp_layers))
    return out | {theirs: state[ours] for theirs, ours in copies.items()}


def from_hf(tensors: Mapping[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """Return a folder's tensors under the names of a model, which must have all of them."""
    n_layers = model.config.n_layers
    parts: dict[str, list[Tensor]] = {}
    used = set(mtp_copies(n_layers, range(model.config.n_mtp_layers)))
    stacked = set()
    for slot in slots(model.state_dict()):
        theirs = hf_name(slot.name, n_layers, slot.expert)
        if theirs in tensors:
            used.add(theirs)
            parts.setdefault(slot.name, []).append(tensors[theirs])
            stacked |= {slot.name} if slot.expert is not None else set()
    assert not tensors.keys() - used
    return {name: torch.stack(those) if name in stacked else those[0] for name, those in parts.items()}
