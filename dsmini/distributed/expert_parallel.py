"""Expert parallelism: each of ep ranks holds a part of a layer's experts, and tokens travel to their experts.

    rank r of ep holds experts r e/ep ... (r + 1) e/ep - 1; every rank has tokens of its own

    1. sort the pairs by expert, so that those of a rank are together             `dispatch` of functional/
    2. tell each rank how many rows it gets for each of its experts               all-to-all of counts, [ep, e/ep]
    3. send the rows: codes and scales in FP8, else in the compute dtype          all-to-all, shared experts meanwhile
    4. run the own experts on what came: a row is one pair, of weight 1 or, of V4's, with the weight that came with it
    5. send the results back, in the compute dtype                                all-to-all
    6. weight and sum them by token                                               `combine` of functional/

The rows of an expert come in the order (rank, token), as in one process whose batch is all ranks' batches one after
the other. So each row's result has the same bits. The gradient of an expert is the sum over all these tokens: it needs
no more sum over ep. Backward sends gradients the way back of their rows.

FP8 rows travel as bytes, codes and scales side by side: neither gloo nor NCCL sends float8.

Simplified: a row goes to each of its experts, also to several of one machine. DeepSeek sends it once to a machine and
forwards it there. `MoE.exchange` is the hook for such an exchange: DeepEP's functions fit there.

Source: DeepSeek-V3 report, sections 3.2.2 and 3.3.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dsmini import ops
from dsmini.nn.gate import Routing
from dsmini.nn.moe import MoE
from dsmini.numerics import QuantizedTensor, quantize
from dsmini.numerics.dispatch import combine, dispatch, dispatch_quantized, sort_by_expert, weights_of_slots

Rows = Any
"""Rows [n, m]: a tensor, or a QuantizedTensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The numbers of rows that this rank sends to each rank of a group, and receives from each."""

    group: dist.ProcessGroup
    send: Sequence[int]
    receive: Sequence[int]

    @property
    def back(self) -> "Route":
        """The way back of the same rows."""
        return replace(self, send=self.receive, receive=self.send)

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """Start to send rows; return what waits for the rows that come, without a gradient."""
        sent = rows.detach().contiguous()
        came = sent.new_empty(sum(self.receive), *sent.shape[1:])
        work = dist.all_to_all_single(came, sent, list(self.receive), list(self.send), group=self.group, async_op=True)
        return partial(_arrived, work, sent, came)

    def exchange(self, rows: Rows) -> Callable[[], Any]:
        """Start to send rows [sent, m]; return what waits for those that come, [received, m], which have the graph."""
        packed = rows if isinstance(rows, Tensor) else _packed(rows)
        arrived = self.start(packed)
        if isinstance(rows, Tensor):
            return lambda: _Exchanged.apply(rows, arrived(), self)
        return lambda: _unpacked(arrived(), rows, self)


def _arrived(work: Any, sent: Tensor, came: Tensor) -> Tensor:
    """Wait for rows; what was sent lives until then."""
    work.wait()
    return came


class _Exchanged(torch.autograd.Function):
    """Rows that came, in place of those that were sent. Backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, came: Tensor, route: Route) -> Tensor:
        ctx.back = route.back
        return came.view_as(came)

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back.start(grad)(), None, None


def _packed(x: QuantizedTensor) -> Tensor:
    """Return codes and scales of each row as bytes, [rows, m + 4 m/128]."""
    codes, scales = (part.contiguous().view(torch.uint8).flatten(1) for part in x.parts)
    return torch.cat((codes, scales), 1)


def _unpacked(came: Tensor, like: QuantizedTensor, route: Route) -> QuantizedTensor:
    rows, width = came.shape[0], like.shape[1]
    codes, scales = came.split((width, came.shape[1] - width), 1)
    source: Any = like.source
    if source is not None:
        source = _Exchanged.apply(source, source.new_zeros(()).expand(rows, width), route)
    return replace(
        like,
        codes=codes.contiguous().view(like.codes.dtype),
        scales=scales.contiguous().view(torch.float32).view(rows, *like.scales.shape[1:]),
        shape=torch.Size((rows, width)),
        source=source,
    )


def new_route(counts: Int[Tensor, "ranks each"], group: Any) -> tuple[Route, Tensor]:
    """Return the route of rows: how many this rank sends to each rank, and how many of each come here.

    Args:
        counts: the rows of a rank may be of several kinds, such as its experts.
    """
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    send, receive = counts.sum(1).tolist(), received.sum(1).tolist()
    return Route(group=group, send=send, receive=receive), received


class ExpertExchange:
    """The exchange of a MoE layer whose experts are divided among the ranks of a group. All ranks call it together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group: dist.ProcessGroup = group
        self.size: int = dist.get_world_size(group)

    def __call__(self, experts: nn.Module, shared: nn.Module | None, x: Rows, routing: Routing) -> Float[Tensor, "n m"]:
        """Return the sum of each token's experts, routed and shared, as MoE does."""
        slots = sort_by_expert(routing.indices, len(routing.counts))
        route, received = new_route(routing.counts.view(self.size, -1), self.group)
        as_numbers = isinstance(x, Tensor) and _round_what_they_read(experts)
        sent = quantize(x) if as_numbers else x
        rows = dispatch_quantized(sent, slots) if isinstance(sent, QuantizedTensor) else dispatch(sent, slots)
        # V4's experts weigh before their last product: the weights go with the rows
        weighed, share = getattr(experts, "limit", None) is not None, None
        if weighed:
            share = route.exchange(weights_of_slots(routing.weights, slots))()
        arrived = route.exchange(rows)
        y_shared = None if shared is None else shared(x)
        came = arrived()
        y = run_local(experts, came.dequantize(sent.dtype) if as_numbers else came, received, share).to(x.dtype)
        y = combine(route.back.exchange(y)(), routing.weights, slots, weighed)
        return y if y_shared is None else y + y_shared


def _round_what_they_read(experts: nn.Module) -> bool:
    """Return True for FP8 experts that FSDP2 divides. Its hooks must see a tensor; experts round it to equal codes."""
    made_of = type(experts).__mro__[2:3]  # after FSDP2's own class and FSDPModule
    plain = any(kind.__module__.startswith("dsmini.nn.") for kind in made_of)
    return plain and isinstance(experts, FSDPModule) and getattr(experts, "precision", None) == "fp8"


def run_local(
    experts: nn.Module, rows: Rows, received: Int[Tensor, "ranks own"], weights: Float[Tensor, "rows 1"] | None = None
) -> Float[Tensor, "rows m"]:
    """Return the output of this rank's experts for rows that are sorted by the rank they came from, then by expert.

    Args:
        weights: of V4's experts; None: 1.
    """
    own = torch.arange(received.shape[1], device=received.device).expand_as(received)
    # the number of rows is known: without it the host would wait for the device
    expert = own.flatten().repeat_interleave(received.flatten(), output_size=rows.shape[0])
    if weights is None:
        weights = torch.ones(rows.shape[0], 1, dtype=torch.float32, device=received.device)
    return experts(rows, expert[:, None], weights)


def moe_layers(model: nn.Module) -> list[MoE]:
    """Return the MoE layers in the order of Output.routing."""
    return [module for module in model.modules() if isinstance(module, MoE)]
