"""The optimizers: Muon for the matrices inside the blocks, AdamW for the rest or for all; and their state.

The parameters that learn in a stage of sparse attention, and the average of the parameters, are here too.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) turns a matrix's momentum into the nearest matrix whose
singular values are all 1, so that no direction of the update is lost next to a few large ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsmini.checkpoint.training_state import check_tensors
from dsmini.config import TrainConfig
from dsmini.distributed.data_parallel import local
from dsmini.nn import dsa_layers
from dsmini.numerics.orthogonalize import JORDAN, NEWTON_SCHULZ, MuonMatrices, NewtonSchulz, muon_update


class AdamWBF16(Optimizer):
    """AdamW whose two moments are stored in BF16 and computed in FP32, as in DeepSeek-V3: half the optimizer's memory.

    The stored moments are rounded, the update is not. The rounding errors, of at most u = 2^-8 each, fade as the
    moments do: the error of the second moment is at most u / (1 - beta2), 8 % at 0.95. With beta2 above 0.998 it could
    never fall again: a step takes away less than half a BF16 step.

    Source: DeepSeek-V3 report, section 3.3.3.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += 1
                t = state["step"].item()
                grad = p.grad.float()
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

    Args:
        update: computes `muon_update`, also of matrices that are divided among processes.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        matmul_dtype: torch.dtype = torch.float32,
        newton_schulz: NewtonSchulz = JORDAN,
        update: Callable[..., None] = muon_update,
    ) -> None:
        self.matmul_dtype, self.newton_schulz, self.update = matmul_dtype, newton_schulz, update
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the parameters that have a gradient."""
        for group in self.param_groups:
            by_size: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_size[tuple(sorted(p.shape[-2:]))].append(p)
            for params in by_size.values():
                self.update(
                    MuonMatrices(
                        params=params,
                        grads=[p.grad for p in params if p.grad is not None],
                        momenta=[self._momentum(p) for p in params],
                    ),
                    self.newton_schulz,
                    lr=group["lr"],
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    matmul_dtype=self.matmul_dtype,
                )

    def _momentum(self, p: Tensor) -> Tensor:
        """Return the momentum of a parameter, zeros at first."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


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


def begin_stage(model: nn.Module, stage: Literal["warmup", "sparse"]) -> list[set[str]]:
    """Let the parameters of a stage learn, and no others; return the names of each group that is clipped apart.

        warmup    attention to all keys    the indexers learn, nothing else has a gradient    1000 steps, rate 1e-3
        sparse    attention to the picks   all learns, each part from its own loss            15000 steps, 7.3e-6

    The indexers are a group of their own: the main model moves as far as it would without their loss. There are no
    groups in a model without indexers: it is clipped as a whole, whatever the stage.

    Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1.1.
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


# --- their state


def optimizer_state(optimizers: Iterable[Optimizer], named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the state of each parameter that was moved, as PARAMETER/KEY."""
    names = {p: name for name, p in named}
    return {
        f"{names[p]}/{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def check_optimizer_state(
    tensors: Mapping[str, Tensor], optimizers: Iterable[Optimizer], named: Iterable[tuple[str, Tensor]]
) -> None:
    """Refuse tensors that cannot be the state of these optimizers for the parts of parameters that are here.

    Raises: ValueError naming the first.
    """
    names, want, moved = {p: name for name, p in named}, {}, set()
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            moved.add(names[p])
            kinds = {f"{names[p]}/{key}": kind for key, kind in _kinds(optimizer, local(p)).items()}
            want |= kinds if kinds.keys() & tensors.keys() else {}
    elsewhere = set(names.values()) - moved  # moved in other processes
    here = {name: t for name, t in tensors.items() if name.rpartition("/")[0] not in elsewhere}
    check_tensors(here, want, "optimizer.safetensors")


def load_optimizer_state(
    tensors: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer],
    named: Iterable[tuple[str, Tensor]],
    divided_like: Callable[[Tensor, Tensor], Tensor] = lambda p, state: state,
) -> None:
    """Load what `optimizer_state` returned. Optimizer.load_state_dict would make FP32 of moments in BF16.

    Args:
        divided_like: makes of this rank's part of a state, given the parameter, what the optimizer holds.
    """
    names = {p: name for name, p in named}
    for optimizer in optimizers:
        optimizer.state.clear()
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            saved = {key: f"{names[p]}/{key}" for key in _kinds(optimizer, p)}
            state = {key: tensors[name] for key, name in saved.items() if name in tensors}
            # the number of steps is a tensor on the CPU, except in the fused AdamW
            fused = optimizer.defaults.get("fused", False)
            if state:
                optimizer.state[p] = {key: _placed(value, p, fused, divided_like) for key, value in state.items()}


def _placed(value: Tensor, p: Tensor, fused: bool, divided_like: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return a copy of a state on the device where the optimizer has it."""
    copied = value.to(p.device if value.dim() or fused else "cpu", copy=True)
    return divided_like(p, copied) if copied.dim() else copied


def _kinds(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Return tensors without memory like those that an optimizer stores for a parameter it has moved."""
    like = torch.empty(p.shape, dtype=p.dtype, device="meta")
    if isinstance(optimizer, Muon):
        return {"momentum": like}
    moments = like.bfloat16() if isinstance(optimizer, AdamWBF16) else like
    return {"step": torch.empty((), device="meta"), "exp_avg": moments, "exp_avg_sq": moments}


# --- the average of the parameters


class ParameterAverage:
    """An exponential moving average of a model's parameters, on the CPU in FP32.

    V3 has one to estimate the model after the decay of the learning rate (report, section 3.2.3). It starts as a copy
    of the parameters. Its decay grows from 0.1 as min(decay, (1 + t) / (10 + t)), so the start is soon forgotten.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in named}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Add the parameters after one more step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, p in named:
            self.tensors[name].lerp_(p.detach().to("cpu", torch.float32), 1 - decay)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Load a saved average."""
        for name, mean in self.tensors.items():
            mean.copy_(tensors[name])
        self.updates = updates
