"""Muon's update of matrices: momentum, a few iterations towards the polar factor, and the step.

An iteration changes singular values only. Newton-Schulz's X <- a X + b (X X^T) X + c (X X^T)^2 X makes each s
a s + b s^3 + c s^5; Halley's X <- (a + b X X^T) (1 + c X X^T)^-1 X makes it s (a + b s^2) / (1 + c s^2). A few of them
bring all singular values near 1. `muon_update` moves whole matrices, `muon_update_divided` those divided by FSDP2 too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsmini import ops
from dsmini.distributed.mesh import broadcast, first_row, gathered, local, owners_of


class NewtonSchulz(NamedTuple):
    """Coefficients (a, b, c) of each iteration."""

    coefficients: tuple[tuple[float, float, float], ...]
    rational: bool = False
    """They are Halley's."""


JORDAN = NewtonSchulz(((3.4445, -4.7750, 2.0315),) * 5)
"""Jordan's quintic five times: singular values above 1/500 of the Frobenius norm end between 0.68 and 1.21.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
"""


def _weighted_halley(low: float, steps: int) -> NewtonSchulz:
    """Return the Halley iterations that are closest to 1 on [low, 1], each on the interval that the one before leaves.

    Source: Nakatsukasa, Bai and Gygi 2010, Optimizing Halley's iteration for computing the matrix polar decomposition.
    """
    coefficients = []
    for _ in range(steps):
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = (1 + d) ** 0.5 + (8 - 4 * d + 8 * (2 - low**2) / (low**2 * (1 + d) ** 0.5)) ** 0.5 / 2
        b = (a - 1) ** 2 / 4
        coefficients.append((a, b, a + b - 1))
        low *= (a + b * low**2) / (1 + (a + b - 1) * low**2)
    return NewtonSchulz(tuple(coefficients), rational=True)


HALLEY = _weighted_halley(1e-3, steps=2)
"""Singular values above a thousandth of the Frobenius norm end between 0.96 and 1, but for roundings of 1e-5 in FP32,
in half the time of JORDAN in its kernel."""
V4 = NewtonSchulz(JORDAN.coefficients[:1] * 8 + ((2.0, -1.5, 0.5),) * 2)
"""V4's ten: Jordan's eight times, then two that end at 1. Singular values above 2.4e-5 of the Frobenius norm end within
1 %, those above a thousandth within 0.06 %. Smaller ones are magnified up to 79,000 times, rounding errors with them.

Source: DeepSeek-V4 report (arXiv 2606.19348), algorithm 1.
"""
NEWTON_SCHULZ = MappingProxyType({"jordan": JORDAN, "halley": HALLEY, "v4": V4})
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


def orthogonalize(g: Float[Tensor, "b o i"], steps: NewtonSchulz = HALLEY) -> Float[Tensor, "b o i"]:
    """Compute about U V^T for each matrix U S V^T in g: Newton-Schulz in g's dtype, Halley in FP32 or FP64.

    A small singular value is multiplied by at most the product of all a, Jordan's by 3.4445^5 = 485. So some do not
    reach 1. A matrix of zeros stays one.
    """
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    if steps.rational:
        x = _halley(x.to(torch.promote_types(x.dtype, torch.float32)), steps).to(x.dtype)
    else:
        for a, b, c in steps.coefficients:
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _halley(x: Float[Tensor, "b o i"], steps: NewtonSchulz) -> Float[Tensor, "b o i"]:
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for a, b, c in steps.coefficients:
        # (a + b S) (1 + c S)^-1 = b/c + (a - b/c) (1 + c S)^-1
        root = _inverse_root(one + c * (x @ x.mT))
        x = b / c * x + (a - b / c) * (root.mT @ root @ x)
    return x


def _inverse_root(square: Float[Tensor, "b o o"]) -> Float[Tensor, "b o o"]:
    """Return L^-1 of the Cholesky factor L of each positive definite matrix, L L^T.

    On a CPU larger matrices are cut in halves, and their parts multiplied: torch factors the matrices of a stack there
    one by one, but multiplies all of them at once. Elsewhere each call is one for the whole stack.
    """
    half = square.shape[1] // 2
    if half < 16 or not square.is_cpu:
        one = torch.eye(square.shape[1], dtype=square.dtype, device=square.device)
        return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(square)[0], one, upper=False)
    first = _inverse_root(square[:, :half, :half])
    below = square[:, half:, :half] @ first.mT
    second = _inverse_root(square[:, half:, half:] - below @ below.mT)
    rows = torch.cat((first, torch.zeros_like(below).mT), -1), torch.cat((-(second @ (below @ first)), second), -1)
    return torch.cat(rows, 1)


@torch.no_grad()
def muon_update_divided(matrices: MuonMatrices, steps: NewtonSchulz, **options: Any) -> None:
    """Compute `muon_update` of matrices that FSDP2 may divide. All ranks that share one call it together.

    Args:
        options: those of muon_update.
    """
    every = list(zip(matrices.params, matrices.grads, matrices.momenta, strict=True))
    divided = [of for of in every if isinstance(of[0], DTensor) and of[0].dim() == 2]
    here = [tuple(map(local, of)) for of in every if not isinstance(of[0], DTensor) or of[0].dim() > 2]
    if here := [of for of in here if of[0].numel()]:
        params, grads, momenta = (list(of) for of in zip(*here, strict=True))
        whole = MuonMatrices(params=params, grads=grads, momenta=momenta)
        muon_update(whole, steps, **options)
    if not divided:
        return
    # 1. Nesterov's mean of the own rows, and of all rows from all ranks
    first_one: Any = divided[0][0]
    wholes, group, momentum = [], first_one.device_mesh.get_group(), options["momentum"]
    for p, grad, m in divided:
        local(m).lerp_(local(grad), 1 - momentum)
        wholes.append(gathered(local(grad).lerp(local(m), momentum), p))
    # 2. the step of each matrix at its owner: without a momentum of its own, the update is the matrix that it gets
    moves = {whole: torch.zeros_like(whole) for whole in wholes}
    owned = owners_of(wholes, dist.get_world_size(group))
    if own := owned[dist.get_rank(group)]:
        scratch = MuonMatrices(
            params=[moves[whole] for whole in own], grads=own, momenta=[torch.zeros_like(whole) for whole in own]
        )
        alone: dict[str, Any] = options | {"momentum": 0.0, "weight_decay": 0.0}
        muon_update(scratch, steps, **alone)
    broadcast([[moves[whole] for whole in of] for of in owned], group)
    # 3. the own rows of each step
    for (p, _, _), whole in zip(divided, wholes, strict=True):
        first, rows = first_row(p), local(p)
        rows.mul_(1 - options["lr"] * options["weight_decay"]).add_(moves[whole][first : first + len(rows)])
