"""The experts that one of several processes holds: the stacked tensors of a layer have rows for these alone.

The others are left out while the model is still on the meta device, so that no process ever makes them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from dsmini.nn import Experts, Transformer
from dsmini.nn.fp8 import EXPERTS_SCALES

Holding = Callable[[Transformer], Sequence[Sequence[int]]]
"""Returns the experts that this process holds of each layer with experts, in the order of the model's modules. It is
called with the whole model on the meta device, and raises ValueError for one that it does not fit."""
HELD = "held_experts"
"""Name of the attribute of a Transformer that has its held_experts."""


def hold_experts(model: Transformer, held: Sequence[Sequence[int]]) -> None:
    """Leave only these experts of each layer in a model on the meta device, in this order."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    for experts, own in zip(layers.values(), held, strict=True):
        for name in EXPERTS_SCALES:
            weight = getattr(experts, name)
            assert weight.is_meta, "the experts that are left out have no memory"
            setattr(experts, name, nn.Parameter(torch.empty((len(own), *weight.shape[1:]), device="meta")))
    setattr(model, HELD, {name: tuple(own) for name, own in zip(layers, held, strict=True)})


def held_experts(model: Transformer) -> Mapping[str, Sequence[int]]:
    """Return the experts that a model's stacked tensors hold, in order, by the name of their module."""
    held: Mapping[str, Sequence[int]] = getattr(model, HELD, {})
    every = range(model.config.n_routed_experts)
    return {name: held.get(name, every) for name, module in model.named_modules() if isinstance(module, Experts)}
