"""Muon on ranks that hold the same matrices: each rank owns some of them, moves them, and sends them to the others.

    sum_gradients       sums of gradients, each at the owner alone: half of the bytes that sums for all ranks take
    owner               momentum, orthogonalisation and step of its matrices, or stacks of experts
    exchange            the matrices as they are afterwards, for all

Else each rank would orthogonalise all of them, a quarter of a step of the default run. A matrix's momentum is at its
owner alone. All ranks end with the same bits, those of one process.

Both send by all-to-all: with gloo on one machine it takes half of the time of an all-gather of as many bytes.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


class SharedMatrices:
    """Matrices that the ranks of a group hold alike. All ranks call the methods together.

    The messages stay in memory: new pages for each would take as long as sending them.
    """

    def __init__(self, params: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.params, self.group = list(params), group
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.owners = owners_of(params, self.n)
        self.going, self.coming = torch.empty(0), torch.empty(0)

    @property
    def own(self) -> list[nn.Parameter]:
        """The matrices that this rank owns."""
        return self._by_owner(self.params)[self.rank]

    def _by_owner(self, params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        owner = dict(zip(self.params, self.owners, strict=True))
        return [[p for p in params if owner[p] == number] for number in range(self.n)]

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Sum the gradients over the ranks, in their order. Only the owner has one afterwards, the sum."""
        params = [p for p in self.params if p.grad is not None]
        by_owner = self._by_owner(params)
        sizes = [_numbers(of) for of in by_owner]
        if self.n == 1 or not any(sizes):
            return
        own = by_owner[self.rank]
        going, coming = self._messages(params[0], sum(sizes), self.n * sizes[self.rank])
        torch.cat([p.grad.reshape(-1) for of in by_owner for p in of if p.grad is not None], out=going)
        dist.all_to_all_single(coming, going, [sizes[self.rank]] * self.n, sizes, group=self.group)
        total, *others = coming.view(self.n, -1)
        for part in others:
            total += part
        for p in params:
            p.grad = None
        for p, grad in zip(own, total.split([p.numel() for p in own]), strict=True):
            p.grad = grad.view_as(p)

    @torch.no_grad()
    def exchange(self) -> None:
        """Give all ranks each matrix as its owner has it."""
        by_owner = self._by_owner(self.params)
        sizes = [_numbers(of) for of in by_owner]
        if self.n == 1 or not any(sizes):
            return
        to_each = [0 if number == self.rank else sizes[self.rank] for number in range(self.n)]
        from_each = [0 if number == self.rank else size for number, size in enumerate(sizes)]
        going, coming = self._messages(self.params[0], sum(to_each), sum(from_each))
        if sizes[self.rank]:
            for copy in going.view(self.n - 1, -1):
                torch.cat([p.view(-1) for p in by_owner[self.rank]], out=copy)
        dist.all_to_all_single(coming, going, from_each, to_each, group=self.group)
        others = [p for number, of in enumerate(by_owner) if number != self.rank for p in of]
        for p, values in zip(others, coming.split([p.numel() for p in others]), strict=True):
            p.view(-1).copy_(values)

    def _messages(self, like: Tensor, going: int, coming: int) -> tuple[Tensor, Tensor]:
        """Return the memory of the messages to the others and from them, of so many numbers."""
        if len(self.going) < going or len(self.coming) < coming:
            self.going, self.coming = like.new_empty(going), like.new_empty(coming)
        return self.going[:going], self.coming[:coming]


def _numbers(params: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in params)
