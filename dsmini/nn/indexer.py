"""The lightning indexer of DeepSeek Sparse Attention: small heads that score every key for every query.

For a token with hidden state h, and its query latent c_q, from which MLA makes its own queries:
    q_j = H RoPE(W_QB c_q)_j        a query for each of index_n_heads heads
    k   = H RoPE(LayerNorm(W_K h))  one key for all heads: cached
    w_j = W_w h                     a weight for each head, in FP32
    I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]) / sqrt(heads * head dim)
Attention then reads the index_topk keys with the largest scores. RoPE turns the first qk_rope_head_dim numbers, where
MLA turns the last ones, and it pairs the two halves of them, where MLA pairs neighbours; its angles are MLA's, YaRN
included. H is the Hadamard transform. It leaves all products as they are, and makes the rounding to FP8 harmless: no
number of a row is much larger than the others.

Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1; DeepSeek's released inference code.
"""

from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.functional.rope import Table
from dsmini.functional.sparse_attention import index_scores, turned
from dsmini.nn.fp8 import make_linear
from dsmini.nn.linear import FP32Linear
from dsmini.nn.norm import LayerNorm
from dsmini.numerics import quantize


class Indexer(nn.Module):
    """The indexer of a layer. From a config, or from plain arguments with the three index sizes."""

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments if config else {"attention": "dsa", **arguments})
        if c.index_n_heads is None or c.index_head_dim is None or c.index_topk is None:
            raise ValueError(f"attention={c.attention!r} has no indexer; use attention='dsa'")
        self.n_heads, self.head_dim, self.topk = c.index_n_heads, c.index_head_dim, c.index_topk
        self.interleaved = c.indexer_rope_interleave
        self.fp8 = c.indexer_fp8
        width = c.dim if c.q_lora_rank is None else c.q_lora_rank
        self.wq_b = make_linear(c, width, self.n_heads * self.head_dim)
        self.wk = make_linear(c, c.dim, self.head_dim)
        self.k_norm = LayerNorm(self.head_dim)
        self.weights_proj = FP32Linear(c.dim, self.n_heads, init_std=c.init_std)

    def forward(
        self, x: Float[Tensor, "b s m"], latent: Float[Tensor, "b s l"], table: Table, keys: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b s t"]:
        """Return the scores I[t, s] of new tokens and keys, in FP32, with gradients and without a mask.

        Args:
            latent: the normed compressed query of MLA, or x where it compresses none.
            keys: `keys` of all tokens that may be scored.
        """
        return index_scores(self.queries(latent, table), keys, self.head_weights(x))

    def queries(self, latent: Float[Tensor, "b s l"], table: Table) -> Float[Tensor, "b s h d"]:
        """Return the query of each head."""
        return self._turned(rearrange(self.wq_b(latent), "b s (h d) -> b s h d", h=self.n_heads), table)

    def keys(self, x: Float[Tensor, "b t m"], table: Table) -> Float[Tensor, "b t d"]:
        """Return the key of each token, which is cached."""
        return self._turned(self.k_norm(self.wk(x)).unsqueeze(2), table).squeeze(2)

    def head_weights(self, x: Float[Tensor, "b s m"]) -> Float[Tensor, "b s h"]:
        """Return the weight of each head, in FP32, with both constant factors of the score."""
        return self.weights_proj(x) * (self.n_heads * self.head_dim) ** -0.5

    def _turned(self, x: Float[Tensor, "b s h d"], table: Table) -> Float[Tensor, "b s h d"]:
        x = turned(x, table, halves=not self.interleaved)
        # a scale is a power of two: products of rounded numbers are those of the codes, times both scales
        return quantize(x).dequantize(x.dtype) if self.fp8 else x
