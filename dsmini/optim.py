"""The optimizer and its schedule."""

import math

import torch
from torch import nn

from dsmini.config import TrainConfig
from dsmini.nn import Experts, Linear
from dsmini.nn.transformer import Embedding


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: the matrices, which decay, and the norms and gates, which do not.

    The routing bias is a buffer: it is in neither.
    """
    decayed: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, Linear | Embedding | Experts):
            decayed += module.parameters(recurse=False)
    ids = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters, fused into one operation."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0, 1, ...: linear from near 0 to the peak over the warm-up, then a cosine down to its final share."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    final = config.lr * config.lr_final
    return final + (config.lr - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
