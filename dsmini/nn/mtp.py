"""Multi-token prediction: after the next token, the one after that, from the same trunk.

The block of depth k (1, 2, ...) joins what depth k-1 knows at position i with the embedding of token i+k, and
predicts token i+k+1. Embedding and output head are the main model's. Position i never sees the token it predicts:
given its own target's embedding, a block would learn to copy.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.functional.rope import Table
from dsmini.nn.block import Block
from dsmini.nn.cache import Past
from dsmini.nn.gate import Routing
from dsmini.nn.linear import Linear
from dsmini.nn.norm import RMSNorm


class MTP(nn.Module):
    """One depth of multi-token prediction: eh_proj(concat(enorm(embedding), hnorm(hidden))), then a whole block.

    The embedding comes first in the concatenation, as the released weights need it and the reverse of equation 21.

    Args:
        depth: 0 for the first MTP block; it is block n_layers + depth of the model.

    Source: DeepSeek-V3 report, section 2.2, equations 21 to 23.
    """

    def __init__(self, config: ModelConfig | None = None, /, depth: int = 0, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        self.enorm = RMSNorm(c.dim, c.norm_eps)
        self.hnorm = RMSNorm(c.dim, c.norm_eps)
        self.eh_proj = Linear(2 * c.dim, c.dim, init_std=c.init_std)
        self.block = Block(c, layer=c.n_layers + depth)
        self.norm = RMSNorm(c.dim, c.norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "b s m"],
        embedding: Float[Tensor, "b s m"],
        table: Table | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        past: Past | None = None,
    ) -> tuple[Float[Tensor, "b s m"], Routing | None]:
        """From what the depth before knows at each position and the embedding of the token that it was to predict,
        the block's output before `norm`, and its routing."""
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), -1))
        return self.block(x, table, documents, past)
