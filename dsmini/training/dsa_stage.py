"""The two stages in which a model of DeepSeek Sparse Attention learns.

    warmup    attention to all keys    the indexers learn, nothing else has a gradient    1000 steps, learning rate 1e-3
    sparse    attention to the picks   all learns, each part from its own loss            15000 steps, 7.3e-6

Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1.1.
"""

from typing import Literal

from torch import nn

from dsmini.nn import dsa_layers
from dsmini.training.optim import is_of_indexer


def begin_stage(model: nn.Module, stage: Literal["warmup", "sparse"]) -> list[set[str]]:
    """Let the parameters of a stage learn, and no others; return the names of each group that is clipped apart.

    The indexers are a group of their own: the main model moves as far as it would without their loss. There are no
    groups in a model without indexers: it is clipped as a whole, whatever the stage.
    """
    named = dict(model.named_parameters())
    layers = dsa_layers(model)
    if not layers:
        return []
    for layer in layers:
        layer.stage = stage
    of_indexers = set(filter(is_of_indexer, named))
    rest = named.keys() - of_indexers
    for name in rest:
        named[name].requires_grad_(stage == "sparse")
    return [rest, of_indexers] if stage == "sparse" else [of_indexers]
