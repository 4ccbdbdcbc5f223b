"""Muon on ranks that hold the same matrices: each rank owns some of them, moves them, and sends them to the others.

    owner        momentum, orthogonalisation and step of its matrices, or stacks of experts
    all-gather   of the matrices as they are afterwards

Else each rank would orthogonalise all of them, a quarter of a step of the default run. A matrix's momentum is at its
owner alone. All ranks end with the same bits, those of one process.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def owners_of(params: Sequence[Tensor], n: int) -> list[int]:
    """Return the owner of each parameter among n ranks, so that the work is as equal as whole parameters allow.

    The work of a matrix [o, i] is o i min(o, i).
    """
    work = [p.numel() * min(p.shape[-2:]) for p in params]
    loads, owners = [0] * n, [0] * len(params)
    for j in sorted(range(len(params)), key=lambda j: (-work[j], j)):
        owners[j] = min(range(n), key=lambda rank: (loads[rank], rank))
        loads[owners[j]] += work[j]
    return owners


@torch.no_grad()
def exchange_owned(params: Sequence[Tensor], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Give all ranks of a group each parameter as its owner has it. All call it together."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    by_owner = [[p for p, owner in zip(params, owners, strict=True) if owner == number] for number in range(n)]
    sizes = [sum(p.numel() for p in of) for of in by_owner]
    if not max(sizes):
        return
    sent = params[0].new_empty(max(sizes))
    if by_owner[rank]:
        torch.cat([p.detach().flatten() for p in by_owner[rank]], out=sent[: sizes[rank]])
    came = [torch.empty_like(sent) for _ in range(n)]
    dist.all_gather(came, sent, group=group)
    for number, of in enumerate(by_owner):
        if number != rank:
            for p, moved in zip(of, came[number][: sizes[number]].split([p.numel() for p in of]), strict=True):
                p.detach().view(-1).copy_(moved)
