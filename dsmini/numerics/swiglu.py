"""SwiGLU, the activation of every feed-forward and expert: silu(gate) * up, with silu(x) = x sigmoid(x).

gate and up are what w1 and w3 make of the input. V4 clamps them before: with limit l, gate to at most l, and up to
[-l, l]. Their gradients are then zero outside. All of V4's is FP32, the expert's weight too, and is rounded once; V3
rounds each result, and weighs what the expert returns.

Source: Shazeer 2020; the released code of DeepSeek-V3 and of DeepSeek-V4 (swiglu_limit 10).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsmini.numerics.formats import at_least_fp32


def swiglu(
    gate: Float[Tensor, "*any f"],
    up: Float[Tensor, "*any f"],
    limit: float | None = None,
    weights: Float[Tensor, "*any 1"] | None = None,
) -> Float[Tensor, "*any f"]:
    """Return silu(gate) * up, in their dtype.

    Args:
        limit: V4's: clamp gate to at most this, and up to at most this magnitude, in FP32. None: V3's, without a clamp.
        weights: factor of each row, for V4's.
    """
    if limit is None:
        assert weights is None, "V3 weighs what an expert returns"
        return F.silu(gate) * up
    hidden = F.silu(at_least_fp32(gate).clamp(max=limit)) * at_least_fp32(up).clamp(-limit, limit)
    return (hidden if weights is None else weights * hidden).to(gate.dtype)


def swiglu_gradients(
    grad: Float[Tensor, "*any f"],
    gate: Float[Tensor, "*any f"],
    up: Float[Tensor, "*any f"],
    limit: float | None = None,
    weights: Float[Tensor, "*any 1"] | None = None,
) -> tuple[Float[Tensor, "*any f"], Float[Tensor, "*any f"], Float[Tensor, "*any 1"] | None]:
    """Return the gradients of gate, up and the weights, given that of the result."""
    if limit is None:
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate), None
    of_weights = None
    if weights is not None:
        of_weights = (grad * swiglu(gate, up, limit)).sum(-1, keepdim=True, dtype=weights.dtype)
        grad = (grad * weights).to(grad.dtype)
    low, middle = gate.clamp(max=limit), up.clamp(-limit, limit)
    of_gate, of_up, _ = swiglu_gradients(grad, low, middle)
    return of_gate.masked_fill(gate > limit, 0), of_up.masked_fill(up.abs() > limit, 0), of_weights
