"""The tensors of a model as a folder has them: experts one by one, and the matrices that may be FP8."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from dsmini.checkpoint.tensor_names import is_stacked
from dsmini.nn import Experts, Projection, Transformer
from dsmini.nn.fp8 import scale_names
from dsmini.numerics import WEIGHT_TILE


class Slot(NamedTuple):
    """A part of a model that is one tensor of a folder."""

    name: str
    """Name in the state dict."""
    expert: int | None
    """Index in a stacked tensor; None if it is not stacked."""
    shape: tuple[int, ...]


def slots(state: Mapping[str, Tensor], n_experts: int | None = None) -> Iterator[Slot]:
    """Yield the slots of a state dict, experts one by one.

    Args:
        n_experts: number of experts of the whole model; None: as many as the stacked tensors hold.
    """
    for name, tensor in state.items():
        if is_stacked(name):
            n = tensor.shape[0] if n_experts is None else n_experts
            yield from (Slot(name, i, tuple(tensor.shape[1:])) for i in range(n))
        else:
            yield Slot(name, None, tuple(tensor.shape))


def fp8_weights(model: Transformer) -> dict[str, tuple[Projection | Experts, str]]:
    """Find the parameters that DeepSeek stores in FP8, by name, each with its module and its name there.

    They are the matrices of attention and the feed-forwards, not embedding, head, norms, gates or MTP's eh_proj.
    """
    out: dict[str, tuple[Projection | Experts, str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Projection | Experts) and path != "head" and not path.endswith("eh_proj"):
            out |= {f"{path}.{name}": (module, name) for name in scale_names(module)}
    return out


def scale_slot(slot: Slot, module: Projection | Experts, attribute: str) -> Slot:
    """Return the slot of the scales that belong to a weight."""
    stem = slot.name.removesuffix(attribute)
    shape = tuple(-(-n // t) for n, t in zip(slot.shape, WEIGHT_TILE, strict=True))
    return Slot(stem + scale_names(module)[attribute], slot.expert, shape)
