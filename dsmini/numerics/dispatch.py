"""Dispatch and combine: send tokens to the experts that they chose, multiply by groups, and sum the results by token.

Dispatch sorts the n*k token-expert pairs by expert, so that the rows of each expert are contiguous. A grouped product
then serves all experts. Combine gathers the results by token and adds them in the order of k. No row is dropped and no
addition is atomic, so the same input gives the same bits. Plain versions index and add instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics.formats import at_least_fp32
from dsmini.numerics.quantization import QuantizedTensor, listed_sizes, rows_of


class Slots(NamedTuple):
    """Positions of the pairs' rows after sorting by expert. Some slots may be padding."""

    token: Int[Tensor, " rows"]
    """Token in each slot. 0 in padding."""
    slot: Int[Tensor, "n k"]
    """Slot of each pair of token and expert, never one of padding."""
    ends: Int[Tensor, " e"]
    """Slot after each expert's last."""


def sort_by_expert(indices: Int[Tensor, "n k"], e: int, align: int = 1) -> Slots:
    """Assign a slot to each token-expert pair, in the order of experts, and of tokens within an expert.

    Args:
        e: number of experts.
        align: multiple at which each expert starts. Above 1 the number of slots depends on the sizes alone, and the
            last expert takes all remaining slots, so that every row is written.
    """
    (n, k), flat = indices.shape, indices.long().flatten()
    counts = flat.new_zeros(e).scatter_add(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    rows = n * k if align == 1 else -(-(n * k + e * (align - 1)) // align) * align
    aligned = (counts + align - 1) // align * align
    start, unpadded_start = (sizes.cumsum(0) - sizes for sizes in (aligned, counts))
    slot_in_order = torch.arange(n * k, device=flat.device) + (start - unpadded_start)[flat[order]]
    slot = torch.empty_like(flat).scatter(0, order, slot_in_order)
    token = torch.zeros(rows, dtype=torch.int64, device=flat.device).scatter(0, slot_in_order, order // k)
    ends = aligned.cumsum(0)
    last = torch.full_like(ends[-1:], rows)
    return Slots(token, slot.view(n, k), torch.cat((ends[:-1], last)))


def dispatch(x: Float[Tensor, "n m"], slots: Slots) -> Float[Tensor, "rows m"]:
    """Return each slot's row of x. First derivatives only."""
    return ops.trained(lambda x: (x.index_select(0, slots.token), (slots.slot,)), _sum_by_token, x)


def combine(
    rows: Float[Tensor, "rows m"], weights: Float[Tensor, "n k"], slots: Slots, weighed: bool = False
) -> Float[Tensor, "n m"]:
    """Return sum over k of weights[n, k] * rows[slot[n, k]], added in order of k. First derivatives only.

    embedding_bag gathers and adds in one operation, ten times as fast on a CPU as rows[slot] and a sum.

    Args:
        weighed: rows are V4's, with their weights already; they are added in FP32, and the result is FP32.
    """
    if weighed:
        rows, weights = at_least_fp32(rows), torch.ones_like(weights)
    of_weights = weights.requires_grad

    def forward(rows: Tensor, weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = F.embedding_bag(slots.slot, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))
        return y, (rows, weights, slots.token, slots.slot)

    def gradients(grad: Tensor, rows: Tensor, weights: Tensor, token: Tensor, slot: Tensor) -> list[Tensor | None]:
        grad_rows = grad.index_select(0, token)
        grad_weights = None
        if of_weights:
            per_slot = (rows * grad_rows) @ rows.new_ones(rows.shape[1])  # a row's sum, as a fast product
            grad_weights = per_slot[slot].to(weights.dtype)
        # exactly zero in padding
        of_slot = rows.new_zeros(rows.shape[0]).scatter(0, slot.flatten(), weights.flatten().to(rows.dtype))
        return [grad_rows.mul_(of_slot[:, None]), grad_weights]

    return ops.trained(forward, gradients, rows, weights)


def weights_of_slots(weights: Float[Tensor, "n k"], slots: Slots) -> Float[Tensor, "rows 1"]:
    """Return the weight of each slot's pair; 0 in padding."""
    return weights.new_zeros(len(slots.token), 1).index_put((slots.slot.flatten(),), weights.flatten()[:, None])


def dispatch_quantized(x: QuantizedTensor, slots: Slots) -> QuantizedTensor:
    """Return the rows of `dispatch` as codes and scales, which take half the bytes.

    Padding is zero. A copy of a token there would change the scales of tiles that hold an expert's own tokens.

    Source: DeepSeek-V3 report, section 3.3.3 (tokens are sent to their experts in FP8).
    """
    token, slot, _ = slots
    (n, _), rows = slot.shape, token.shape[0]
    chosen_slots = torch.zeros(rows, dtype=torch.bool, device=token.device).index_fill(0, slot.flatten(), True)
    codes = F.pad(x.codes.view(torch.uint8), (0, 0, 0, 1)).view(x.codes.dtype)
    with_zeros = replace(x, codes=codes, scales=F.pad(x.scales, (0, 0, 0, 1)), source=None)
    source = x.source
    if source is not None:  # as in dispatch, with one element in memory
        source = ops.trained(lambda x: (x.new_zeros(()).expand(rows, x.shape[1]), (slot,)), _sum_by_token, source)
    return replace(rows_of(with_zeros, torch.where(chosen_slots, token, n)), source=source)


def _sum_by_token(grad: Float[Tensor, "rows m"], slot: Int[Tensor, "n k"]) -> list[Tensor]:
    """Return the sum of each token's k slots, in order, gathered as well: the gradient of dispatch."""
    return [F.embedding_bag(slot, grad, mode="sum")]


def grouped_linear(
    x: Float[Tensor, "rows i"], weight: Float[Tensor, "e o i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "rows o"]:
    """Compute x_j W_j^T for each group of rows: in one grouped product where torch has one, else one by one.

    Args:
        ends: the row after each group's last; the last of them is the number of rows. Groups may be empty.
    """
    if _breaks_the_graph(x):
        from dsmini.numerics.uncompiled import uncompiled

        return uncompiled(grouped_linear, x, weight, ends)
    weight = weight.to(x.dtype)
    if _grouped_mm_serves(x, weight.shape[1:]) and _aligned(weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends.int())
    return grouped_linear_by_expert(x, weight, ends)


def grouped_linear_by_expert(
    x: Float[Tensor, "rows i"], weight: Float[Tensor, "e o i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "rows o"]:
    """Compute grouped_linear as a loop over the experts, for any dtype and stride. Waits for the device's sizes."""
    sizes = listed_sizes(ends, x.shape[0])
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), weight.unbind(0), strict=True)])


def grouped_outer(
    g: Float[Tensor, "rows o"], x: Float[Tensor, "rows i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "e o i"]:
    """Compute g_j^T x_j for each group of rows, the gradient of grouped_linear's weight. An empty group gives zeros."""
    if _breaks_the_graph(x):
        from dsmini.numerics.uncompiled import uncompiled

        return uncompiled(grouped_outer, g, x, ends)
    sizes = (g.shape[1], x.shape[1])
    if _grouped_mm_serves(x, sizes):
        return F.grouped_mm(g.T, x, offs=ends.int())
    groups = listed_sizes(ends, x.shape[0])
    return torch.stack([a.T @ b for a, b in zip(g.split(groups), x.split(groups), strict=True)])


def _breaks_the_graph(x: Tensor) -> bool:
    """Return True while torch compiles a product that it cannot trace."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.dtype != torch.bfloat16


def _grouped_mm_serves(x: Tensor, sizes: Sequence[int]) -> bool:
    """Return True if grouped_mm serves rows: it wants 16-byte strides and BF16, or FP32 on a CPU."""
    aligned = all(size * x.element_size() % 16 == 0 for size in sizes)
    kinds = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}.get(x.device.type, ())
    return aligned and x.dtype in kinds and hasattr(F, "grouped_mm")


def _aligned(weight: Float[Tensor, "e o i"]) -> bool:
    """Return True where rows or columns lie in one piece each, at multiples of 16 bytes, as grouped_mm wants them."""
    of_stack, *others = weight.stride()
    return min(others) == 1 and all(step * weight.element_size() % 16 == 0 for step in (of_stack, max(others)))
