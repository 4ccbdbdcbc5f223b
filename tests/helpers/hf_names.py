"""A model's tensors, or their gradients, under the names of a Hugging Face folder, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dsmini import Transformer
from dsmini.checkpoint.load import Slot, slots
from dsmini.checkpoint.tensor_names import hf_name, mtp_copies


def _names(model: Transformer) -> tuple[dict[str, Slot], dict[str, str]]:
    """Return the slot of each name of a folder, and our name for each of the MTP blocks' copies."""
    n = model.config.n_layers
    named = {hf_name(slot.name, n, slot.expert): slot for slot in slots(model.state_dict())}
    return named, mtp_copies(n, range(model.config.n_mtp_layers))


def to_hf(model: Transformer) -> dict[str, Tensor]:
    """Return a model's tensors as a folder stores them: experts one by one, with the MTP blocks' copies."""
    state, (named, copies) = model.state_dict(), _names(model)
    out = {theirs: state[name] if i is None else state[name][i] for theirs, (name, i, _) in named.items()}
    return out | {theirs: state[ours] for theirs, ours in copies.items()}


def from_hf(tensors: Mapping[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """Return a folder's tensors under the names of a model, which must have all of them."""
    named, copies = _names(model)
    assert tensors.keys() <= named.keys() | copies.keys()
    out = {slot.name: tensors[theirs] for theirs, slot in named.items() if theirs in tensors}
    for name in {slot.name for slot in named.values() if slot.expert is not None} & out.keys():
        out[name] = torch.stack([tensors[theirs] for theirs, slot in named.items() if slot.name == name])
    return out
