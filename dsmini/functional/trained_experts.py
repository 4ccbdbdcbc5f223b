"""The routed experts in training, with a backward of their own: two operations, which kernels can serve.

Forward keeps what w1 and w3 made of each token-expert pair, g and u. Of a pair with weight p and the gradient dy of its
token:

    h  = silu(g) u,    dh = p w2^T dy,    dg = dh u silu'(g),    du = dh silu(g)
    dp = h (w2^T dy),  dx = w1^T dg + w3^T du,  dw1 = dg x^T,  dw3 = du x^T,  dw2 = p dy h^T

dx is summed over a token's pairs, the weights' gradients over an expert's. experts.py takes this way where a kernel
serves it; elsewhere autograd differentiates the eager version.
"""

import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics.dispatch import sort_by_expert, weight_of_slots

LEAST = 1 << 20
"""Number of multiplications of a forward below which autograd's operations cost no more."""
W1 = Float[Tensor, "e f m"]
W2 = Float[Tensor, "e m f"]


@ops.operation("trained_experts")
def trained_experts(
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    counts: Int[Tensor, " e"],
    w1: W1,
    w2: W2,
    w3: W1,
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n*k f"], Float[Tensor, "n*k f"]]:
    """Return y, and g and u of each token-expert pair, in the order of experts, and of tokens within an expert."""
    token, slot, ends = sort_by_expert(indices, counts)
    y = torch.zeros_like(x)
    gate, up = (x.new_empty(token.shape[0], w1.shape[1]) for _ in range(2))
    share = weight_of_slots(weights, slot, gate)
    for i, pairs in _groups(ends):
        rows = x[token[pairs]]
        gate[pairs], up[pairs] = rows @ w1[i].to(x.dtype).T, rows @ w3[i].to(x.dtype).T
        out = (F.silu(gate[pairs]) * up[pairs]) @ w2[i].to(x.dtype).T
        y = y.index_add(0, token[pairs], share[pairs, None] * out)
    return y, gate, up


@ops.operation("trained_experts_gradients")
def trained_experts_gradients(
    grad: Float[Tensor, "n m"],
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    counts: Int[Tensor, " e"],
    gate: Float[Tensor, "n*k f"],
    up: Float[Tensor, "n*k f"],
    w1: W1,
    w2: W2,
    w3: W1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weights, w1, w2 and w3. An expert that nobody chose has gradients of zero."""
    token, slot, ends = sort_by_expert(indices, counts)
    share = weight_of_slots(weights, slot, gate)
    dx, dp = torch.zeros_like(x), torch.empty_like(share)
    dw1, dw2, dw3 = (torch.zeros_like(w) for w in (w1, w2, w3))
    for i, pairs in _groups(ends):
        dy, rows, g, u = grad[token[pairs]], x[token[pairs]], gate[pairs], up[pairs]
        sigmoid = g.sigmoid()
        swish = g * sigmoid
        dh = dy @ w2[i].to(x.dtype)
        dp[pairs] = (dh * swish * u).sum(-1)
        dh = share[pairs, None] * dh
        dg, du = dh * u * (sigmoid + swish * (1 - sigmoid)), dh * swish
        dx = dx.index_add(0, token[pairs], dg @ w1[i].to(x.dtype) + du @ w3[i].to(x.dtype))
        dw1[i], dw3[i], dw2[i] = dg.T @ rows, du.T @ rows, (share[pairs, None] * dy).T @ (swish * u)
    return dx, dp[slot].to(weights.dtype), dw1, dw2, dw3


def _groups(ends: Tensor) -> list[tuple[int, slice]]:
    """Return the experts that some token chose, each with their slots."""
    bounds = [0, *ends.tolist()]
    return [(i, slice(a, b)) for i, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b]


class TrainedExperts(torch.autograd.Function):
    """`experts` by the two operations. First derivatives only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
    ) -> Tensor:
        y, gate, up = trained_experts(x, indices, weights, counts, w1, w2, w3)
        ctx.save_for_backward(x, indices, weights, counts, gate, up, w1, w2, w3)
        ctx.backend = ops.chosen()
        return y

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # forward ran outside of autocast, or another version would have
        with ops.use(ctx.backend), torch.autocast(grad.device.type, enabled=False):
            dx, dp, dw1, dw2, dw3 = trained_experts_gradients(grad, *ctx.saved_tensors)
        return dx, None, dp, None, dw1, dw2, dw3


def train_experts(
    x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor | None:
    """Return `experts` by a kernel with a backward of its own, or None where none serves this call."""
    matrices, forward = (w1, w2, w3), 3 * indices.numel() * w1[0].numel()
    plain = all(w.dtype == torch.float32 and w.is_contiguous() for w in matrices)
    known = plain and weights.dtype == torch.float32 and x.dtype in (torch.float32, torch.bfloat16)
    if not known or forward < LEAST or not all(w.requires_grad for w in matrices):
        return None
    # an expert is computed by one thread; frozen ones want no gradients, which the kernel would make
    if w1.shape[0] < 2 * torch.get_num_threads() or not ops.serves("trained_experts", x):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    return cast(Tensor, TrainedExperts.apply(x, indices, weights, counts, w1, w2, w3))
