"""SwiGLU, the activation of every feed-forward and expert: silu(gate) * up, with silu(x) = x sigmoid(x).

gate and up are what w1 and w3 make of the input. V4 clamps them before: with limit l, gate to at most l, and up to
[-l, l]. Their gradients are then zero outside.

Source: Shazeer 2020; DeepSeek-V4 (swiglu_limit 10).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def swiglu(
    gate: Float[Tensor, "*any f"], up: Float[Tensor, "*any f"], limit: float | None = None
) -> Float[Tensor, "*any f"]:
    """Return silu(gate) * up.

    Args:
        limit: clamp gate to at most this, and up to at most this magnitude. None: clamp nothing.
    """
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def swiglu_gradients(
    grad: Float[Tensor, "*any f"],
    gate: Float[Tensor, "*any f"],
    up: Float[Tensor, "*any f"],
    limit: float | None = None,
) -> tuple[Float[Tensor, "*any f"], Float[Tensor, "*any f"]]:
    """Return the gradients of gate and up, given that of the result."""
    if limit is None:
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
    low, middle = gate.clamp(max=limit), up.clamp(-limit, limit)
    of_gate, of_up = swiglu_gradients(grad, low, middle)
    return of_gate.masked_fill(gate > limit, 0), of_up.masked_fill(up.abs() > limit, 0)
