"""DeepSeekMoE: many small routed experts, of which a token visits a few, and shared experts that all tokens visit.

The n*k visits are sorted by expert, so that each expert's rows lie together, and go through grouped matrix products.
The results are gathered back by token and summed over k in order: no row is dropped, nothing is added atomically, and
the same input gives the same bits.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsmini.config import ModelConfig, layer_config
from dsmini.nn.fp8 import FP8Module, untrainable
from dsmini.nn.gate import Gate, Routing
from dsmini.nn.linear import Linear
from dsmini.numerics import QuantizedTensor, fp8_matmul, fp8_swiglu_matmul, grouped_linear, quantize


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). The dense layers' feed-forward, and the shared experts."""

    def __init__(self, config: ModelConfig | None = None, /, inter_dim: int | None = None, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        hidden = c.inter_dim if inter_dim is None else inter_dim
        self.w1 = Linear(c.dim, hidden, init_std=c.init_std, precision=c.precision)
        self.w2 = Linear(hidden, c.dim, init_std=c.output_init_std, precision=c.precision)
        self.w3 = Linear(c.dim, hidden, init_std=c.init_std, precision=c.precision)

    def forward(self, x: Float[Tensor, "*batch m"] | QuantizedTensor) -> Float[Tensor, "*batch m"]:
        if self.w2.precision == "fp8":
            x = quantize(x) if isinstance(x, Tensor) else x
            return fp8_swiglu_matmul(self.w1(x), self.w3(x), self.w2.operand("weight"))
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Slots(NamedTuple):
    """Where each visit's row lies when rows are sorted by expert; some slots may be padding."""

    token: Int[Tensor, " rows"]
    """The token in each slot; 0 in padding."""
    slot: Int[Tensor, "n k"]
    """The slot of each visit; padding is in nobody's."""
    ends: Int[Tensor, " e"]
    """The slot after each expert's last."""


def sort_by_expert(indices: Int[Tensor, "n k"], counts: Int[Tensor, " e"], align: int = 1) -> Slots:
    """Give each visit a slot: experts in order, tokens in order within an expert, each expert starting at a
    multiple of `align`. Above align 1 the number of slots is fixed by the sizes alone, and the last expert
    takes what is left over, so that no row stays unwritten."""
    (n, k), e = indices.shape, counts.shape[0]
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    rows = n * k if align == 1 else -(-(n * k + e * (align - 1)) // align) * align
    room = (counts + align - 1) // align * align
    shift = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)
    slot_in_order = torch.arange(n * k, device=flat.device) + shift[flat[order]]
    slot = torch.empty_like(flat).scatter(0, order, slot_in_order)
    token = torch.zeros(rows, dtype=torch.int64, device=flat.device).scatter(0, slot_in_order, order // k)
    ends = room.cumsum(0)
    last = torch.full_like(ends[-1:], rows)
    return Slots(token, slot.view(n, k), torch.cat((ends[:-1], last)))


class _Dispatch(torch.autograd.Function):
    """Each slot's row of x. Backward gathers too: a token's gradient is the sum over its k slots, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return F.embedding_bag(slot, grad, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """sum_k weights[n, k] * rows[slot[n, k]], in order of k: embedding_bag gathers and adds in one operation, ten times
    as fast on a CPU as rows[slot] and a sum. Backward gives padding slots a gradient of exactly zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, token, slot)
        return F.embedding_bag(slot, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, token, slot = ctx.saved_tensors
        grad_rows = grad.index_select(0, token)
        per_slot = (rows * grad_rows) @ rows.new_ones(rows.shape[1])  # a row's sum, as a fast product
        grad_weights = per_slot[slot].to(weights.dtype)
        weight_of_slot = rows.new_zeros(rows.shape[0]).scatter(0, slot.flatten(), weights.flatten().to(rows.dtype))
        return grad_rows.mul_(weight_of_slot[:, None]), grad_weights, None, None


class _FP8Dispatch(torch.autograd.Function):
    """_Dispatch for rows that exist as codes: what stands for them in the graph, of one element in memory."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, slot: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(slot)
        return source.new_zeros(()).expand(rows, source.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return F.embedding_bag(slot, grad, mode="sum"), None, None


def dispatch_quantized(x: QuantizedTensor, token: Int[Tensor, " rows"], slot: Int[Tensor, "n k"]) -> QuantizedTensor:
    """The rows of _Dispatch as codes and scales, half the bytes. Padding is zero: as copies of a token it would take
    part in the tiles of an expert's own tokens.

    Source: DeepSeek-V3 report, section 3.3.3 (tokens are sent to their experts in FP8).
    """
    (n, _), rows = slot.shape, token.shape[0]
    visited = torch.zeros(rows, dtype=torch.bool, device=token.device).index_fill(0, slot.flatten(), True)
    with_zeros = replace(x, codes=F.pad(x.codes.view(torch.uint8), (0, 0, 0, 1)), scales=F.pad(x.scales, (0, 0, 0, 1)))
    chosen = with_zeros.select_rows(torch.where(visited, token, n))
    source = None if x.source is None else cast(Tensor, _FP8Dispatch.apply(x.source, slot, rows))
    return replace(chosen, codes=chosen.codes.view(x.codes.dtype), source=source)


class Experts(FP8Module):
    """All routed experts of a layer, stacked: w1, w3 [e, f, m], w2 [e, m, f]; each is a SwiGLU. No token is dropped.

    Of experts held in FP8 only those that a token chose are dequantised, one after the other.
    """

    scale_names = MappingProxyType({"w1": "w1_scale", "w2": "w2_scale", "w3": "w3_scale"})

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        e, f, m = c.n_routed_experts, c.moe_inter_dim, c.dim
        self.w1 = nn.Parameter(torch.empty(e, f, m))
        self.w2 = nn.Parameter(torch.empty(e, m, f))
        self.w3 = nn.Parameter(torch.empty(e, f, m))
        for scale in self.scale_names.values():
            self.register_buffer(scale, None)
        self.init_std, self.output_init_std, self.precision = c.init_std, c.output_init_std, c.precision
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights from a normal distribution."""
        for weight, std in ((self.w1, self.init_std), (self.w2, self.output_init_std), (self.w3, self.init_std)):
            nn.init.normal_(weight, std=std, generator=generator)

    def forward(
        self,
        x: Float[Tensor, "n m"] | QuantizedTensor,
        indices: Int[Tensor, "n k"],
        weights: Float[Tensor, "n k"],
        counts: Int[Tensor, " e"],
    ) -> Float[Tensor, "n m"]:
        """Sum of each token's chosen experts' outputs times their weights; `counts` as in Routing."""
        if self.precision == "fp8" and isinstance(x, Tensor):
            x = quantize(x)
        if self.holds_fp8 or (not torch.is_grad_enabled() and _few(x, indices, counts)):
            return self._one_by_one(x, indices, weights, counts)
        token, slot, ends = sort_by_expert(indices, counts, _row_alignment(x, indices, counts))
        if isinstance(x, QuantizedTensor):
            y = self._fp8_swiglu(dispatch_quantized(x, token, slot), ends)
            return _Combine.apply(y, weights, token, slot)  # pyright: ignore[reportReturnType]
        rows: Tensor = _Dispatch.apply(x, token, slot)  # pyright: ignore[reportAssignmentType]
        if torch.is_grad_enabled():
            w13 = torch.cat((self.w1.to(x.dtype), self.w3.to(x.dtype)), 1)  # one product reads the rows once
            gate, up = grouped_linear(rows, w13, ends).chunk(2, -1)
        else:  # joining them costs more than it saves where the step has no backward
            gate, up = grouped_linear(rows, self.w1, ends), grouped_linear(rows, self.w3, ends)
        hidden = F.silu(gate) * up
        return _Combine.apply(grouped_linear(hidden, self.w2, ends), weights, token, slot)  # pyright: ignore[reportReturnType]

    def expert(self, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w2 and w3 of expert i in that dtype."""
        return self.dequantized("w1", dtype, i), self.dequantized("w2", dtype, i), self.dequantized("w3", dtype, i)

    def _one_by_one(self, x: Tensor | QuantizedTensor, indices: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        x = untrainable(x) if self.holds_fp8 else x
        if x.shape[0] == 1:  # decoding: nothing to sort
            return weights.to(x.dtype) @ torch.cat([self._one(i, x) for i in indices[0].tolist()])
        token, slot, _ = sort_by_expert(indices, counts)
        sizes = counts.tolist()
        out: list[Tensor] = []
        for i, tokens in enumerate(token.split(sizes)):
            if sizes[i]:
                out.append(self._one(i, _rows_of(x, tokens)))
        y = torch.cat(out) if out else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        return _Combine.apply(y, weights, token, slot)  # pyright: ignore[reportReturnType]

    def _one(self, i: int, rows: Tensor | QuantizedTensor) -> Tensor:
        if isinstance(rows, QuantizedTensor):
            return self._fp8_swiglu(rows, None, i)
        w1, w2, w3 = self.expert(i, rows.dtype)
        return F.linear(F.silu(F.linear(rows, w1)) * F.linear(rows, w3), w2)

    def _fp8_swiglu(self, rows: QuantizedTensor, ends: Tensor | None, i: int | None = None) -> Tensor:
        gate, up = (fp8_matmul(rows, self.operand(name, i), ends=ends) for name in ("w1", "w3"))
        return fp8_swiglu_matmul(gate, up, self.operand("w2", i), ends=ends)


def _rows_of(x: Tensor | QuantizedTensor, rows: Tensor) -> Tensor | QuantizedTensor:
    if isinstance(x, Tensor):
        return x.index_select(0, rows)
    return replace(x.select_rows(rows), source=None if x.source is None else x.source.index_select(0, rows))


def _few(x: Tensor | QuantizedTensor, indices: Tensor, counts: Tensor) -> bool:
    """Whether a CPU would spend more on the experts that nobody chose, in a grouped product, than on asking the chosen
    ones in turn (docs/log.md)."""
    return x.device.type == "cpu" and 2 * indices.numel() <= counts.shape[0]


def _row_alignment(x: Tensor | QuantizedTensor, indices: Tensor, counts: Tensor) -> int:
    """oneDNN prepares a product anew for each row count in BF16: rows in multiples of 64 reuse it (docs/log.md)."""
    enough = indices.numel() >= 64 * counts.shape[0]
    return 64 if enough and x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1


class MoE(nn.Module):
    """A DeepSeekMoE layer: the gate, its routed experts, and the shared experts. From a config or plain arguments.

    Source: DeepSeek-V3 report, section 2.1.2, equation 12.
    """

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        self.gate = Gate(c)
        self.experts = Experts(c)
        shared = c.n_shared_experts * c.moe_inter_dim
        self.shared_experts = FeedForward(c, inter_dim=shared) if shared else None

    def forward(self, x: Float[Tensor, "*batch m"]) -> tuple[Float[Tensor, "*batch m"], Routing]:
        flat = x.flatten(0, -2)
        routing = self.gate(flat)
        if self.experts.precision == "fp8":
            flat = quantize(flat)  # once, for the routed and the shared
        y = self.experts(flat, routing.indices, routing.weights, routing.counts)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view(x.shape), routing
