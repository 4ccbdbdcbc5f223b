"""All-to-all of rows: each rank sends some rows to each other rank, and backward sends their gradients back.

    sent      rows for rank 0, then for rank 1, ...    on every rank
    received  rows of rank 0, then of rank 1, ...

FP8 rows travel as bytes, codes and scales side by side: neither gloo nor NCCL sends float8.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics import QuantizedTensor

Sent = Literal["dispatch", "combine", "dispatch_gradients", "combine_gradients", "counts"]


@dataclass(slots=True)
class SentBytes:
    """Bytes that this rank sent to other ranks so far, by what they were."""

    dispatch: int = 0
    """Rows on the way to their experts."""
    combine: int = 0
    """Results of the experts."""
    dispatch_gradients: int = 0
    """Gradients of the rows, on the way back from the experts."""
    combine_gradients: int = 0
    """Gradients of the results, on the way to the experts."""
    counts: int = 0
    """Numbers of rows."""

    def add(self, what: Sent, nbytes: int) -> None:
        """Count bytes that were sent."""
        setattr(self, what, getattr(self, what) + nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The numbers of rows that this rank sends to each rank of a group, and receives from each."""

    group: dist.ProcessGroup
    send: Sequence[int]
    receive: Sequence[int]

    @property
    def back(self) -> "Route":
        """The way back of the same rows."""
        return Route(group=self.group, send=self.receive, receive=self.send)

    @property
    def leaving(self) -> int:
        """Number of rows that leave this rank."""
        return sum(self.send) - self.send[dist.get_rank(self.group)]


class Pending:
    """Rows on their way. Other work may run before `rows` waits for them."""

    def __init__(self, rows: Tensor, route: Route) -> None:
        self._sent = rows.contiguous()
        self._out = rows.new_empty(sum(route.receive), *rows.shape[1:])
        self._work: Any = dist.all_to_all_single(
            self._out, self._sent, list(route.receive), list(route.send), group=route.group, async_op=True
        )

    @property
    def rows(self) -> Tensor:
        """The rows that came, without a gradient."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._out


class RowExchange:
    """One exchange of rows: `start` it, do other work, `finish` it.

    Args:
        names: of the forward and of the backward in `traffic`.
    """

    def __init__(self, route: Route, traffic: SentBytes, names: tuple[Sent, Sent]) -> None:
        self.route, self.traffic, self.names = route, traffic, names
        self._rows: Tensor | QuantizedTensor | None = None
        self._pending: Pending | None = None

    def start(self, rows: Tensor | QuantizedTensor) -> None:
        """Send rows [sent, m]."""
        packed = rows if isinstance(rows, Tensor) else _packed(rows)
        self._rows, self._pending = rows, Pending(packed.detach(), self.route)
        self.traffic.add(self.names[0], self.route.leaving * packed.shape[1] * packed.element_size())

    def finish(self) -> Any:
        """Return the rows that came, [received, m], with the graph of those that were sent."""
        assert self._rows is not None and self._pending is not None
        sent, came = self._rows, self._pending.rows
        self._rows = self._pending = None
        if isinstance(sent, Tensor):
            return _Exchanged.apply(sent, came, self.route, self.traffic, self.names[1])
        return _unpacked(came, sent, self)

    def __call__(self, rows: Any) -> Any:
        """Send rows, and return those that came."""
        self.start(rows)
        return self.finish()


def exchange_counts(
    counts: Int[Tensor, "ranks each"], group: dist.ProcessGroup, traffic: SentBytes
) -> Int[Tensor, "ranks each"]:
    """Return how many rows each rank sends here, from how many this rank sends to each."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group)
    traffic.add("counts", counts.nbytes - counts[0].nbytes)
    return out


class _Exchanged(torch.autograd.Function):
    """Rows that came, in place of those that were sent. Backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, came: Tensor, route: Route, traffic: SentBytes, name: Sent) -> Tensor:
        ctx.back, ctx.traffic, ctx.name = route.back, traffic, name
        return came.view_as(came)

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        ctx.traffic.add(ctx.name, ctx.back.leaving * grad.shape[1] * grad.element_size())
        return Pending(grad, ctx.back).rows, None, None, None, None


def _packed(x: QuantizedTensor) -> Tensor:
    """Return codes and scales of each row as bytes, [rows, m + 4 m/128]."""
    codes, scales = (part.contiguous().view(torch.uint8).flatten(1) for part in x.parts)
    return torch.cat((codes, scales), 1)


def _unpacked(came: Tensor, like: QuantizedTensor, exchange: RowExchange) -> QuantizedTensor:
    rows, width = came.shape[0], like.shape[1]
    codes, scales = came.split((width, came.shape[1] - width), 1)
    source = like.source
    if source is not None:
        stand_in = source.new_zeros(()).expand(rows, width)
        source = cast(Tensor, _Exchanged.apply(source, stand_in, exchange.route, exchange.traffic, exchange.names[1]))
    return replace(
        like,
        codes=codes.contiguous().view(like.codes.dtype),
        scales=scales.contiguous().view(torch.float32).view(rows, *like.scales.shape[1:]),
        shape=torch.Size((rows, width)),
        source=source,
    )


def scattered_sum(rows: Float[Tensor, "rows m"], place: Int[Tensor, " rows"], n: int) -> Float[Tensor, "{n} m"]:
    """Return the sums of the rows of each place 0 ... n - 1, added in their order on a CPU."""
    return rows.new_zeros(n, rows.shape[1]).index_add(0, place, rows)
