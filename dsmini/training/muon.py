"""Muon, the optimizer of the matrices inside the blocks.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) turns a matrix's momentum into the nearest matrix whose
singular values are all 1, so that no direction of the update is lost next to a few large ones.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dsmini.functional.muon import JORDAN, MuonMatrices, NewtonSchulz, muon_update


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
