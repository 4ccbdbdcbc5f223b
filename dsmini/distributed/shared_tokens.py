"""Experts divided among ranks that all have the same tokens, as in decoding with several processes.

Every rank runs the same sequences through attention, gates and shared experts. It computes the visits to
its own routed experts, and the weighted sums are added over the ranks:

    1. the visits of own experts, a part of the n k           every rank knows them: the gates agree
    2. run the experts on their rows, weight them, sum by token                                    [n, m] FP32
    3. all-reduce of that sum, shared experts meanwhile                                            4 n m bytes

The exchange of training (`ExpertExchange`) would send each row to its expert and its result back: from n ranks with
equal tokens that is n times the products and, where every rank sends all its visits, k rows there and k back. It fits
ranks with tokens of their own. Measured with two processes of one thread, 32 experts of 512 x 256 and 4 visits each:
the sum takes 3.7 ms for 1 token and 23 ms for 256, the exchange 6.1 ms and 38 ms.

The sums over the ranks have another order of additions than one process, and are the same bits on all ranks. So with
equal machines, threads and seeds all ranks draw the same tokens. `Agreement` compares them after each step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.distributed.expert_shares import ExpertHolders, layers_of_holders
from dsmini.distributed.meeting import told
from dsmini.distributed.world import World
from dsmini.functional.experts import rows_of
from dsmini.nn import Transformer
from dsmini.nn.experts import Experts
from dsmini.nn.gate import Routing
from dsmini.nn.moe import MoE

Visits = Any
"""Tokens [n, m]: a tensor, or a QuantizedTensor."""


class ExpertShare:
    """The share of each layer's experts that a rank holds of a model. Loaders call it as a `Holding`.

    Args:
        placement: expert at each place, [layers, places], redundant copies included; None: each expert once.
    """

    def __init__(self, world: World, placement: Sequence[Sequence[int]] | None = None) -> None:
        self.world, self.placement = world, placement
        self.computed = self.wanted = 0
        """Number of visits that this rank computed, and that all ranks together had to."""

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

    def __call__(
        self, experts: nn.Module, shared: nn.Module | None, x: Visits, routing: Routing
    ) -> Float[Tensor, "n m"]:
        """Return the sum of each token's experts, routed and shared, as MoE does.

        Raises: ValueError while gradients are recorded: backward would not sum them over the ranks.
        """
        if torch.is_grad_enabled():
            raise ValueError(
                "the experts of this model are divided for inference, where no gradient passes; use torch.no_grad()"
            )
        assert isinstance(experts, Experts)
        mine = self.holders.rank_of_visits(routing.indices) == self.rank
        y = self._own(experts, x, routing, mine)
        work: Any = dist.all_reduce(y, async_op=True)
        y_shared = None if shared is None else shared(x)
        work.wait()
        y = y.to(x.dtype)
        return y if y_shared is None else y + y_shared

    def _own(self, experts: Experts, x: Visits, routing: Routing, mine: Tensor) -> Float[Tensor, "n m"]:
        """Return the FP32 sums of this rank's visits."""
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


def holders_of(model: Transformer) -> dict[str, ExpertHolders]:
    """Return the holders of the experts of each layer that the ranks divide, by the name of the experts' module."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    return {
        f"{name}.experts": moe.exchange.holders
        for name, moe in layers.items()
        if isinstance(moe.exchange, SharedTokens)
    }


class Agreement:
    """A comparison of the ranks after each step of a generation, in one small message.

    They must have drawn the same tokens and lost no visit. A signal that asked one to stop stops all.

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
