"""The experts that each rank holds, and the rank that computes a visit.

Without a placement, rank r of n holds experts r e/n ... (r + 1) e/n - 1 of each layer. A placement names the expert of
each place of a layer, redundant copies included; of P places, rank r has r P/n ... (r + 1) P/n - 1. Two copies on one
rank are held once. The copies of an expert take turns: visit number j of token t goes to copy (t + j) mod copies. All
ranks compute that alike, and send no word about it.

Source: DeepSeek-V3 report, section 3.4 (redundant experts).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dsmini.nn import Transformer
from dsmini.nn.experts import Experts


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertHolders:
    """The ranks that hold each expert of a layer."""

    held: tuple[tuple[int, ...], ...]
    """Experts of each rank, ascending."""
    ranks: Int[Tensor, "e most"]
    """Ranks that hold each expert, ascending, then -1 up to the largest number of copies."""
    copies: Int[Tensor, " e"]
    """Number of ranks that hold each expert."""

    @classmethod
    def of_places(cls, places: Sequence[int], n_ranks: int, n_experts: int) -> "ExpertHolders":
        """Return the holders of a layer's experts, from the expert of each place."""
        each = len(places) // n_ranks
        held = tuple(tuple(sorted(set(places[r * each : (r + 1) * each]))) for r in range(n_ranks))
        ranks = [[rank for rank, own in enumerate(held) if expert in own] for expert in range(n_experts)]
        most = max(map(len, ranks))
        return cls(
            held=held,
            ranks=torch.tensor([of + [-1] * (most - len(of)) for of in ranks]),
            copies=torch.tensor([len(of) for of in ranks]),
        )

    def rank_of_visits(self, indices: Int[Tensor, "n k"]) -> Int[Tensor, "n k"]:
        """Return the rank that computes each visit."""
        if self.ranks.shape[1] == 1:
            return self.ranks.to(indices.device)[indices, 0]
        n, k = indices.shape
        turn = torch.arange(n, device=indices.device)[:, None] + torch.arange(k, device=indices.device)
        return self.ranks.to(indices.device)[indices, turn % self.copies.to(indices.device)[indices]]

    def writer(self, expert: int) -> int:
        """Return the rank that writes an expert into a file."""
        return int(self.ranks[expert, expert % int(self.copies[expert])])


def layers_of_holders(
    model: Transformer, n_ranks: int, placement: Sequence[Sequence[int]] | None
) -> list[ExpertHolders]:
    """Return the holders of each layer with experts, in the order of the model's modules (MTP blocks last).

    Args:
        model: may be on the meta device.
        placement: expert at each place, [layers, places]. None: experts in order, each once.

    Raises: ValueError for a model without experts, and for ranks or a placement that do not fit it.
    """
    layers, e = sum(isinstance(module, Experts) for module in model.modules()), model.config.n_routed_experts
    if not layers:
        raise ValueError(
            f"the model has no experts to divide among {n_ranks} processes; start one process, without torchrun"
        )
    if placement is None:
        if n_ranks > e:
            raise ValueError(f"there are {n_ranks} processes for {e} experts; start at most {e}")
        if e % n_ranks:
            fit = max(n for n in range(1, n_ranks) if e % n == 0)
            raise ValueError(f"{e} experts are not divisible by {n_ranks} processes; start {fit}, say")
        placement = [range(e)] * layers
    else:
        check_placement(placement, layers, e, n_ranks)
    return [ExpertHolders.of_places(places, n_ranks, e) for places in placement]


def check_placement(placement: Sequence[Sequence[int]], layers: int, n_experts: int, n_ranks: int) -> None:
    """Raise ValueError unless a placement has a row for each layer, places for each rank, and every expert."""
    if len(placement) != layers:
        raise ValueError(
            f"the placement has {len(placement)} layers, and the model has {layers} with experts, MTP blocks included; "
            "make it from loads of this model"
        )
    for layer, places in enumerate(placement):
        where = f"layer {layer} of the placement"
        if len(places) % n_ranks or not places:
            raise ValueError(
                f"{where} has {len(places)} places, not divisible by {n_ranks} processes; use a multiple of {n_ranks}"
            )
        if strange := [expert for expert in places if not 0 <= expert < n_experts]:
            raise ValueError(f"{where} names expert {strange[0]}; the model has experts 0 to {n_experts - 1}")
        if missing := set(range(n_experts)) - set(places):
            raise ValueError(f"{where} has no place for expert {min(missing)}; give each expert one or more")
