"""The choice of the optimizers: Muon for the matrices inside the blocks, AdamW for the rest or for all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dsmini.config import TrainConfig
from dsmini.functional.muon import NEWTON_SCHULZ, muon_update
from dsmini.training.adamw import AdamWBF16
from dsmini.training.muon import Muon


def optimizers(
    model: nn.Module,
    config: TrainConfig,
    matmul_dtype: torch.dtype = torch.float32,
    update: Callable[..., None] = muon_update,
    owned: Callable[[Sequence[nn.Parameter]], list[nn.Parameter]] = list,
) -> list[Optimizer]:
    """Return the optimizers that together move every parameter that learns once.

    The routing bias is a buffer, so none moves it. Each group has a "peak_lr", its learning rate at the top of the
    schedule. Matrices decay, norms and gates do not.

    Args:
        matmul_dtype: dtype of Muon's matrix products.
        update: as in Muon.
        owned: returns those of Muon's matrices that are moved here; the others are moved in other processes.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = {name for name, p in named if config.optimizer == "muon" and is_inner_matrix(name, p)}
    muon = owned([p for name, p in named if name in by_muon])
    rest = [(name, p) for name, p in named if name not in by_muon]
    gates = [p for name, p in rest if name.endswith("gate.weight")]
    norms = [p for _, p in rest if p.dim() <= 1]
    matrices = [p for name, p in rest if p.dim() > 1 and not name.endswith("gate.weight")]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "peak_lr": config.lr},
        {"params": norms, "weight_decay": 0.0, "peak_lr": config.lr},
        {"params": gates, "weight_decay": 0.0, "peak_lr": config.gate_lr or config.lr},
    ]
    groups = [alike for group in groups for alike in _alike(group)]
    betas = (config.beta1, config.beta2)
    adamw: Optimizer
    if config.moments == "bfloat16":
        adamw = AdamWBF16(groups, lr=config.lr, betas=betas)
    else:
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    if not muon:
        return [adamw]
    inner = {"params": muon, "peak_lr": config.muon_lr, "weight_decay": config.weight_decay}
    steps = NEWTON_SCHULZ[config.newton_schulz]
    return [Muon([inner], config.muon_lr, config.muon_momentum, matmul_dtype, steps, update), adamw]


def _alike(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a group in parts whose parameters are of one class: divided among processes, or whole."""
    kinds = dict.fromkeys(type(p.data) for p in group["params"])
    return [{**group, "params": [p for p in group["params"] if type(p.data) is kind]} for kind in kinds]


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon moves a parameter.

    It moves matrices, and stacks of experts' matrices, that map hidden states to hidden states: not the embedding, the
    head, the gates, and the indexers, which choose as gates do and have V3.2's optimizer and learning rate.
    """
    outer = name in ("embed.weight", "head.weight") or name.endswith("gate.weight") or is_of_indexer(name)
    return parameter.dim() > 1 and not outer


def is_of_indexer(name: str) -> bool:
    """Return whether a parameter is of an indexer, which learns from a loss of its own."""
    return ".indexer." in name
