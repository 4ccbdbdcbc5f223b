"""The routed experts of a layer: each token's chosen SwiGLUs, weighted and summed.

    y_n = sum over k of weights[n, k] * w2[i] (silu(w1[i] x_n) * w3[i] x_n),  i = indices[n, k]

`experts` multiplies in x's dtype, `quantized_experts` too, with matrices that may be FP8 codes, and `fp8_experts` in
simulated FP8. All take stacked matrices. Each reference runs one expert after the other. The eager versions sort the
rows by expert (dispatch), run one grouped product for each matrix, and sum the results by token (combine). Between
dispatch and combine each row needs its expert alone: an exchange of rows between devices fits there.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.functional.dispatch import combine, dispatch, dispatch_quantized, sort_by_expert
from dsmini.functional.trained_experts import train_experts
from dsmini.numerics import QuantizedTensor, fp8_matmul, fp8_swiglu_matmul, grouped_linear, number_dtype

Weight = Float[Tensor, "e o i"] | QuantizedTensor
"""A matrix for each expert."""
X = TypeVar("X", Tensor, QuantizedTensor)


def _cost(
    x: Tensor | QuantizedTensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Weight, w2: Weight, w3: Weight
) -> ops.Cost:
    visited, (e, f, m) = int((counts > 0).sum()), w1.shape
    matrices = sum(w.nbytes for w in (w1, w2, w3)) * visited // e  # those that nobody chose stay where they are
    read = x.nbytes + indices.nbytes + weights.nbytes + counts.nbytes + matrices
    rows = indices.numel() / max(1, visited)
    return ops.Cost(read, x.shape.numel() * x.dtype.itemsize, 6 * indices.numel() * f * m, rows, number_dtype(w1))


@ops.operation("experts", cost=_cost)
def experts(
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    counts: Int[Tensor, " e"],
    w1: Float[Tensor, "e f m"],
    w2: Float[Tensor, "e m f"],
    w3: Float[Tensor, "e f m"],
) -> Float[Tensor, "n m"]:
    """Return the weighted sum of each token's chosen experts' outputs. The products run in x's dtype.

    Args:
        counts: number of the n tokens that chose each expert.
    """
    y = torch.zeros_like(x)
    for i in counts.nonzero().flatten().tolist():
        token, choice = (indices == i).nonzero(as_tuple=True)
        rows = x[token]
        hidden = F.silu(rows @ w1[i].to(x.dtype).T) * (rows @ w3[i].to(x.dtype).T)
        y = y.index_add(0, token, weights[token, choice, None].to(x.dtype) * (hidden @ w2[i].to(x.dtype).T))
    return y


@experts.for_transforms
def _(x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    w1, w2, w3 = (w.to(x.dtype) for w in (w1, w2, w3))
    # every expert runs every token, with weight 0 where it was not chosen: [n, e] and [n, e, f]
    share = weights.new_zeros(x.shape[0], w1.shape[0]).scatter(1, indices, weights).to(x.dtype)
    hidden = F.silu(einsum(x, w1, "n m, e f m -> n e f")) * einsum(x, w3, "n m, e f m -> n e f")
    return einsum(share.unsqueeze(-1) * hidden, w2, "n e f, e m f -> n m")


@experts.eager
def _(x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    if not torch.is_grad_enabled() and few(x, indices, counts):
        return visit(x, indices, weights, counts, lambda i, rows: _swiglu(rows, w1[i], w2[i], w3[i]))
    if torch.is_grad_enabled() and (y := train_experts(x, indices, weights, counts, w1, w2, w3)) is not None:
        return y
    slots = sort_by_expert(indices, counts, row_alignment(x, indices, counts))
    return combine(_grouped_swiglu(dispatch(x, slots), w1, w2, w3, slots.ends), weights, slots)


@ops.operation("quantized_experts", cost=_cost)
def quantized_experts(
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    counts: Int[Tensor, " e"],
    w1: Weight,
    w2: Weight,
    w3: Weight,
) -> Float[Tensor, "n m"]:
    """Compute `experts` with matrices that may be FP8 codes. Products take their values in x's dtype."""
    return experts.reference(x, indices, weights, counts, *(_dense(w, x.dtype) for w in (w1, w2, w3)))


@quantized_experts.eager
def _(x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Weight, w2: Weight, w3: Weight) -> Tensor:
    def swiglu(i: int, rows: Tensor) -> Tensor:  # only chosen experts are dequantized, one after the other
        return _swiglu(rows, *(_dense(expert_of(w, i), rows.dtype) for w in (w1, w2, w3)))

    return visit(x, indices, weights, counts, swiglu)


@ops.operation("fp8_experts", cost=_cost)
def fp8_experts(
    x: QuantizedTensor,
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    counts: Int[Tensor, " e"],
    w1: Weight,
    w2: Weight,
    w3: Weight,
) -> Float[Tensor, "n m"]:
    """Compute `experts` with simulated FP8 products, forward and backward.

    Source: DeepSeek-V3 report, section 3.3.
    """
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for i in counts.nonzero().flatten().tolist():
        token, choice = (indices == i).nonzero(as_tuple=True)
        rows = rows_of(x, token)
        gate, up = fp8_matmul(rows, expert_of(w1, i)), fp8_matmul(rows, expert_of(w3, i))
        out = fp8_swiglu_matmul(gate, up, expert_of(w2, i))
        y = y.index_add(0, token, weights[token, choice, None].to(x.dtype) * out)
    return y


def _refuse_transforms(*_: Any, **__: Any) -> Any:
    raise ValueError("experts in FP8 have no version for torch.func and torch.export; use a model without FP8")


quantized_experts.for_transforms(_refuse_transforms)
fp8_experts.for_transforms(_refuse_transforms)


@fp8_experts.eager
def _(
    x: QuantizedTensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Weight, w2: Weight, w3: Weight
) -> Tensor:
    def swiglu(i: int, rows: QuantizedTensor) -> Tensor:
        return _fp8_swiglu(rows, expert_of(w1, i), expert_of(w2, i), expert_of(w3, i))

    coded = any(isinstance(w, QuantizedTensor) for w in (w1, w2, w3))
    if coded or (not torch.is_grad_enabled() and few(x, indices, counts)):
        return visit(x, indices, weights, counts, swiglu)
    slots = sort_by_expert(indices, counts, row_alignment(x, indices, counts))
    return combine(_fp8_swiglu(dispatch_quantized(x, slots), w1, w2, w3, slots.ends), weights, slots)


def visit(x: X, indices: Tensor, weights: Tensor, counts: Tensor, swiglu: Callable[[int, X], Tensor]) -> Tensor:
    """Run the chosen experts one after the other. swiglu(i, rows) returns expert i's output for its rows."""
    if x.shape[0] == 1:  # decoding: nothing to sort
        return weights.to(x.dtype) @ torch.cat([swiglu(i, x) for i in indices[0].tolist()])
    slots = sort_by_expert(indices, counts)
    sizes = counts.tolist()
    out: list[Tensor] = []
    for i, tokens in enumerate(slots.token.split(sizes)):
        if sizes[i]:
            out.append(swiglu(i, rows_of(x, tokens)))
    y = torch.cat(out) if out else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return combine(y, weights, slots)


def expert_of(w: Weight, i: int) -> Tensor | QuantizedTensor:
    """Return the matrix of expert i."""
    if isinstance(w, Tensor):
        return w[i]
    codes = w.codes[i]
    return replace(w, codes=codes, scales=w.scales[i], shape=codes.shape)


def few(x: Tensor | QuantizedTensor, indices: Tensor, counts: Tensor) -> bool:
    """Return True where a CPU runs the chosen experts one after the other faster than a grouped product.

    A grouped product spends time on experts without rows too (docs/log.md).
    """
    return x.device.type == "cpu" and 2 * indices.numel() <= counts.shape[0]


def row_alignment(x: Tensor | QuantizedTensor, indices: Tensor, counts: Tensor) -> int:
    """Return the multiple of rows at which each expert's rows start.

    oneDNN prepares a BF16 product for each new number of rows. Multiples of 64 repeat, so it reuses them (docs/log.md).
    """
    enough = indices.numel() >= 64 * counts.shape[0]
    return 64 if enough and x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1


def _swiglu(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    dtype = rows.dtype
    hidden = F.silu(F.linear(rows, w1.to(dtype))) * F.linear(rows, w3.to(dtype))
    return F.linear(hidden, w2.to(dtype))


def _grouped_swiglu(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ends: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        w13 = torch.cat((w1.to(rows.dtype), w3.to(rows.dtype)), 1)  # one product reads the rows once
        gate, up = grouped_linear(rows, w13, ends).chunk(2, -1)
    else:  # joining them costs more than it saves where the step has no backward
        gate, up = grouped_linear(rows, w1, ends), grouped_linear(rows, w3, ends)
    return grouped_linear(F.silu(gate) * up, w2, ends)


def _fp8_swiglu(rows: QuantizedTensor, w1: Weight, w2: Weight, w3: Weight, ends: Tensor | None = None) -> Tensor:
    gate, up = (fp8_matmul(rows, w, ends=ends) for w in (w1, w3))
    return fp8_swiglu_matmul(gate, up, w2, ends=ends)


def _dense(w: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    return w.to(dtype) if isinstance(w, Tensor) else w.dequantize(dtype)


def rows_of(x: X, rows: Int[Tensor, " rows"]) -> X:
    """Return some rows of a matrix, with their gradient."""
    if isinstance(x, Tensor):
        return x.index_select(0, rows)
    return replace(x.select_rows(rows), source=None if x.source is None else x.source.index_select(0, rows))
