"""Expert parallelism: each of ep ranks holds a part of a layer's experts, and tokens travel to their experts.

    rank r of ep holds experts r e/ep ... (r + 1) e/ep - 1; every rank has tokens of its own

    1. sort the visits by expert, so that those of a rank are together            `dispatch` of functional/
    2. tell each rank how many rows it gets for each of its experts               all-to-all of counts, [ep, e/ep]
    3. send the rows: codes and scales in FP8, else in the compute dtype          all-to-all, shared experts meanwhile
    4. run the own experts on what came: a row is one visit, of weight 1
    5. send the results back, in the compute dtype                                all-to-all
    6. weight and sum them by token                                               `combine` of functional/

The rows of an expert come in the order (rank, token), as in one process whose batch is all ranks' batches one after
the other. So each row's result has the same bits. The gradient of an expert is the sum over all these tokens: it needs
no more sum over ep.

Source: DeepSeek-V3 report, sections 3.2.2 and 3.3.3.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.distributed.exchange import Route, RowExchange, SentBytes, exchange_counts, scattered_sum
from dsmini.nn.fp8 import SCALES
from dsmini.nn.gate import Routing
from dsmini.nn.moe import Experts, MoE
from dsmini.numerics import QuantizedTensor, rows_of
from dsmini.numerics.dispatch import combine, dispatch, dispatch_quantized, sort_by_expert

Visits = Any
"""Visits [n, m]: a tensor, or a QuantizedTensor."""


class ExpertExchange:
    """The exchange of a MoE layer whose experts are divided among the ranks of a group. All ranks call it together.

    Args:
        traffic: counts what is sent.
    """

    def __init__(self, group: dist.ProcessGroup, traffic: SentBytes) -> None:
        self.group, self.traffic = group, traffic
        self.size = dist.get_world_size(group)

    def __call__(
        self, experts: nn.Module, shared: nn.Module | None, x: Visits, routing: Routing
    ) -> Float[Tensor, "n m"]:
        """Return the sum of each token's experts, routed and shared, as MoE does."""
        slots = sort_by_expert(routing.indices, routing.counts)
        sent = routing.counts.view(self.size, -1)
        received = exchange_counts(sent, self.group, self.traffic)
        route = Route(group=self.group, send=sent.sum(1).tolist(), receive=received.sum(1).tolist())
        to_experts = RowExchange(route, self.traffic, ("dispatch", "dispatch_gradients"))
        to_experts.start(dispatch_quantized(x, slots) if isinstance(x, QuantizedTensor) else dispatch(x, slots))
        y_shared = None if shared is None else shared(x)
        y = run_local(experts, to_experts.finish(), received)
        y = RowExchange(route.back, self.traffic, ("combine", "combine_gradients"))(y)
        y = combine(y, routing.weights, slots)
        return y if y_shared is None else y + y_shared


class TwoHopExchange:
    """The exchange of a MoE layer whose ranks are on several nodes: a token crosses to each node once.

    A rank sends each token once to each node with an expert of its own, to the rank of the same number there. That rank
    passes it on to the experts inside the node, sums their results, and sends back one row. Node-limited routing bounds
    the number of nodes of a token. The sum inside a node comes first, so it differs from ExpertExchange by rounding.

    Args:
        between: group of the ranks of the same number on all nodes.
        inside: group of the ranks of this node.
        slow: counts what is sent between nodes; `fast` what is sent inside.

    Source: DeepSeek-V3 report, section 3.2.2.
    """

    def __init__(self, between: dist.ProcessGroup, inside: dist.ProcessGroup, slow: SentBytes, fast: SentBytes) -> None:
        self.between, self.slow = between, slow
        self.nodes = dist.get_world_size(between)
        self.inside = ExpertExchange(inside, fast)

    def __call__(
        self, experts: nn.Module, shared: nn.Module | None, x: Visits, routing: Routing
    ) -> Float[Tensor, "n m"]:
        """Return the sum of each token's experts, routed and shared, as MoE does."""
        indices, weights, _, counts = routing
        n, per_node = x.shape[0], counts.shape[0] // self.nodes
        # 1. a row for each node and token with an expert there, in the order of nodes
        visits = torch.zeros(self.nodes, n, dtype=torch.bool, device=indices.device)
        visits[(indices // per_node).T, torch.arange(n, device=indices.device)] = True
        node, token = visits.nonzero(as_tuple=True)
        sent = visits.sum(1, keepdim=True)
        received = exchange_counts(sent, self.between, self.slow)
        route = Route(group=self.between, send=sent.flatten().tolist(), receive=received.flatten().tolist())
        to_nodes = RowExchange(route, self.slow, ("dispatch", "dispatch_gradients"))
        to_nodes.start(rows_of(x, token))
        # 2. the choices go with the rows: experts by their number in the node, or outside of its range
        local = indices[token] - (node * per_node)[:, None]
        chosen = RowExchange(route, self.slow, ("counts", "counts"))(local)
        weight = RowExchange(route, self.slow, ("counts", "counts"))(weights[token])
        y_shared = None if shared is None else shared(x)
        # 3. inside the node: one visit a row, weighted, and summed by the row that came
        arrived = to_nodes.finish()
        row, choice = ((chosen >= 0) & (chosen < per_node)).nonzero(as_tuple=True)
        expert = chosen[row, choice]
        visit = Routing(
            expert[:, None], weight[row, choice][:, None], weight, torch.bincount(expert, minlength=per_node)
        )
        y = self.inside(experts, None, rows_of(arrived, row), visit)
        y = scattered_sum(y, row, arrived.shape[0])
        # 4. back, and the sum over the nodes of a token
        y = RowExchange(route.back, self.slow, ("combine", "combine_gradients"))(y)
        y = scattered_sum(y, token, n)
        return y if y_shared is None else y + y_shared


def run_local(experts: nn.Module, rows: Visits, received: Int[Tensor, "ranks own"]) -> Float[Tensor, "rows m"]:
    """Return the output of this rank's experts for rows that are sorted by the rank they came from, then by expert."""
    own = torch.arange(received.shape[1], device=received.device).expand_as(received)
    expert = own.flatten().repeat_interleave(received.flatten())
    ones = torch.ones(len(expert), 1, dtype=torch.float32, device=received.device)
    return experts(rows, expert[:, None], ones, received.sum(0))


def keep_own_experts(moe: MoE, rank: int, size: int) -> None:
    """Leave only the experts of rank `rank` of `size` in a layer, whose tensors shrink to [e/size, ...]."""
    experts = moe.experts
    assert isinstance(experts, Experts)
    for name in ("w1", "w2", "w3"):
        weight, scales = getattr(experts, name), SCALES[name]
        own = weight.detach().chunk(size)[rank].clone()
        setattr(experts, name, nn.Parameter(own, requires_grad=weight.requires_grad))
        if getattr(experts, scales, None) is not None:
            setattr(experts, scales, getattr(experts, scales).chunk(size)[rank].clone())


def moe_layers(model: nn.Module) -> list[MoE]:
    """Return the MoE layers in the order of Output.routing."""
    return [module for module in model.modules() if isinstance(module, MoE)]
