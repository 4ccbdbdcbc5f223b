"""Multi-head Latent Attention: keys and values of all heads are projections of one small latent.

For a token with hidden state h (report, section 2.1.1):
    c_kv   = kv_norm(W_DKV h)          the latent, kv_lora_rank wide: cached
    k_rope = RoPE(W_KR h)              one rotary key for all heads:  cached
    k_nope, v = split(W_UK_UV c_kv)    for each head, made from the latent when needed
    q_nope, q_rope = split(W_UQ q_norm(W_DQ h)), q_rope rotated
A head's logit is q_nope.k_nope + q_rope.k_rope. The cache holds kv_lora_rank + qk_rope_head_dim numbers a token and
layer, whatever the number of heads.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.nn.attention import causal_attention
from dsmini.nn.linear import Linear
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope, Table, apply_rope


class MLA(nn.Module):
    """Multi-head Latent Attention in its expanded form. From a config, or from plain arguments: MLA(dim=64, n_heads=2).

    q_lora_rank None projects the query directly (V2-Lite). Arguments that are left out are the toy's.

    Source: DeepSeek-V3 report, section 2.1.1, equations 1 to 11.
    """

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        self.rope = Rope.from_config(c)
        self.scale = self.rope.softmax_scale(c.qk_head_dim)
        self.n_heads = c.n_heads
        self.kv_lora_rank, self.qk_nope_head_dim = c.kv_lora_rank, c.qk_nope_head_dim

        def linear(i: int, o: int, init_std: float = c.init_std) -> Linear:
            return Linear(i, o, init_std=init_std, precision=c.precision)

        self.wq = self.wq_a = self.q_norm = self.wq_b = None
        if c.q_lora_rank is None:
            self.wq = linear(c.dim, c.n_heads * c.qk_head_dim)
        else:
            self.wq_a = linear(c.dim, c.q_lora_rank)
            self.q_norm = RMSNorm(c.q_lora_rank)  # eps 1e-6 whatever norm_eps says: DeepSeek's code does so
            self.wq_b = linear(c.q_lora_rank, c.n_heads * c.qk_head_dim)
        self.q_head_norm = RMSNorm(c.qk_head_dim, c.norm_eps) if c.qk_norm else None
        self.k_head_norm = RMSNorm(c.qk_head_dim, c.norm_eps) if c.qk_norm else None
        self.wkv_a = linear(c.dim, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm = RMSNorm(c.kv_lora_rank)
        self.wkv_b = linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.wo = linear(c.n_heads * c.v_head_dim, c.dim, c.output_init_std)

    def forward(
        self, x: Float[Tensor, "b s m"], table: Table | None = None, documents: Int[Tensor, "b s"] | None = None
    ) -> Float[Tensor, "b s m"]:
        """Attend causally, with `documents` within each document; `table` is rope.table(positions), made for
        positions 0, 1, ... if left out."""
        table = table or self.rope.table(torch.arange(x.shape[1], device=x.device))
        q = self.queries(x, table)
        c_kv, k_rope = self.latents(x, table)
        kv = rearrange(self.wkv_b(c_kv), "b t (h d) -> b t h d", h=self.n_heads)
        k_nope, v = kv.tensor_split((self.qk_nope_head_dim,), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.n_heads, -1)), -1)
        if self.q_head_norm is not None and self.k_head_norm is not None:
            q, k = self.q_head_norm(q), self.k_head_norm(k)
        y = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale, documents=documents)
        return self.wo(rearrange(y, "b h s d -> b s (h d)"))

    def queries(self, x: Float[Tensor, "b s m"], table: Table) -> Float[Tensor, "b s h d"]:
        """Each head's query: qk_nope_head_dim without position, then qk_rope_head_dim rotated."""
        if self.wq is not None:
            q = self.wq(x)
        else:
            assert self.wq_a is not None and self.q_norm is not None and self.wq_b is not None
            q = self.wq_b(self.q_norm(self.wq_a(x)))
        q = rearrange(q, "b s (h d) -> b s h d", h=self.n_heads)
        q_nope, q_rope = q.tensor_split((self.qk_nope_head_dim,), -1)
        return torch.cat((q_nope, apply_rope(q_rope, table)), -1)

    def latents(
        self, x: Float[Tensor, "b t m"], table: Table
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t 1 r"]]:
        """What a cache holds of a token: the normed latent c_kv, and the rotary key that all heads share."""
        c_kv, k_rope = self.wkv_a(x).tensor_split((self.kv_lora_rank,), -1)
        return self.kv_norm(c_kv), apply_rope(k_rope.unsqueeze(2), table)
