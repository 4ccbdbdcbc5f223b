"""Rotary position embedding: rotate each adjacent pair of dimensions by its position's angle."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from dsmini import ops

Table = tuple[Float[Tensor, "*#b s pairs"], Float[Tensor, "*#b s pairs"]]
"""Cosine and sine of every position's angles, in FP32."""


def _cost(x: Tensor, table: Table) -> ops.Cost:
    return ops.Cost(x.nbytes + sum(t.nbytes for t in table), x.nbytes, 0)


@ops.operation("apply_rope", cost=_cost)
def apply_rope(x: Float[Tensor, "b s h r"], table: Table) -> Float[Tensor, "b s h r"]:
    """Rotate adjacent pairs of x's last dimension. The result is computed in FP32 and returned in x's dtype.

    A pair (x0, x1) is the complex number x0 + i x1. It is multiplied by cos + i sin.

    Source: Su et al. 2021; DeepSeek's released code for the interleaved pairs.
    """
    even, odd = x.to(torch.promote_types(x.dtype, table[0].dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.complex(even, odd) * torch.complex(*table).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@apply_rope.eager
def _(x: Tensor, table: Table) -> Tensor:
    cos, sin = (t.unsqueeze(-2) for t in table)
    even, odd = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def apply_rope_to_halves(x: Float[Tensor, "b s h r"], table: Table) -> Float[Tensor, "b s h r"]:
    """Rotate pairs of x's two halves, (x_j, x_{j + r/2}), by the same angles as apply_rope the adjacent ones.

    Source: DeepSeek-V3.2's indexer; GPT-NeoX, whose order most other models have.
    """
    pairs = rearrange(x, "b s h (two p) -> b s h (p two)", two=2)
    return rearrange(apply_rope(pairs, table), "b s h (p two) -> b s h (two p)", two=2)
