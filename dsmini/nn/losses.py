"""The three losses: next token, multi-token prediction, expert balance; and a cross-entropy that holds no logits.

With a vocabulary of 129280 the FP32 logits of one 4096-token sequence are 2.1 GB. `linear_cross_entropy` makes
them for a chunk of rows at a time, turns them into the gradient at once, and lets them go.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmini.nn.fp32 import at_least_fp32
from dsmini.nn.gate import Routing

IGNORE = -100
"""A target with this value counts in no loss, as in torch's cross_entropy."""


class Losses(NamedTuple):
    """A training step's losses, FP32 scalars, and what the gates decided."""

    main: Float[Tensor, ""]
    """Mean cross-entropy of the next token, in nats."""
    mtp: Float[Tensor, ""]
    """Mean over depths of the multi-token prediction losses, without its weight; 0 without MTP."""
    balance: Float[Tensor, ""]
    """Sum over MoE layers of the sequence-wise balance losses, without their weight; 0 without MoE."""
    total: Float[Tensor, ""]
    """main + mtp_weight * mtp + balance_alpha * balance: what is minimised."""
    routing: list[Routing]
    """One for each MoE layer, those of the MTP blocks last."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden weight^T)[target]; gradients are made chunk by chunk in the forward."""

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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return hidden, weight, None, None, None


def linear_cross_entropy(
    hidden: Float[Tensor, "n m"],
    weight: Float[Tensor, "v m"],
    targets: Int[Tensor, " n"],
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """Sum over rows of the cross-entropy of logits hidden @ weight^T, in nats; targets of IGNORE count nothing.

    At most chunk_rows rows of logits exist at a time (left out: about 16 MiB of them). First derivatives only.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} is less than 1; use 1 or more, or leave it out")
    rows = chunk_rows or max(1, 2**22 // weight.shape[0])
    # inside the function gradients are always off, so it is told whether they were on
    return _LinearCrossEntropy.apply(hidden, weight, targets, rows, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]
