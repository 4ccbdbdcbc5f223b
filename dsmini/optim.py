"""The optimizer and its schedule."""

import math
from typing import Any

import torch
from torch import nn

from dsmini.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the matrices, which decay, and the norms and gates, which do not.

    The routing bias is a buffer: it is in neither.
    """
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.dim() > 1 and not name.endswith("gate.weight")]
    rest = [p for name, p in named if p.dim() <= 1 or name.endswith("gate.weight")]
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
