"""Cross-entropy of a linear layer's logits, without storing all logits.

With a vocabulary of 129280 the FP32 logits of one 4096-token sequence take 2.1 GB. The eager version computes them for
a chunk of rows at a time, computes the gradient from them, and frees them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.functional.fp32 import at_least_fp32
from dsmini.functional.recompute import recomputed

IGNORE = -100
"""Target of a row that the loss leaves out, as in torch's cross_entropy."""


def _cost(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None) -> ops.Cost:
    flops = 2 * hidden.shape[0] * weight.numel()
    return ops.Cost(hidden.nbytes + weight.nbytes + targets.nbytes, 4, flops)


@ops.operation("linear_cross_entropy", cost=_cost)
def linear_cross_entropy(
    hidden: Float[Tensor, "n m"],
    weight: Float[Tensor, "v m"],
    targets: Int[Tensor, " n"],
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over rows of the cross-entropy of logits hidden @ weight^T, in nats, FP32.

    Rows with the target IGNORE are left out. The eager version has first derivatives only.

    Args:
        chunk_rows: rows of logits that exist at a time. None: about 16 MiB of them. The reference holds all rows.
    """
    logits = at_least_fp32(hidden @ weight.to(hidden.dtype).T)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


@linear_cross_entropy.eager
def linear_cross_entropy_eager(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Compute linear_cross_entropy chunk by chunk."""
    rows = rows_at_a_time(chunk_rows, weight.shape[0])
    # gradients are always off inside the function, so it gets the mode of the caller as an argument
    return _LinearCrossEntropy.apply(hidden, weight, targets, rows, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


def rows_at_a_time(chunk_rows: int | None, vocab_size: int) -> int:
    """Return chunk_rows, which must be 1 or more; for None the number of rows whose FP32 logits take about 16 MiB."""
    if chunk_rows is None:
        return max(1, 2**22 // vocab_size)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} is less than 1; use 1 or more, or leave it out")
    return chunk_rows


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "n m"], targets: Int[Tensor, " n"], chunk_rows: int
) -> Float[Tensor, ""]:
    """Compute linear_cross_entropy of any head, a function from hidden states to logits.

    Backward computes the logits of each chunk again.
    """

    def chunk(h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(at_least_fp32(head(h)), target, ignore_index=IGNORE, reduction="sum")

    parts = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
    return torch.stack([recomputed(chunk, h, target) for h, target in parts]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden weight^T)[target]; gradients are computed chunk by chunk in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, with_gradients: bool
    ) -> Tensor:
        w = weight.to(hidden.dtype)
        need_hidden, need_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            h, target = hidden[rows], targets[rows]
            log_p = F.log_softmax(at_least_fp32(F.linear(h, w)), -1)
            kept = (target != IGNORE)[:, None]
            index = target.masked_fill(target == IGNORE, 0)[:, None]
            loss -= (log_p.gather(1, index) * kept).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            p_minus_1 = log_p.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=log_p.dtype))
            grad_logits = (p_minus_1 * kept).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, w, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, weight, None, None, None
