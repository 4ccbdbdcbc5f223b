"""Multi-head Latent Attention: keys and values of all heads are projections of one small latent.

For a token with hidden state h (report, section 2.1.1):
    c_kv   = kv_norm(W_DKV h)          the latent, kv_lora_rank wide: cached
    k_rope = RoPE(W_KR h)              one rotary key for all heads:  cached
    k_nope, v = split(W_UK_UV c_kv)    for each head, made from the latent when needed
    q_nope, q_rope = split(W_UQ q_norm(W_DQ h)), q_rope rotated
A head's logit is q_nope.k_nope + q_rope.k_rope. The cache holds kv_lora_rank + qk_rope_head_dim numbers a token and
layer, whatever the number of heads.

There are two ways to attend to what is cached. Expanded makes k_nope and v of every cached token anew. Absorbed moves
W_UK over to the query and W_UV behind the sum (DeepSeek-V2 report, section 2.1.2): with k_nope = W_UK c_kv
    q_nope.k_nope = (W_UK^T q_nope).c_kv        sum_t p_t v_t = W_UV (sum_t p_t c_kv_t)
so that all heads read the one latent, as in multi-query attention with keys of kv_lora_rank + qk_rope_head_dim. A pair
of query and key costs more so, but nothing is made anew of the context: `Work` counts both, and the cheaper is taken.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.nn.attention import attend, causal_attention, output_linear
from dsmini.nn.cache import Past
from dsmini.nn.linear import Linear
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope, Table, apply_rope
from dsmini.numerics import QuantizedTensor, quantize


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of attention with a cache, for one sequence and layer, in both forms. A multiply-add is
    two; causality is not taken off; what both forms do is left out."""

    queries: int
    keys: int
    to_expand: int
    """Of keys and values from the latents of all keys."""
    expanded: int
    """All of the expanded form, to_expand included."""
    absorbed: int

    @property
    def cheaper(self) -> Literal["expanded", "absorbed"]:
        """The form with fewer operations."""
        return "absorbed" if self.absorbed < self.expanded else "expanded"

    def __str__(self) -> str:
        return (
            f"{self.cheaper}, for {self.queries:,} queries and {self.keys:,} keys: expanded "
            f"{self.expanded / 1e6:,.1f} MFLOP, {self.to_expand / 1e6:,.1f} of them to expand the latents, absorbed "
            f"{self.absorbed / 1e6:,.1f}"
        )


class MLA(nn.Module):
    """Multi-head Latent Attention. From a config, or from plain arguments: MLA(dim=64, n_heads=2).

    q_lora_rank None projects the query directly (V2-Lite). Arguments that are left out are the toy's.

    Source: DeepSeek-V3 report, section 2.1.1, equations 1 to 11.
    """

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        self.rope = Rope.from_config(c)
        self.scale = self.rope.softmax_scale(c.qk_head_dim)
        self.n_heads = c.n_heads
        self.kv_lora_rank = c.kv_lora_rank
        self.qk_nope_head_dim, self.v_head_dim = c.qk_nope_head_dim, c.v_head_dim

        def linear(i: int, o: int) -> Linear:
            return Linear(i, o, init_std=c.init_std, precision=c.precision)

        self.precision = c.precision
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
        self.wo = output_linear(c, c.n_heads * c.v_head_dim)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        table: Table | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "b s m"]:
        """Attend causally, with `documents` within each document; `table` is rope.table(positions), made for
        positions 0, 1, ... if left out. With a `past`, also to what is cached, where the new tokens are put too."""
        table = table or self.rope.table(torch.arange(x.shape[1], device=x.device))
        read = quantize(x) if self.precision == "fp8" else x  # once, for both
        q = self.queries(read, table)
        c_kv, k_rope = self.latents(read, table)
        if past is not None:
            past.store.write(torch.cat((c_kv, k_rope.squeeze(2)), -1), past.window)
            if self.form_for(x.shape[1], past) == "absorbed":
                return self.wo(self._absorbed(q, past))
            if not past.window.fresh or past.store.rounds(q.dtype):
                rows = past.store.read(x.shape[1] if past.window.fresh else past.window.end, q.dtype)
                c_kv, k_rope = rows[..., : self.kv_lora_rank], rows[..., None, self.kv_lora_rank :]
        k, v = self._expand(c_kv, k_rope)
        q = (q if self.q_head_norm is None else self.q_head_norm(q)).transpose(1, 2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past is None or past.window.fresh:
            y = causal_attention(q, k, v, self.scale, documents=documents)
        else:
            y = attend(q, k, v, self.scale, past.window.hidden)
        return self.wo(rearrange(y, "b h s d -> b s (h d)"))

    def form_for(self, queries: int, past: Past) -> Literal["expanded", "absorbed"]:
        """How `forward` attends with this past: as it says, or the cheaper way. Normed heads have no absorbed form."""
        if past.form != "auto":
            return past.form
        return "expanded" if self.q_head_norm is not None else self.work(queries, past.window.end).cheaper

    def work(self, queries: int, keys: int) -> Work:
        """What attention of so many new tokens to so many kept ones, themselves included, costs in either form."""
        h, c, nope, v = self.n_heads, self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        rope = self.rope.dim
        expand = 2 * keys * c * h * (nope + v)
        return Work(
            queries=queries,
            keys=keys,
            to_expand=expand,
            expanded=expand + 2 * queries * keys * h * (nope + rope + v),
            absorbed=2 * queries * h * c * (nope + v) + 2 * queries * keys * h * (c + rope + c),
        )

    def _expand(self, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head, [b, t, h, d], from latents and rotary keys [b, t, 1, r]."""
        kv = rearrange(self.wkv_b(c_kv), "b t (h d) -> b t h d", h=self.n_heads)
        k_nope, v = kv.tensor_split((self.qk_nope_head_dim,), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.n_heads, -1)), -1)
        return k if self.k_head_norm is None else self.k_head_norm(k), v

    def _absorbed(self, q: Tensor, past: Past) -> Tensor:
        if self.q_head_norm is not None:
            raise ValueError("form='absorbed' with qk_norm: a normed head is no linear map of the latent; use expanded")
        b, s = q.shape[:2]
        weight = self.wkv_b.weight
        version = None if weight.is_inference() else weight._version
        key = (id(weight), weight.data_ptr(), version, q.dtype)  # another after a step, a load or a move
        w_uk, w_uv = past.store.prepared(key, lambda: self.absorbed_halves(q.dtype))
        q_nope, q_rope = q.tensor_split((self.qk_nope_head_dim,), -1)
        q_latent = rearrange(q_nope, "b s h n -> h (b s) n") @ w_uk
        query = torch.cat((rearrange(q_latent, "h (b s) c -> b h s c", b=b), q_rope.transpose(1, 2)), -1)
        rows = past.store.read(past.window.end, q.dtype).unsqueeze(1)
        y = attend(query, rows, rows[..., : self.kv_lora_rank], self.scale, past.window.hidden)
        y = rearrange(y, "b h s c -> h (b s) c") @ w_uv
        return rearrange(y, "h (b s) v -> b s (h v)", s=s)

    def absorbed_halves(self, dtype: torch.dtype) -> tuple[Float[Tensor, "h n c"], Float[Tensor, "h c v"]]:
        """wkv_b taken apart for the absorbed form: W_UK and W_UV of every head, in dtype."""
        w = rearrange(self.wkv_b.dense(dtype), "(h d) c -> h d c", h=self.n_heads)
        w_uk, w_uv = w.tensor_split((self.qk_nope_head_dim,), 1)
        return w_uk.contiguous(), w_uv.transpose(1, 2).contiguous()

    def queries(self, x: Float[Tensor, "b s m"] | QuantizedTensor, table: Table) -> Float[Tensor, "b s h d"]:
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
        self, x: Float[Tensor, "b t m"] | QuantizedTensor, table: Table
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t 1 r"]]:
        """What a cache holds of a token: the normed latent c_kv, and the rotary key that all heads share."""
        c_kv, k_rope = self.wkv_a(x).tensor_split((self.kv_lora_rank,), -1)
        return self.kv_norm(c_kv), apply_rope(k_rope.unsqueeze(2), table)
