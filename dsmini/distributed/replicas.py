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
from collections.abc import Mapping

import torch
from torch import Tensor

from dsmini.distributed.world import World

PRIME = 65_521
"""The weights of places repeat after this many words."""


def unequal_replicas(world: World, held: Mapping[tuple[int, ...], Mapping[str, Tensor]]) -> tuple[list[int], str]:
    """Return the ranks that hold a tensor unequally, and the finding in words; none and "" if nothing is unequal.

    Args:
        held: tensors that several ranks hold alike, by those ranks and by name.
    """
    mine = {(holders, name): hashed(t) for holders, named in held.items() for name, t in named.items()}
    everyone = world.gather(mine)
    for holders, name in sorted({key for of_rank in everyone for key in of_rank}):
        # the momentum of a matrix is at one of the ranks alone
        hashes = {rank: value for rank in holders if (value := everyone[rank].get((holders, name))) is not None}
        (most, count), *others = Counter(hashes.values()).most_common()
        if others and 2 * count > len(hashes):
            ranks = [rank for rank, value in hashes.items() if value != most]
            words = f"ranks {', '.join(map(str, ranks))} differ" if ranks[1:] else f"rank {ranks[0]} differs"
            return ranks, f"{words} in {name}"
        if others:
            return list(hashes), f"ranks {', '.join(map(str, hashes))} hold unequal copies of {name}"
    return [], ""


@torch.no_grad()
def hashed(tensor: Tensor) -> int:
    """Return a hash of a tensor's bits, of 128 bits."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.int32).to(torch.int64)
    places = torch.arange(1, len(flat) + 1, device=flat.device) % PRIME
    plain, weighted = int(flat.sum()), int((flat * places).sum())
    return (plain % 2**64) << 64 | weighted % 2**64
