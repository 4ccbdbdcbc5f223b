"""Muon's update of matrices: momentum, Newton-Schulz iterations, and the step.

A Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X changes singular values only: each s becomes
a s + b s^3 + c s^5. A few of them bring all singular values near 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dsmini import ops


class NewtonSchulz(NamedTuple):
    """Coefficients (a, b, c) of each iteration, and the first division of X."""

    coefficients: tuple[tuple[float, float, float], ...]
    by_gram: bool = False
    """X is divided by the root of the Frobenius norm of X X^T, which is closer to the largest singular value than
    the Frobenius norm of X itself, and never below it."""


JORDAN = NewtonSchulz(((3.4445, -4.7750, 2.0315),) * 5)
"""Jordan's quintic five times: singular values above 1/500 of the Frobenius norm end between 0.68 and 1.21.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
"""

MIN_SIGMA, SAFETY = 0.003, 1.01
"""Smallest singular value that POLAR_EXPRESS brings near 1, and the room that it leaves for rounding above 1."""
POLAR_EXPRESS = NewtonSchulz(
    (
        (8.300667, -24.037544, 17.466134),
        (4.003387, -2.922840, 0.541871),
        (3.470862, -2.549404, 0.500204),
        (2.490116, -1.834275, 0.436835),
    ),
    by_gram=True,
)
"""The odd quintics that are closest to 1, each on the interval that the one before leaves; the first on [MIN_SIGMA, 1].

All but the last take x / SAFETY: beyond its interval a polynomial grows steeply. Singular values from MIN_SIGMA on end
between 0.79 and 1.21. tests/functional/test_muon.py checks that no others are closer.

Source: Amsel et al. 2025, arXiv 2505.16932, theorem 3.1 and section 3.4. The division by the Gram matrix is ours.
"""
NEWTON_SCHULZ = MappingProxyType({"jordan": JORDAN, "polar-express": POLAR_EXPRESS})
"""The choices of train.newton_schulz."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MuonMatrices:
    """Parameters [o, i] or stacks [e, o, i] of one size, tall or wide, with their gradients and momenta."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momenta: Sequence[Tensor]

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.params, *self.grads, *self.momenta)


@ops.operation("muon_update")
def muon_update(
    matrices: MuonMatrices,
    steps: NewtonSchulz,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    matmul_dtype: torch.dtype,
) -> None:
    """Move each matrix [o, i] by -lr sqrt(max(1, o/i)) times its orthogonalised Nesterov momentum, in place.

    momentum <- mu momentum + (1 - mu) gradient. The orthogonalised matrix is mu momentum + (1 - mu) gradient.
    In a stack a matrix whose gradient is zero only decays.

    Args:
        matmul_dtype: dtype of the products.
    """
    for stack, grads, momenta in zip(matrices.params, matrices.grads, matrices.momenta, strict=True):
        size = stack.shape[-2:]
        every = zip(stack.view(-1, *size), grads.reshape(-1, *size), momenta.view(-1, *size), strict=True)
        for p, grad, m in every:
            m.copy_(momentum * m + (1 - momentum) * grad)
            p.mul_(1 - lr * weight_decay)
            if stack.dim() == 2 or grad.any():
                update = momentum * m + (1 - momentum) * grad
                direction = orthogonalize(update[None].to(matmul_dtype), steps)[0]
                p.add_(direction.to(p.dtype), alpha=-lr * max(1, size[0] / size[1]) ** 0.5)


@ops.eager("muon_update")
def _(
    matrices: MuonMatrices,
    steps: NewtonSchulz,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    matmul_dtype: torch.dtype,
) -> None:
    params, grads, momenta = list(matrices.params), list(matrices.grads), list(matrices.momenta)
    torch._foreach_lerp_(momenta, grads, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
    nesterov = torch._foreach_lerp(grads, momenta, momentum)  # pyright: ignore[reportPrivateImportUsage]
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)  # pyright: ignore[reportPrivateImportUsage]
    wide: list[Tensor] = []
    for p, grad, update in zip(params, grads, nesterov, strict=True):
        if p.dim() > 2:
            update *= grad.flatten(-2).any(-1)[..., None, None]
        each = update.to(matmul_dtype).reshape(-1, *p.shape[-2:])
        wide.append(each if p.shape[-2] <= p.shape[-1] else each.mT)
    orthogonal = orthogonalize(torch.cat(wide), steps).split([len(each) for each in wide])
    for p, update in zip(params, orthogonal, strict=True):
        o, i = p.shape[-2:]
        step = (update if o <= i else update.mT).reshape(p.shape)
        p.add_(step.to(p.dtype), alpha=-lr * max(1, o / i) ** 0.5)


def orthogonalize(g: Float[Tensor, "b o i"], steps: NewtonSchulz = JORDAN) -> Float[Tensor, "b o i"]:
    """Compute about U V^T for each matrix U S V^T in g, by Newton-Schulz iterations in g's dtype.

    A small singular value is multiplied by at most the product of all a, Jordan's by 3.4445^5 = 485. So some do not
    reach 1. A matrix of zeros stays one.
    """
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for k, (a, b, c) in enumerate(steps.coefficients):
        square = x @ x.mT
        if k == 0 and steps.by_gram:
            size = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True)
            size = torch.where(size > 0, size, 1)
            x, square = x / size.sqrt(), square / size
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
