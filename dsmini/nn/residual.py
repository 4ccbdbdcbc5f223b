"""Residuals: what a sublayer reads of the hidden states between layers, and how its output is added to them.

A sublayer F (attention or feed-forward) does not know how many residual streams there are:

    x, mix = residual.read(states)            what F reads, after its norm
    states = residual.write(states, F(norm(x)), mix)

A model expands its embeddings to states before the first block, and collapses them before the last norm. Here is the
residual of one stream. Those of V4 and Hunyuan V4 have several: hyper_connections.py. Another one is a class with the
same four methods, and a name in CONNECTIONS.
"""

from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor, nn

from dsmini.config import ModelConfig
from dsmini.nn.hyper_connections import HyperConnection, IdentityConnection, StreamHead

CONNECTIONS = MappingProxyType({"sinkhorn": HyperConnection, "identity": IdentityConnection})
"""Connections of a sublayer to several streams, by config.hc_kind."""


class PlainResidual(nn.Module):
    """The residual of one stream, x + F(norm(x)): it has no parameters."""

    def expand(self, x: Float[Tensor, "b s m"]) -> Float[Tensor, "b s m"]:
        return x

    def read(self, x: Float[Tensor, "b s m"]) -> tuple[Float[Tensor, "b s m"], None]:
        return x, None

    def write(self, x: Float[Tensor, "b s m"], output: Float[Tensor, "b s m"], mix: None) -> Float[Tensor, "b s m"]:
        return x + output

    def collapse(self, x: Float[Tensor, "b s m"]) -> Float[Tensor, "b s m"]:
        return x


def residual_of(c: ModelConfig, sublayer: int) -> PlainResidual | HyperConnection:
    """Return the residual of a sublayer, two of which are in a block."""
    options = {"sinkhorn_iters": c.hc_sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.norm_eps, "home": sublayer}
    return CONNECTIONS[c.hc_kind](c.dim, c.hc_mult, **options) if c.hc_mult > 1 else PlainResidual()


def head_of(c: ModelConfig) -> PlainResidual | StreamHead:
    """Return the two ends of a model's residual: it expands embeddings, and collapses what the last block gave."""
    return StreamHead(c.dim, c.hc_mult, eps=c.hc_eps, norm_eps=c.norm_eps) if c.hc_mult > 1 else PlainResidual()
