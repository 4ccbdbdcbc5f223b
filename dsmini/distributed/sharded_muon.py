"""Muon on matrices whose rows are divided among ranks: gather each at one owner, orthogonalise once, send rows back.

    each rank    momentum and Nesterov's mean of its own rows
    all-to-all   rows of matrix j to its owner, rank j mod n
    owner        the whole matrix's step
    all-to-all   rows of the step back
    each rank    adds its rows

A stack of experts is divided by experts, whole matrices, which move where they are.

Source: Liu et al. 2025, arXiv 2502.16982, section 2.3 (distributed Muon, there with ZeRO-1).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsmini.distributed.data_parallel import local
from dsmini.functional.muon import MuonMatrices, NewtonSchulz, muon_update

Matrix = tuple[Tensor, Tensor, Tensor]
"""A parameter, its gradient and its momentum."""


@torch.no_grad()
def muon_update_divided(
    matrices: MuonMatrices,
    steps: NewtonSchulz,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    matmul_dtype: torch.dtype,
) -> None:
    """Compute `muon_update` of matrices that may be divided by FSDP2. All ranks call it with the same matrices."""
    here: list[Matrix] = []
    divided: list[Matrix] = []
    for p, grad, m in zip(matrices.params, matrices.grads, matrices.momenta, strict=True):
        if isinstance(p, DTensor) and p.dim() == 2:
            divided.append((p, grad, m))
        elif local(p).numel():
            here.append((local(p), local(grad), local(m)))
    if here:
        params, grads, momenta = (list(of) for of in zip(*here, strict=True))
        whole = MuonMatrices(params=params, grads=grads, momenta=momenta)
        muon_update(whole, steps, lr=lr, momentum=momentum, weight_decay=weight_decay, matmul_dtype=matmul_dtype)
    if divided:
        rows = [_nesterov(local(grad), local(m), momentum) for _, grad, m in divided]
        moved = _through_owners([p for p, _, _ in divided], rows, steps, lr, matmul_dtype)
        for (p, _, _), step in zip(divided, moved, strict=True):
            local(p).mul_(1 - lr * weight_decay).add_(step)


def _nesterov(grad: Tensor, m: Tensor, momentum: float) -> Tensor:
    """Move a momentum, and return Nesterov's mean of it and the gradient."""
    m.lerp_(grad, 1 - momentum)
    return grad.lerp(m, momentum)


def _through_owners(
    params: Sequence[Tensor], rows: Sequence[Tensor], steps: NewtonSchulz, lr: float, matmul_dtype: torch.dtype
) -> list[Tensor]:
    """Return this rank's rows of every matrix's step, which the matrix's owner computes."""
    mesh = params[0].device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    group, n, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    owned = [list(range(owner, len(params), n)) for owner in range(n)]
    sizes = [[_rows_of_rank(p, source, n) * p.shape[1] for p in params] for source in range(n)]
    mine, order = owned[rank], [j for of_owner in owned for j in of_owner]
    send = [sum(sizes[rank][j] for j in of_owner) for of_owner in owned]
    receive = [sum(sizes[source][j] for j in mine) for source in range(n)]
    came = _all_to_all(torch.cat([rows[j].flatten() for j in order]), send, receive, group)
    by_source = [
        part.split([sizes[source][j] for j in mine]) if mine else () for source, part in enumerate(came.split(receive))
    ]
    wholes = [torch.cat([part[k] for part in by_source]).view(params[j].shape) for k, j in enumerate(mine)]
    moves = [torch.zeros_like(whole) for whole in wholes]
    if mine:  # without a momentum of its own, the update is the matrix that it gets
        scratch = MuonMatrices(params=moves, grads=wholes, momenta=[torch.zeros_like(whole) for whole in wholes])
        muon_update(scratch, steps, lr=lr, momentum=0.0, weight_decay=0.0, matmul_dtype=matmul_dtype)
    places = [[sum(sizes[s][j] for s in range(source)) for j in mine] for source in range(n)]
    back = [
        move.flatten()[places[source][k] :][: sizes[source][j]]
        for source in range(n)
        for k, (j, move) in enumerate(zip(mine, moves, strict=True))
    ]
    moved = _all_to_all(torch.cat(back) if back else came[:0], receive, send, group)
    pieces = dict(zip(order, moved.split([sizes[rank][j] for j in order]), strict=True))
    return [pieces[j].view_as(rows[j]) for j in range(len(params))]


def _rows_of_rank(parameter: Tensor, rank: int, n: int) -> int:
    each = -(-parameter.shape[0] // n)
    return max(0, min(each, parameter.shape[0] - rank * each))


def _all_to_all(sent: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = sent.new_empty(sum(receive))
    dist.all_to_all_single(out, sent.contiguous(), receive, send, group=group)
    return out
