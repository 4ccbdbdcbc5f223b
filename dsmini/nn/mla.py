"""Multi-head Latent Attention: keys and values of all heads are projections of one small latent.

For a token with hidden state h (report, section 2.1.1):
    c_kv   = kv_norm(W_DKV h)          the latent, kv_lora_rank wide: cached
    k_rope = RoPE(W_KR h)              one rotary key for all heads:  cached
    k_nope, v = split(W_UK_UV c_kv)    for each head, made from the latent when needed
    q_nope, q_rope = split(W_UQ q_norm(W_DQ h)), q_rope rotated
A head's logit is q_nope.k_nope + q_rope.k_rope. The cache holds kv_lora_rank + qk_rope_head_dim numbers a token and
layer, whatever the number of heads.

There are two ways to attend to the cache. Expanded computes k_nope and v of every cached token again. Absorbed moves
W_UK over to the query and W_UV after the sum (DeepSeek-V2 report, section 2.1.2): with k_nope = W_UK c_kv
    q_nope.k_nope = (W_UK^T q_nope).c_kv        sum_t p_t v_t = W_UV (sum_t p_t c_kv_t)
All heads then read the one latent, as in multi-query attention with keys kv_lora_rank + qk_rope_head_dim wide. A pair
of query and key costs more, but no cached latent is expanded. `AttentionWork` counts both forms, and the cheaper runs.
"""

from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config, mask_function
from dsmini.functional.cached_attention import (
    AttentionWork,
    Mask,
    absorbed_attention,
    cached_attention,
    count_work,
    hidden_keys,
    keys_and_values,
)
from dsmini.functional.causal_attention import causal_attention
from dsmini.functional.linear import quantize_once
from dsmini.functional.rope import Table, apply_rope
from dsmini.nn.cache import Past
from dsmini.nn.fp8 import make_linear, output_linear
from dsmini.nn.linear import dense_weight, is_direct
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope
from dsmini.numerics import QuantizedTensor


def check_sequences(x: Tensor) -> None:
    """Raise ValueError for hidden states that are not [b, s, m], such as the rows [n, m] that a gate takes."""
    if x.dim() != 3:
        fix = "x[None] is one sequence" if x.dim() == 2 else "join its first dimensions"
        raise ValueError(f"attention got {tuple(x.shape)}; want [b, s, m], sequences of hidden states; {fix}")


def attend(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t v"],
    scale: float,
    *,
    past: Past | None,
    documents: Int[Tensor, "b s"] | None,
    mask: Mask | None,
) -> Float[Tensor, "b h s v"]:
    """Attend causally: to the new tokens, or to all rows of a cache.

    Args:
        mask: hides more keys than those after a query.
    """
    if past is not None and not past.window.fresh:
        hidden = past.window.mask if mask is None else past.window.masked(mask)
    elif mask is not None:
        hidden = hidden_keys(mask, torch.arange(q.shape[2], device=q.device)[None], q.shape[2])
        if documents is not None:
            hidden = hidden | (documents[:, :, None] != documents[:, None, :])
    else:
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
        return causal_attention(q, k, v, scale, documents)
    return cached_attention(q, k, v, scale, hidden)


class MLA(nn.Module):
    """Multi-head Latent Attention. From a config, or from plain arguments: MLA(dim=64, n_heads=2).

    q_lora_rank None projects the query directly (V2-Lite). Arguments that are left out are the toy's.

    Args:
        mask: hides more keys than those after a query. `lambda q, k: q - k >= 4096` is a sliding window: a function of
            the positions of queries and keys, True for keys that a query may not see.

    Source: DeepSeek-V3 report, section 2.1.1, equations 1 to 11.
    """

    def __init__(self, config: ModelConfig | None = None, /, *, mask: Mask | None = None, **arguments: Any) -> None:
        super().__init__()
        self.mask = mask_function(mask)
        c = layer_config(config, arguments)
        self.rope = Rope.from_config(c)
        self.scale = self.rope.softmax_scale(c.qk_head_dim)
        self.n_heads = c.n_heads
        self.kv_lora_rank = c.kv_lora_rank
        self.qk_nope_head_dim, self.v_head_dim = c.qk_nope_head_dim, c.v_head_dim
        self.wq = self.wq_a = self.q_norm = self.wq_b = None
        if c.q_lora_rank is None:
            self.wq = make_linear(c, c.dim, c.n_heads * c.qk_head_dim)
        else:
            self.wq_a = make_linear(c, c.dim, c.q_lora_rank)
            self.q_norm = RMSNorm(c.q_lora_rank)  # eps 1e-6 whatever norm_eps says: DeepSeek's code does so
            self.wq_b = make_linear(c, c.q_lora_rank, c.n_heads * c.qk_head_dim)
        self.q_head_norm = RMSNorm(c.qk_head_dim, c.norm_eps) if c.qk_norm else None
        self.k_head_norm = RMSNorm(c.qk_head_dim, c.norm_eps) if c.qk_norm else None
        self.wkv_a = make_linear(c, c.dim, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm = RMSNorm(c.kv_lora_rank)
        self.wkv_b = make_linear(c, c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.wo = output_linear(c, c.n_heads * c.v_head_dim)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        table: Table | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "b s m"]:
        """Attend causally, expanded: keys and values of every head are made from the latents.

        With a past whose form is absorbed, or where that is less work, this is `decode`.

        Args:
            table: rope.table(positions). None: that of positions 0, 1, ...
            documents: number of each position's document. A position sees its own document only.
            past: this layer's part of a cache. The new tokens are appended to it and attend to all its rows.
        """
        check_sequences(x)
        table = table or self.rope.table(torch.arange(x.shape[1], device=x.device))
        if past is not None and self.form_for(x.shape[1], past) == "absorbed":
            return self.decode(x, table, past)
        # 1. queries: [b, s, h, n + r]
        x = quantize_once(x, self.wkv_a, self.wq if self.wq_a is None else self.wq_a)
        q = self.queries(x, table)
        # 2. latent and rotary key, which are cached: [b, t, c] and [b, t, r]
        c_kv, k_rope = self.latents(x, table)
        if past is not None:
            c_kv, k_rope = past.extend((c_kv, k_rope), q.dtype)
        # 3. keys and values of every head: [b, t, h, n + r] and [b, t, h, v]
        k, v = keys_and_values(self.wkv_b(c_kv), k_rope, self.n_heads, self.qk_nope_head_dim)
        if self.q_head_norm is not None and self.k_head_norm is not None:
            q, k = self.q_head_norm(q), self.k_head_norm(k)
        # 4. attention: [b, h, s, v]
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = attend(q, k, v, self.scale, past=past, documents=documents, mask=self.mask)
        return self.wo(rearrange(y, "b h s v -> b s (h v)"))

    def decode(self, x: Float[Tensor, "b s m"], table: Table, past: Past) -> Float[Tensor, "b s m"]:
        """Attend to a cache, absorbed: every head reads the latents themselves, and nothing is expanded.

        Source: DeepSeek-V2 report, section 2.1.2.

        Raises: ValueError with qk_norm.
        """
        if self.q_head_norm is not None:
            raise ValueError(
                "form='absorbed' with qk_norm: a normed head is not a linear map of the latent; use expanded"
            )
        # 1. queries: [b, s, h, n] and [b, s, h, r]
        x = quantize_once(x, self.wkv_a, self.wq if self.wq_a is None else self.wq_a)
        q_nope, q_rope = self.queries(x, table).tensor_split((self.qk_nope_head_dim,), -1)
        # 2. the cache with the new rows [latent | rotary key]: [b, t, c + r]
        past.append(self.latents(x, table))
        rows = past.store.read(past.window.end, q_nope.dtype)
        # 3. attention, W_UK moved to the queries and W_UV after the sum: [b, s, h v]
        w_uk, w_uv = self._absorbed_halves(q_nope.dtype, past)
        hidden = past.window.mask if self.mask is None else past.window.masked(self.mask)
        return self.wo(absorbed_attention(q_nope, q_rope, rows, w_uk, w_uv, self.scale, hidden))

    def queries(
        self,
        x: Float[Tensor, "b s m"] | QuantizedTensor,
        table: Table,
        latent: Float[Tensor, "b s l"] | None = None,
    ) -> Float[Tensor, "b s h d"]:
        """Return each head's query: qk_nope_head_dim without position, then qk_rope_head_dim rotated.

        Args:
            latent: the normed compressed query, where another reader made it already.
        """
        if self.wq is not None:
            q = self.wq(x)
        else:
            assert self.wq_a is not None and self.q_norm is not None and self.wq_b is not None
            q = self.wq_b(self.q_norm(self.wq_a(x)) if latent is None else latent)
        q = rearrange(q, "b s (h d) -> b s h d", h=self.n_heads)
        q_nope, q_rope = q.tensor_split((self.qk_nope_head_dim,), -1)
        return torch.cat((q_nope, apply_rope(q_rope, table)), -1)

    def latents(
        self, x: Float[Tensor, "b t m"] | QuantizedTensor, table: Table
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t r"]]:
        """Return what is cached of each token: the normed latent c_kv, and the rotary key of all heads."""
        c_kv, k_rope = self.wkv_a(x).tensor_split((self.kv_lora_rank,), -1)
        return self.kv_norm(c_kv), apply_rope(k_rope.unsqueeze(2), table).squeeze(2)

    def form_for(self, queries: int, past: Past) -> Literal["expanded", "absorbed"]:
        """Return the form in which `forward` attends to this past: the one it asks for, or the cheaper one.

        Normed heads have no absorbed form. A module in the place of wkv_b, such as a LoRA wrapper, is absorbed on
        request alone: its weight is computed again in each call.
        """
        if past.form != "auto":
            return past.form
        if self.q_head_norm is not None or not is_direct(self.wkv_b):
            return "expanded"
        return self.work(queries, past.window.end).cheaper

    def work(self, queries: int, keys: int) -> AttentionWork:
        """Count both forms of attention of this many new tokens to this many cached ones, the new ones included."""
        h, c = self.n_heads, self.kv_lora_rank
        return count_work(queries, keys, h=h, c=c, n=self.qk_nope_head_dim, r=self.rope.dim, v=self.v_head_dim)

    def absorbed_halves(self, dtype: torch.dtype) -> tuple[Float[Tensor, "h n c"], Float[Tensor, "h c v"]]:
        """Take wkv_b apart for the absorbed form: W_UK and W_UV of every head, in dtype."""
        w = rearrange(dense_weight(self.wkv_b, self.kv_lora_rank, dtype), "(h d) c -> h d c", h=self.n_heads)
        w_uk, w_uv = w.tensor_split((self.qk_nope_head_dim,), 1)
        return w_uk.contiguous(), w_uv.transpose(1, 2).contiguous()

    def _absorbed_halves(self, dtype: torch.dtype, past: Past) -> tuple[Tensor, Tensor]:
        """Return absorbed_halves, prepared once for a cache and again after a step, a load or a move of the weight.

        Nothing tells when the weight of another module changes, so it is prepared in each call.
        """
        if not is_direct(self.wkv_b):
            return self.absorbed_halves(dtype)
        weight = self.wkv_b.weight
        version = None if weight.is_inference() else weight._version
        key = (id(weight), weight.data_ptr(), version, dtype)
        return past.store.prepared(key, lambda: self.absorbed_halves(dtype))
