"""Compute matrix products by groups of rows, as the experts of a layer need them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini.numerics.tiles import listed_sizes


def grouped_linear(
    x: Float[Tensor, "rows i"], weight: Float[Tensor, "e o i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "rows o"]:
    """Compute x_j W_j^T for each group of rows: in one grouped product where torch has one, else one by one.

    Args:
        ends: the row after each group's last; the last of them is the number of rows. Groups may be empty.
    """
    if _breaks_the_graph(x):
        from dsmini.numerics.uncompiled import grouped_linear_uncompiled

        return grouped_linear_uncompiled(x, weight, ends)
    weight = weight.to(x.dtype)
    if _grouped_mm_serves(x, weight.shape[1:]):
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
        from dsmini.numerics.uncompiled import grouped_outer_uncompiled

        return grouped_outer_uncompiled(g, x, ends)
    sizes = (g.shape[1], x.shape[1])
    if _grouped_mm_serves(x, sizes):
        return F.grouped_mm(g.T, x, offs=ends.int())
    groups = listed_sizes(ends, x.shape[0])
    return torch.stack([a.T @ b for a, b in zip(g.split(groups), x.split(groups), strict=True)])


def _breaks_the_graph(x: Tensor) -> bool:
    """Return True while torch compiles a product that it cannot trace."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.dtype != torch.bfloat16


def _grouped_mm_serves(x: Tensor, sizes: Sequence[int]) -> bool:
    """Return True if grouped_mm serves: it wants 16-byte strides and BF16, or FP32 on a CPU."""
    aligned = all(size * x.element_size() % 16 == 0 for size in sizes)
    kinds = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}.get(x.device.type, ())
    return aligned and x.dtype in kinds and hasattr(F, "grouped_mm")
