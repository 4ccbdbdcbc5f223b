"""The optimizers: Muon for the matrices inside the blocks, AdamW for the rest or for all; and their state.

The parameters that learn in a stage of sparse attention, and the average of the parameters, are here too.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) turns a matrix's momentum into the nearest matrix whose
singular values are all 1, so that no direction of the update is lost next to a few large ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsmini.checkpoint.training_state import check_tensors
from dsmini.config import TrainConfig
from dsmini.distributed.mesh import local
from dsmini.nn import dsa_layers
from dsmini.numerics.orthogonalize import JORDAN, NEWTON_SCHULZ, MuonMatrices, NewtonSchulz, muon_update

Named = Iterable[tuple[str, Tensor]]
"""Parameters with their names."""


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
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
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
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            for params in by_size.values():
                grads = [p.grad for p in params if p.grad is not None]
                matrices = MuonMatrices(params=params, grads=grads, momenta=[self.state[p]["momentum"] for p in params])
                options = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
                self.update(matrices, self.newton_schulz, **options, matmul_dtype=self.matmul_dtype)


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
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "norm": [], "gate": []}
    for name, p in named:
        if name not in by_muon:
            kind = "norm" if p.dim() <= 1 else "matrix"
            kinds["gate" if name.endswith("gate.weight") else kind].append(p)
    groups = []
    for kind, params in kinds.items():
        lr = config.gate_lr or config.lr if kind == "gate" else config.lr
        decay = config.weight_decay if kind == "matrix" else 0.0
        # the parameters of a group are of one class: divided among processes, or whole
        for divided in dict.fromkeys(type(p.data) for p in params):
            alike = [p for p in params if type(p.data) is divided]
            groups.append({"params": alike, "weight_decay": decay, "peak_lr": lr})
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


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon moves a parameter.

    It moves matrices, and stacks of experts' matrices, that map hidden states to hidden states: not the embedding, the
    head, the gates, and the indexers, which choose as gates do and have V3.2's optimizer and learning rate.
    """
    outer = name in ("embed.weight", "head.weight") or name.endswith("gate.weight") or ".indexer." in name
    return parameter.dim() > 1 and not outer


def begin_stage(model: nn.Module, stage: Literal["warmup", "sparse"]) -> list[set[str]]:
    """Let the parameters of a stage learn, and no others; return the names of each group that is clipped apart.

        warmup    attention to all keys    the indexers learn, nothing else has a gradient    1000 steps, rate 1e-3
        sparse    attention to the picks   all learns, each part from its own loss            15000 steps, 7.3e-6

    The indexers are a group of their own: the main model moves as far as it would without their loss. There are no
    groups in a model without indexers: it is clipped as a whole, whatever the stage.

    Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1.1.
    """
    named, layers = dict(model.named_parameters()), dsa_layers(model)
    for layer in layers:
        layer.stage = stage
    if not layers:
        return []
    of_indexers = {name for name in named if ".indexer." in name}
    rest = named.keys() - of_indexers
    for name in rest:
        named[name].requires_grad_(stage == "sparse")
    return [rest, of_indexers] if stage == "sparse" else [of_indexers]


# --- their state, as PARAMETER/KEY


def optimizer_state(optimizers: Iterable[Optimizer], named: Named) -> dict[str, Tensor]:
    """Return the state of each parameter that was moved."""
    names = {p: name for name, p in named}
    return {
        f"{names[p]}/{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def check_optimizer_state(tensors: Mapping[str, Tensor], optimizers: Iterable[Optimizer], named: Named) -> None:
    """Refuse tensors that cannot be the state of these optimizers for the parts of parameters that are here.

    Raises: ValueError naming the first.
    """
    names, want, moved = {p: name for name, p in named}, {}, set()
    for _, p, kinds in _expected(optimizers, names, local):
        moved.add(names[p])
        want |= kinds if kinds.keys() & tensors.keys() else {}
    elsewhere = set(names.values()) - moved  # moved in other processes
    here = {name: t for name, t in tensors.items() if name.rpartition("/")[0] not in elsewhere}
    check_tensors(here, want, "optimizer.safetensors")


def load_optimizer_state(
    tensors: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    named: Named,
    divided_like: Callable[[Tensor, Tensor], Tensor] = lambda p, state: state,
) -> None:
    """Load what `optimizer_state` returned. Optimizer.load_state_dict would make FP32 of moments in BF16.

    Args:
        divided_like: makes of this rank's part of a state, given the parameter, what the optimizer holds.
    """
    for optimizer in optimizers:
        optimizer.state.clear()
    for optimizer, p, kinds in _expected(optimizers, {p: name for name, p in named}):
        # the number of steps is a tensor on the CPU, except in the fused AdamW
        fused = optimizer.defaults.get("fused", False)
        for name in (name for name in kinds if name in tensors):
            value = tensors[name].to(p.device if tensors[name].dim() or fused else "cpu", copy=True)
            optimizer.state[p][name.rpartition("/")[2]] = divided_like(p, value) if value.dim() else value


def _expected(
    optimizers: Iterable[Optimizer], names: Mapping[Tensor, str], part: Callable[[Tensor], Tensor] = lambda p: p
) -> Iterator[tuple[Optimizer, Tensor, dict[str, Tensor]]]:
    """Yield each parameter with its optimizer, and tensors without memory like those stored for it once it has moved.

    Args:
        part: returns the part of a parameter that counts.
    """
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            like = torch.empty(part(p).shape, dtype=p.dtype, device="meta")
            kinds = {"momentum": like}
            if not isinstance(optimizer, Muon):
                moments = like.bfloat16() if isinstance(optimizer, AdamWBF16) else like
                kinds = {"step": torch.empty((), device="meta"), "exp_avg": moments, "exp_avg_sq": moments}
            yield optimizer, p, {f"{names[p]}/{key}": kind for key, kind in kinds.items()}


# --- the average of the parameters


class ParameterAverage:
    """An exponential moving average of a model's parameters, on the CPU in FP32.

    V3 has one to estimate the model after the decay of the learning rate (report, section 3.2.3). It starts as a copy
    of the parameters. Its decay grows from 0.1 as min(decay, (1 + t) / (10 + t)), so the start is soon forgotten.
    """

    def __init__(self, named: Named, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in named}

    @torch.no_grad()
    def update(self, named: Named) -> None:
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
