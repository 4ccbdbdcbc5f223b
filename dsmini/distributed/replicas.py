"""Silent corruption: compare bit for bit what several ranks hold alike, and name the rank that differs.

A bit that flips in the memory of one rank raises no error. Its parameters then differ from those of the others, and
every step spreads that into their gradients. A hash of each rank's bits shows it: two sums of the words of a tensor,
one of them weighted by the place. A single flipped bit always changes the first.

With three ranks or more the one that is alone is named; of two, both are.

What only one rank computes has no replica to compare: divided parameters (parallel.zero), and the matrices that Muon
moves at their owner and then sends to all. A bit that flips there is adopted by all.

Source: Llama 3 report, section 3.3.4 (silent data corruption was the cause of 6 of 419 interruptions).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmini.distributed.world import World

PRIME = 65_521
"""The weights of places repeat after this many words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """Tensors that several ranks hold alike."""

    holders: tuple[int, ...]
    """The ranks that hold them, this one included."""
    named: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnequalReplicas:
    """The first tensor that ranks hold unequally."""

    name: str
    ranks: tuple[int, ...]
    """The ranks that differ from most, or all that hold it where there is no majority."""
    majority: bool

    def __str__(self) -> str:
        """Return the finding in words."""
        ranks = ", ".join(map(str, self.ranks))
        if not self.majority:
            return f"ranks {ranks} hold unequal copies of {self.name}"
        return f"ranks {ranks} differ in {self.name}" if len(self.ranks) > 1 else f"rank {ranks} differs in {self.name}"


def unequal_replicas(world: World, replicas: Iterable[Replica]) -> UnequalReplicas | None:
    """Return what is unequal, the same on all ranks; None if nothing is. All ranks call it together."""
    mine = {(replica.holders, name): hashed(t) for replica in replicas for name, t in replica.named.items()}
    everyone = world.gather(mine)
    for holders, name in sorted({key for of_rank in everyone for key in of_rank}):
        # the momentum of a matrix is at one of the ranks alone
        hashes = {rank: value for rank in holders if (value := everyone[rank].get((holders, name))) is not None}
        if len(set(hashes.values())) == 1:
            continue
        (most, count), *_ = Counter(hashes.values()).most_common()
        majority = 2 * count > len(hashes)
        ranks = tuple(rank for rank, value in hashes.items() if value != most or not majority)
        return UnequalReplicas(name=name, ranks=ranks, majority=majority)
    return None


@torch.no_grad()
def hashed(tensor: Tensor) -> int:
    """Return a hash of a tensor's bits, of 128 bits."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.int32).to(torch.int64)
    places = torch.arange(1, len(flat) + 1, device=flat.device) % PRIME
    plain, weighted = int(flat.sum()), int((flat * places).sum())
    return (plain % 2**64) << 64 | weighted % 2**64
