"""A model's tensors, or their gradients, under the names of a Hugging Face folder, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dsmini import Transformer
from dsmini.checkpoint.load import Part, parts_of
from dsmini.checkpoint.tensor_files import mtp_copies


def _names(model: Transformer) -> tuple[dict[str, Part], dict[str, str]]:
    """Return the part of each name of a folder, and our name for each of the MTP blocks' copies."""
    state = model.state_dict()
    every = [one for part in parts_of(model) for one in (part, part.scales) if one is not None and one.ours in state]
    return {part.name: part for part in every}, mtp_copies(model.config)


def to_hf(model: Transformer) -> dict[str, Tensor]:
    """Return a model's tensors as a folder stores them: experts one by one, with the MTP blocks' copies."""
    state, (named, copies) = model.state_dict(), _names(model)
    out = {
        name: state[part.ours] if part.expert is None else state[part.ours][part.expert] for name, part in named.items()
    }
    return out | {theirs: state[ours] for theirs, ours in copies.items()}


def from_hf(tensors: Mapping[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """Return a folder's tensors under the names of a model, which must have all of them."""
    named, copies = _names(model)
    assert tensors.keys() <= named.keys() | copies.keys()
    out = {part.ours: tensors[theirs] for theirs, part in named.items() if theirs in tensors}
    for name in {part.ours for part in named.values() if part.expert is not None} & out.keys():
        out[name] = torch.stack([tensors[theirs] for theirs, part in named.items() if part.ours == name])
    return out
