"""Muon, the optimizer of the matrices inside the blocks.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) turns a matrix's momentum into the nearest matrix whose
singular values are all 1, so that no direction of the update is lost next to a few large ones.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Jordan's quintic: its steps do not converge to 1, they spread every singular value over about 0.7 to 1.2, quickly.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(Optimizer):
    """Momentum, orthogonalised: each matrix [o, i] moves by -lr sqrt(max(1, o/i)) times the matrix nearest to its
    (Nesterov) momentum with singular values of about 1. A stack [e, o, i] is e matrices.

    momentum <- mu momentum + (1 - mu) gradient. The orthogonalised matrix is mu momentum + (1 - mu) gradient.
    Weight decay is decoupled and multiplied by lr. Matrices of one size, tall or wide, are iterated on together.

    Only directions count, not sizes. The rest of the momentum of an expert that no token visited would become a whole
    step. So in a stack a matrix whose gradient is zero only decays (docs/log.md).

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
    """Compute about U V^T for each matrix U S V^T in g [b, o, i], by Newton-Schulz iteration in g's dtype.

    Singular values below about 1/1000 of the matrix's Frobenius norm do not reach 1: five steps multiply a small one
    by at most 3.4445^5 = 485. A matrix of zeros stays one.
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
