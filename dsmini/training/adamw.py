"""AdamW with moments in BF16."""

from typing import Any

import torch
from torch.optim import Optimizer


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
