"""Cross-entropy of a linear layer's logits, without storing all logits.

The logits of a chunk of rows are computed at a time, then their gradient, and both are freed.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsmini import ops
from dsmini.functional.layers import product_dtype

IGNORE = -100
"""Target of a row that the loss leaves out."""
CHUNK = 1 << 22
"""Number of logits that exist at a time on a CPU: 16 MiB of them in FP32, which stay in a cache."""
OFF_CPU = 64
"""Factor by which more exist on other devices, 1 GiB.

Each chunk reads and writes the whole gradient of the weight, 8 bytes a number in FP32, and its three products make 6
FLOPs a row and number. A GPU that makes 300 FLOPs while its memory moves a byte spends at most a tenth of the time on
that gradient from 10 * 300 * 8 / 6 = 4,000 rows at its peak, and from 2,000 at half of it. 1 GiB is 2,076 rows of a
vocabulary of 129,280.
"""


def rows_at_a_time(weight: Float[Tensor, "v m"]) -> int:
    """Return the number of rows whose logits may exist together on the device of the weight."""
    return max(1, CHUNK * (1 if weight.is_cpu else OFF_CPU) // weight.shape[0])


@ops.eager("linear_cross_entropy")
def linear_cross_entropy_eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    of_hidden, of_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return ops.trained(lambda x, w: _loss_and_gradients(x, w, targets, of_hidden, of_weight), _scaled, hidden, weight)


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Return the sum over rows of -log softmax(hidden weight^T)[target], and its gradients, chunk by chunk."""
    chunk_rows = rows_at_a_time(weight)
    dtype = product_dtype(hidden)
    w = weight.to(hidden.dtype).to(dtype)
    grad_hidden = torch.zeros_like(hidden) if need_hidden else None
    wide = torch.promote_types(hidden.dtype, torch.float32)
    summed = torch.promote_types(weight.dtype, torch.float32) if len(hidden) > chunk_rows else weight.dtype
    grad_weight = torch.zeros_like(weight, dtype=summed) if need_weight else None  # a sum of chunks is not in BF16
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        h, target = hidden[rows].to(dtype), targets[rows]
        log_p = F.log_softmax(F.linear(h, w), -1, dtype=wide)
        kept = (target != IGNORE)[:, None]
        index = target.masked_fill(target == IGNORE, 0)[:, None]
        loss -= (log_p.gather(1, index) * kept).sum()
        if grad_hidden is None and grad_weight is None:
            continue
        p_minus_1 = log_p.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=log_p.dtype))
        grad_logits = (p_minus_1 * kept).to(dtype)
        if grad_hidden is not None:
            if dtype == hidden.dtype:
                torch.mm(grad_logits, w, out=grad_hidden[rows])
            else:
                grad_hidden[rows] = grad_logits @ w
        if grad_weight is not None:
            grad_weight += grad_logits.T @ h
    return loss, (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))


def _scaled(grad: Tensor, *gradients: Tensor | None) -> list[Tensor | None]:
    return [None if g is None else g * grad.to(g.dtype) for g in gradients]
