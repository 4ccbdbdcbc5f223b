"""The optimizers: AdamW, with moments in FP32 or BF16, and Muon for the matrices inside the blocks; and the average of
the parameters over the steps.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) makes of a matrix's momentum the nearest matrix whose
singular values are all 1, so that no direction of the update is lost beside a few large ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dsmini.config import TrainConfig

# Jordan's quintic: its steps do not converge to 1, they spread every singular value over about 0.7 to 1.2, quickly.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def optimizers(model: nn.Module, config: TrainConfig, matmul_dtype: torch.dtype = torch.float32) -> list[Optimizer]:
    """The optimizers that together move every parameter once. The routing bias is a buffer: it is in none.

    Each group has a "peak_lr", its learning rate at the top of the schedule. Matrices decay; norms and gates do not.

    Args:
        matmul_dtype: of Muon's matrix products.
    """
    named = list(model.named_parameters())
    by_muon = {name for name, p in named if config.optimizer == "muon" and is_inner_matrix(name, p)}
    muon = [p for name, p in named if name in by_muon]
    rest = [(name, p) for name, p in named if name not in by_muon]
    gates = [p for name, p in rest if name.endswith("gate.weight")]
    norms = [p for _, p in rest if p.dim() <= 1]
    matrices = [p for name, p in rest if p.dim() > 1 and not name.endswith("gate.weight")]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "peak_lr": config.lr},
        {"params": norms, "weight_decay": 0.0, "peak_lr": config.lr},
        {"params": gates, "weight_decay": 0.0, "peak_lr": config.gate_lr or config.lr},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    adamw: Optimizer
    if config.moments == "bfloat16":
        adamw = AdamWBF16(groups, lr=config.lr, betas=betas)
    else:
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    if not muon:
        return [adamw]
    inner = {"params": muon, "peak_lr": config.muon_lr, "weight_decay": config.weight_decay}
    return [Muon([inner], lr=config.muon_lr, momentum=config.muon_momentum, matmul_dtype=matmul_dtype), adamw]


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon moves a parameter: a matrix, or a stack of experts' matrices, that maps one hidden state to another.
    Embedding, head and gates are not such."""
    return parameter.dim() > 1 and name not in ("embed.weight", "head.weight") and not name.endswith("gate.weight")


def remembered(optimizers: Iterable[Optimizer], named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What the optimizers remember of each parameter, as PARAMETER/KEY; nothing of one that has not been moved yet."""
    names = {p: name for name, p in named}
    return {
        f"{names[p]}/{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def check_remembered(
    tensors: Mapping[str, Tensor], optimizers: Iterable[Optimizer], named: Iterable[tuple[str, Tensor]]
) -> None:
    """Refuse what `remembered` cannot have given for these optimizers; ValueError names the tensor."""
    names = {p: name for name, p in named}
    unknown = set(tensors)
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            kinds = {f"{names[p]}/{key}": kind for key, kind in _remembers(optimizer, p).items()}
            there = kinds.keys() & tensors.keys()
            unknown -= there
            if there and there != kinds.keys():
                raise ValueError(f"optimizer.safetensors lacks tensor {min(kinds.keys() - there)}")
            for name in sorted(there):
                got, want = (tensors[name].dtype, tensors[name].shape), kinds[name]
                if got != want:
                    raise ValueError(f"optimizer.safetensors: {name} is {_kind(*got)}, want {_kind(*want)}")
    if unknown:
        raise ValueError(f"optimizer.safetensors has an unknown tensor {min(unknown)}")


def remember(
    tensors: Mapping[str, Tensor], optimizers: Iterable[Optimizer], named: Iterable[tuple[str, Tensor]]
) -> None:
    """Go on from what `remembered` gave. Optimizer.load_state_dict would make FP32 of moments in BF16."""
    names = {p: name for name, p in named}
    for optimizer in optimizers:
        optimizer.state.clear()
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            saved = {key: f"{names[p]}/{key}" for key in _remembers(optimizer, p)}
            state = {key: tensors[name] for key, name in saved.items() if name in tensors}
            # a count of steps stays on the CPU, but for the fused AdamW
            fused = optimizer.defaults.get("fused", False)
            if state:
                optimizer.state[p] = {
                    key: value.to(p.device if value.dim() or fused else "cpu", copy=True)
                    for key, value in state.items()
                }


def _remembers(optimizer: Optimizer, p: Tensor) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Dtype and shape of all that an optimizer remembers of a parameter it has moved."""
    if isinstance(optimizer, Muon):
        return {"momentum": (p.dtype, p.shape)}
    moments = torch.bfloat16 if isinstance(optimizer, AdamWBF16) else p.dtype
    return {
        "step": (torch.float32, torch.Size()),
        "exp_avg": (moments, p.shape),
        "exp_avg_sq": (moments, p.shape),
    }


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{dtype} {list(shape)}"


class AdamWBF16(Optimizer):
    """AdamW whose two moments are stored in BF16, computed in FP32. Half the optimizer's memory, as DeepSeek-V3 has it
    (report, section 3.3.3).

    What is stored is rounded, what moves the parameters is not. The rounding errors, of at most u = 2^-8 each, fade as
    the moments do: the second moment is wrong by at most u / (1 - beta2), 8 % at 0.95. With beta2 above 0.998 it would
    never fall again: a step takes away less than BF16's half step.
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

    momentum <- mu momentum + (1 - mu) gradient; what is orthogonalised is mu momentum + (1 - mu) gradient (Nesterov).
    Weight decay is decoupled, by lr times it. Matrices of one size, upright or lying, are iterated on together.

    Only directions count, not sizes: of an expert that no token visited, any remainder of its momentum would become a
    whole step. So in a stack a matrix whose gradient is zero does not move but for its decay (docs/log.md).

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.95, matmul_dtype: torch.dtype = torch.float32
    ) -> None:
        self.matmul_dtype = matmul_dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
            by_size: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p, update in zip(params, nesterov, strict=True):
                if p.dim() > 2:
                    update *= p.grad.flatten(-2).any(-1)[..., None, None]
                matrices = update.reshape(-1, *p.shape[-2:])
                wide = matrices if p.shape[-2] <= p.shape[-1] else matrices.mT
                by_size[wide.shape[-2], wide.shape[-1]].append((p, wide))
            for moves in by_size.values():
                stacked = torch.cat([wide for _, wide in moves])
                orthogonal = orthogonalize(stacked.to(self.matmul_dtype))
                for (p, _), update in zip(moves, orthogonal.split([len(wide) for _, wide in moves]), strict=True):
                    o, i = p.shape[-2:]
                    step = (update if o <= i else update.mT).reshape(p.shape)
                    p.add_(step.to(p.dtype), alpha=-group["lr"] * max(1, o / i) ** 0.5)


def orthogonalize(g: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Of each matrix U S V^T in g [b, o, i], about U V^T, by Newton-Schulz iteration in g's dtype.

    Singular values below some 1/1000 of the matrix's Frobenius norm are still on their way up: five steps multiply
    a small one by at most 3.4445^5 = 485. A matrix of zeros stays one.
    """
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class ParameterAverage:
    """An exponential moving average of a model's parameters, on the CPU in FP32 (V3 keeps one to see the model as it
    will be after the decay; report, section 3.2.3).

    It starts as the parameters are, and its decay grows from 0.1 as min(decay, (1 + t) / (10 + t)), so
    that the start is soon forgotten.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in named}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take one more step's parameters in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, p in named:
            self.tensors[name].lerp_(p.detach().to("cpu", torch.float32), 1 - decay)

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on from what was saved."""
        for name, mean in self.tensors.items():
            mean.copy_(tensors[name])
        self.updates = updates
