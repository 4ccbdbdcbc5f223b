"""The optimizers: Muon for the matrices inside the blocks, AdamW for the rest or for all; and their state.

The parameters that learn in a stage of sparse attention, and the average of the parameters, are here too.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) turns a matrix's momentum into the nearest matrix whose
singular values are all 1, so that no direction of the update is lost next to a few large ones.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsmini.config import TrainConfig
from dsmini.nn import Transformer
from dsmini.training.muon import HALLEY, NEWTON_SCHULZ, MuonMatrices, NewtonSchulz, muon_update_divided

Named = Iterable[tuple[str, Tensor]]
"""Parameters with their names."""


WEIGHS = re.compile(r"(^|\.)(gate\.weight|hc_\w+\.\w+|attn_sink|ape|engram\.(q_norm|k_norm|conv|conv_norm)\.weight)$")
"""Names of the parameters that weigh or choose: gates, hyper-connections, V4's sinks and position biases, and Engram's
norms and convolution. AdamW moves them, with the gates' learning rate, or in an indexer with the indexers'."""
ENGRAM_TABLE = ".engram.embed."
"""Part of the names of Engram's tables. AdamW moves them with train.engram_lr, and without weight decay."""


LARGEST_BETA_BF16 = 0.996
"""Largest decay of a moment in BF16 with which it can fall from every value: at most 1 - 2^-8."""


class AdamWBF16(Optimizer):
    """AdamW whose two moments are stored in BF16 and computed in FP32, as in DeepSeek-V3: half the optimizer's memory.

    The stored moments are rounded, the update is not. The rounding errors, of at most u = 2^-8 each, fade as the
    moments do: the error of the second moment is at most u / (1 - beta2), 8 % at 0.95. With a beta above 1 - u a moment
    stops falling: a step takes away less than half a BF16 step.

    Source: DeepSeek-V3 report, section 3.3.3.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p] = self.state[p] or first_state(self, p)
                state["step"] += 1
                t, grad = state["step"].item(), p.grad.float()
                m = state["exp_avg"].float().lerp_(grad, 1 - beta1)
                v = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                scale = v.div_(1 - beta2**t).sqrt_().add_(group["eps"])
                p.addcdiv_(m, scale, value=-group["lr"] / (1 - beta1**t))


class Muon(Optimizer):
    """Momentum, orthogonalised: each matrix [o, i] moves by -lr sqrt(max(1, o/i)) times the matrix nearest to its
    (Nesterov) momentum with singular values of about 1. A stack [e, o, i] is e matrices.

    Weight decay is decoupled and multiplied by lr. Matrices of one size, tall or wide, are iterated on together.

    Only directions count, not sizes. The rest of the momentum of an expert that no token visited would become a whole
    step. So in a stack a matrix whose gradient is zero only decays (docs/log.md).

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        matmul_dtype: torch.dtype = torch.float32,
        newton_schulz: NewtonSchulz = HALLEY,
    ) -> None:
        self.matmul_dtype: torch.dtype = matmul_dtype
        self.newton_schulz: NewtonSchulz = newton_schulz
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the parameters that have a gradient."""
        for group in self.param_groups:
            by_size: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_size[tuple(sorted(p.shape[-2:]))].append(p)
                    self.state[p] = self.state[p] or first_state(self, p)
            for params in by_size.values():
                grads = [p.grad for p in params if p.grad is not None]
                matrices = MuonMatrices(params=params, grads=grads, momenta=[self.state[p]["momentum"] for p in params])
                options = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
                muon_update_divided(matrices, self.newton_schulz, **options, matmul_dtype=self.matmul_dtype)


def optimizers(
    model: nn.Module,
    config: TrainConfig,
    matmul_dtype: torch.dtype = torch.float32,
    owned: Callable[[Sequence[nn.Parameter]], list[nn.Parameter]] = list,
) -> list[Optimizer]:
    """Return the optimizers that together move every parameter that learns once.

    The routing bias is a buffer, so none moves it. Each group has a "peak_lr", its learning rate at the top of the
    schedule. Matrices decay; norms, gates and the small parameters of V4 do not.

    Args:
        matmul_dtype: dtype of Muon's matrix products.
        owned: returns those of Muon's matrices that are moved here; the others are moved in other processes.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = {name for name, p in named if config.optimizer == "muon" and is_inner_matrix(name, p)}
    muon = owned([p for name, p in named if name in by_muon])
    kinds: defaultdict[tuple[float, float, type], list[nn.Parameter]] = defaultdict(list)
    """Parameters that AdamW moves, by learning rate, weight decay, and class: divided among processes, or whole."""
    for name, p in named:
        if name not in by_muon:
            weighs = WEIGHS.search(name)
            lr = config.gates_lr if weighs else config.table_lr
            if ".indexer." in name:
                lr = config.adamw_lr
            if ENGRAM_TABLE in name:
                lr = config.engram_tables_lr
            undecayed = weighs or p.dim() <= 1 or ENGRAM_TABLE in name
            kinds[lr, 0.0 if undecayed else config.weight_decay, type(p.data)].append(p)
    groups = [{"params": params, "weight_decay": decay, "peak_lr": lr} for (lr, decay, _), params in kinds.items()]
    betas, made = (config.beta1, config.beta2), list[Optimizer]()
    if muon:
        inner = {"params": muon, "peak_lr": config.muon_lr, "weight_decay": config.weight_decay}
        steps = NEWTON_SCHULZ[config.newton_schulz]
        made.append(Muon([inner], config.muon_lr, config.muon_momentum, matmul_dtype, steps))
    if groups and config.moments == "bfloat16":
        made.append(AdamWBF16(groups, lr=config.adamw_lr, betas=betas))
    elif groups:  # a stage of a pipeline may have nothing that learns
        made.append(torch.optim.AdamW(groups, lr=config.adamw_lr, betas=betas, fused=True))
    return made


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon moves a parameter.

    It moves matrices, and stacks of experts' matrices, that map hidden states to hidden states: not the embedding, the
    head, Engram's tables, the gates and what else weighs, and the indexers, which choose as gates do and have V3.2's
    optimizer and learning rate.
    """
    outer = name in ("embed.weight", "head.weight") or WEIGHS.search(name) or ".indexer." in name
    outer = outer or ENGRAM_TABLE in name
    return parameter.dim() > 1 and not outer


def begin_stage(model: Transformer, stage: Literal["warmup", "sparse"], names: Iterable[str] = ()) -> list[set[str]]:
    """Begin a stage; return the names of each group that is clipped apart.

    The warm-up freezes all but the indexers, and the stage after it lets all learn again. Without a warm-up before it,
    what is frozen stays so.

        warmup    attention to all keys    the indexers learn, nothing else has a gradient    1000 steps, rate 1e-3
        sparse    the chosen keys          all learns, each part from its own loss            15000 steps, 7.3e-6

    The indexers are a group of their own: the main model moves as far as it would without their loss. There are no
    groups in a model without indexers: it is clipped as a whole, whatever the stage.

    Args:
        names: names of all parameters of the whole model, of which this one may be a stage; empty: those of this one.

    Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1.1.
    """
    named = dict(model.named_parameters())
    names = set(names) or {*named}
    of_indexers = {name for name in names if ".indexer." in name}
    if not of_indexers:
        return []
    thaws = stage == "sparse" and model.indexer_stage == "warmup"
    model.indexer_stage = stage
    rest = names - of_indexers
    for name in rest & named.keys() if stage == "warmup" or thaws else ():
        named[name].requires_grad_(thaws)
    return [rest, of_indexers] if stage == "sparse" else [of_indexers]


# --- their state, as PARAMETER/KEY


def first_state(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before it first moves."""
    if isinstance(optimizer, Muon):
        return {"momentum": torch.zeros_like(p)}
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWBF16) else p.dtype
    # the number of steps is a tensor on the CPU, except in the fused AdamW
    step = torch.zeros((), dtype=torch.float32, device=p.device if optimizer.defaults.get("fused") else "cpu")
    return {"step": step, **{name: torch.zeros_like(p, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}}


def optimizer_state(optimizers: Iterable[Optimizer], named: Named) -> dict[str, Tensor]:
    """Return the state of each parameter that these optimizers move: the tensors themselves, not copies."""
    names = {p: name for name, p in named}
    found = {}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p] = optimizer.state[p] or first_state(optimizer, p)
            found |= {f"{names[p]}/{key}": value for key, value in optimizer.state[p].items()}
    return found


# --- the average of the parameters


class ParameterAverage:
    """An exponential moving average of a model's parameters in FP32, next to them on their device.

    V3 has one to estimate the model after the decay of the learning rate, in main memory (report, section 3.2.3), to
    which every parameter would travel in each step. It starts as a copy of the parameters. Its decay grows from 0.1 as
    min(decay, (1 + t) / (10 + t)), so the start is soon forgotten.
    """

    def __init__(self, named: Named, decay: float) -> None:
        self.decay = decay
        self.updates: int = 0
        self.tensors: dict[str, Tensor] = {name: p.detach().to(torch.float32, copy=True) for name, p in named}

    @torch.no_grad()
    def update(self, named: Named) -> None:
        """Add the parameters after one more step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, p in named:
            self.tensors[name].lerp_(p.detach().float(), 1 - decay)
