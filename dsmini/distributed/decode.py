"""Experts divided among ranks that all have the same tokens, as in decoding with several processes.

Every rank runs the same sequences through attention, gates and shared experts. It computes the token-expert pairs of
its own routed experts, and the weighted sums are added over the ranks:

    1. the pairs of own experts, a part of the n k            every rank knows them: the gates agree
    2. run the experts on their rows, weight them, sum by token                                    [n, m] FP32
    3. all-reduce of that sum, shared experts meanwhile                                            4 n m bytes

The exchange of training (`ExpertExchange`) would send each row to its expert and its result back: from n ranks with
equal tokens that is n times the products. It fits ranks with tokens of their own.

Rank r of n holds experts r e/n ... (r + 1) e/n - 1 of each layer, or what a placement says: of its P places of a layer,
rank r has r P/n ... (r + 1) P/n - 1. The copies of an expert take turns: pair number j of token t goes to copy (t + j)
mod copies. All ranks compute that alike, and send no word about it (DeepSeek-V3 report, section 3.4).

The sums over the ranks have another order of additions than one process, and are the same bits on all ranks. So with
equal machines, threads and seeds all ranks draw the same tokens. `Agreement` compares them after each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.distributed.meeting import told
from dsmini.distributed.world import World
from dsmini.nn import Transformer
from dsmini.nn.gate import Routing
from dsmini.nn.moe import Experts, MoE
from dsmini.numerics import rows_of

Rows = Any
"""Tokens [n, m]: a tensor, or a QuantizedTensor."""


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

    def rank_of_pairs(self, indices: Int[Tensor, "n k"]) -> Int[Tensor, "n k"]:
        """Return the rank that computes each token-expert pair."""
        if self.ranks.shape[1] == 1:
            return self.ranks.to(indices.device)[indices, 0]
        n, k = indices.shape
        turn = torch.arange(n, device=indices.device)[:, None] + torch.arange(k, device=indices.device)
        return self.ranks.to(indices.device)[indices, turn % self.copies.to(indices.device)[indices]]


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


class ExpertShare:
    """The share of each layer's experts that a rank holds of a model. Loaders call it as a `Holding`.

    Args:
        placement: expert at each place, [layers, places], redundant copies included; None: each expert once.
    """

    def __init__(self, world: World, placement: Sequence[Sequence[int]] | None = None) -> None:
        self.world, self.placement = world, placement
        self.computed = self.wanted = 0
        """Number of token-expert pairs that this rank computed, and that all ranks together had to."""

    def __call__(self, model: Transformer) -> list[tuple[int, ...]]:
        """Return the experts that this rank holds of each layer.

        Raises: ValueError for a model or a placement that the ranks do not fit.
        """
        return [layer.held[self.world.rank] for layer in layers_of_holders(model, self.world.size, self.placement)]

    def connect(self, model: Transformer) -> None:
        """Let the layers of a model that was loaded with this share sum over the ranks."""
        if self.world.size == 1:
            return
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        for moe, holders in zip(layers, layers_of_holders(model, self.world.size, self.placement), strict=True):
            moe.exchange = SharedTokens(holders, self)


class SharedTokens:
    """The exchange of a MoE layer on ranks that all have the same tokens. All ranks call it together."""

    def __init__(self, holders: ExpertHolders, share: ExpertShare) -> None:
        self.holders, self.share, self.rank = holders, share, share.world.rank
        own = holders.held[self.rank]
        self.row = torch.zeros(len(holders.copies), dtype=torch.int64).index_put(
            (torch.tensor(own),), torch.arange(len(own))
        )
        """Row of each expert in this rank's stacked tensors."""

    def __call__(self, experts: nn.Module, shared: nn.Module | None, x: Rows, routing: Routing) -> Float[Tensor, "n m"]:
        """Return the sum of each token's experts, routed and shared, as MoE does.

        Raises: ValueError while gradients are recorded: backward would not sum them over the ranks.
        """
        if torch.is_grad_enabled():
            raise ValueError(
                "the experts of this model are divided for inference, where no gradient passes; use torch.no_grad()"
            )
        assert isinstance(experts, Experts)
        mine = self.holders.rank_of_pairs(routing.indices) == self.rank
        y = self._own(experts, x, routing, mine)
        work: Any = dist.all_reduce(y, async_op=True)
        y_shared = None if shared is None else shared(x)
        work.wait()
        y = y.to(x.dtype)
        return y if y_shared is None else y + y_shared

    def _own(self, experts: Experts, x: Rows, routing: Routing, mine: Tensor) -> Float[Tensor, "n m"]:
        """Return the FP32 sums of this rank's token-expert pairs."""
        token, choice = mine.nonzero(as_tuple=True)
        self.share.computed += len(token)
        self.share.wanted += mine.numel()
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if not len(token):
            return y
        expert = self.row.to(token.device)[routing.indices[token, choice]]
        weight = routing.weights[token, choice]
        counts = torch.bincount(expert, minlength=experts.w1.shape[0])
        if len(y) == 1:  # decoding one row: its experts' weighted sum is one call
            return experts(x, expert[None], weight[None], counts).float()
        rows = experts(rows_of(x, token), expert[:, None], torch.ones_like(weight)[:, None], counts)
        return y.index_add_(0, token, rows.float() * weight[:, None])


class Agreement:
    """A comparison of the ranks after each step of a generation, in one small message.

    They must have drawn the same tokens and lost no pair. A signal that asked one to stop stops all.

    Args:
        stop: returns True once this rank was asked to stop.
    """

    def __init__(self, world: World, share: ExpertShare, stop: Callable[[], bool]) -> None:
        self.world, self.share, self.stop = world, share, stop

    def __call__(self, picked: Sequence[Sequence[int]]) -> None:
        """Compare the tokens of a step.

        Raises: KeyboardInterrupt on all ranks if one was asked to stop. ValueError on all if they do not agree.
        """
        share, drawn = self.share, hash(tuple(map(tuple, picked)))
        mine = torch.tensor([self.stop(), drawn, share.computed, share.wanted])
        share.computed = share.wanted = 0
        said = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(said, mine)
        stops, *drawn_and_wanted, computed = torch.stack(said)[:, [0, 1, 3, 2]].unbind(1)
        if stops.any():
            raise KeyboardInterrupt
        if any(bool((same != same[0]).any()) for same in drawn_and_wanted) or computed.sum() != mine[3]:
            raise told(
                ValueError(
                    "the processes computed different numbers from the same tokens, so they cannot share a model; "
                    "start all on machines of one kind, with the same number of threads"
                )
            )
