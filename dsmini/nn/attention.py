"""MHA, GQA and MQA: the baselines of MLA."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config, mask_function
from dsmini.functional.cached_attention import Mask
from dsmini.functional.linear import quantize_once
from dsmini.functional.rope import Table, apply_rope
from dsmini.nn.cache import Past
from dsmini.nn.fp8 import make_linear, output_linear
from dsmini.nn.mla import attend, check_sequences
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary keys and queries: MLA's baseline.

    Heads are qk_nope_head_dim wide for q and k and v_head_dim for v, rotated over their whole width: with V3's sizes
    that is the MHA with 128-wide heads against which MLA's cache is 98.24 % smaller.

    Args:
        mask: as in MLA.
    """

    def __init__(self, config: ModelConfig | None = None, /, *, mask: Mask | None = None, **arguments: Any) -> None:
        super().__init__()
        self.mask = mask_function(mask)
        c = layer_config(config, arguments if config else {"attention": "mha", **arguments})
        if c.is_mla:
            module = c.attention.upper()
            raise ValueError(f"attention={c.attention!r} is another module; use {module}, or 'mha', 'gqa' or 'mqa'")
        self.rope = Rope.from_config(c)
        self.scale = self.rope.softmax_scale(c.qk_nope_head_dim)
        self.n_heads, self.n_kv_heads = c.n_heads, c.kv_heads
        self.wq = make_linear(c, c.dim, c.n_heads * c.qk_nope_head_dim)
        self.wk = make_linear(c, c.dim, c.kv_heads * c.qk_nope_head_dim)
        self.wv = make_linear(c, c.dim, c.kv_heads * c.v_head_dim)
        self.q_head_norm = RMSNorm(c.qk_nope_head_dim, c.norm_eps) if c.qk_norm else None
        self.k_head_norm = RMSNorm(c.qk_nope_head_dim, c.norm_eps) if c.qk_norm else None
        self.wo = output_linear(c, c.n_heads * c.v_head_dim)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        table: Table | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "b s m"]:
        """Attend causally.

        Args:
            table: rope.table(positions). None: that of positions 0, 1, ...
            documents: number of each position's document. A position sees its own document only.
            past: this layer's part of a cache. The new tokens are appended to it and attend to all its rows.
        """
        check_sequences(x)
        # 1. queries and keys, rotated: [b, s, h, d] and [b, s, g, d]
        table = table or self.rope.table(torch.arange(x.shape[1], device=x.device))
        x = quantize_once(x, self.wq, self.wk, self.wv)
        q = apply_rope(rearrange(self.wq(x), "b s (h d) -> b s h d", h=self.n_heads), table)
        k = apply_rope(rearrange(self.wk(x), "b s (g d) -> b s g d", g=self.n_kv_heads), table)
        if self.q_head_norm is not None and self.k_head_norm is not None:
            q, k = self.q_head_norm(q), self.k_head_norm(k)
        # 2. rows as they are cached, keys and values of all heads side by side: [b, s, g d] and [b, s, g v]
        q, k, v = q.transpose(1, 2), k.flatten(2), self.wv(x)
        if past is not None:
            k, v = past.extend((k, v), q.dtype)
        # 3. attention: [b, h, s, v]
        k, v = (rearrange(rows, "b t (g d) -> b g t d", g=self.n_kv_heads) for rows in (k, v))
        y = attend(q, k, v, self.scale, past=past, documents=documents, mask=self.mask)
        return self.wo(rearrange(y, "b h s d -> b s (h d)"))
