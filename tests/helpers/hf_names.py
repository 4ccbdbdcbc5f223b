"""A model's tensors under the names of a Hugging Face folder."""

from torch import Tensor

from dsmini import Transformer
from dsmini.checkpoint.load import parts_of
from dsmini.checkpoint.tensor_files import mtp_copies


def to_hf(model: Transformer) -> dict[str, Tensor]:
    """Return a model's tensors as a folder stores them: experts one by one, with the MTP blocks' copies."""
    state = model.state_dict()
    every = [one for part in parts_of(model) for one in (part, part.scales) if one is not None and one.ours in state]
    out = {part.name: state[part.ours] if part.expert is None else state[part.ours][part.expert] for part in every}
    return out | {theirs: state[ours] for theirs, ours in mtp_copies(model.config).items()}
