"""The gated activation of feed-forwards: silu(gate) * up."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsmini import ops


def _cost(gate: Tensor, up: Tensor) -> ops.Cost:
    return ops.Cost(gate.nbytes + up.nbytes, gate.nbytes, 0)


@ops.operation("swiglu", cost=_cost)
def swiglu(gate: Float[Tensor, "*batch f"], up: Float[Tensor, "*batch f"]) -> Float[Tensor, "*batch f"]:
    """Return silu(gate) * up, with silu(x) = x sigmoid(x).

    Source: Shazeer 2020.
    """
    return gate * gate.sigmoid() * up


@swiglu.eager
def _(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
