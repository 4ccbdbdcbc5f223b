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
of query and key costs more, but no cached latent is expanded. `form_of` chooses the form with less work.
"""

from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config, mask_function
from dsmini.nn.attention import Context, Mask, attend, context_of
from dsmini.nn.cache import CacheDtype, ChosenForm, LayerCacheView, Rows
from dsmini.nn.codec import latent_row
from dsmini.nn.layers import (
    Projection,
    RMSNorm,
    at_least_fp32,
    is_plain,
    make_linear,
    normed,
    output_linear,
    quantize_once,
)
from dsmini.nn.rope import CosSin, Rope, apply_rope
from dsmini.numerics import QuantizedTensor


@ops.operation("absorbed_attention")
def absorbed_attention(
    q_nope: Float[Tensor, "b s h n"],
    q_rope: Float[Tensor, "b s h r"],
    rows: Float[Tensor, "b t w"],
    w_uk: Float[Tensor, "h n c"],
    w_uv: Float[Tensor, "h c v"],
    scale: float,
    mask: Bool[Tensor, "#b s t"] | None,
) -> Float[Tensor, "b s hv"]:
    """Return the output of MLA's attention to the latents, with the heads concatenated.

    Args:
        rows: rows of the cache, [latent | rotary key], c + r wide.
        w_uk, w_uv: W_UK and W_UV of every head, the two halves of wkv_b.
        mask: True for keys that a query may not see. None: each query sees all keys.

    Source: DeepSeek-V2 report, section 2.1.2.
    """
    c_kv, k_rope = rows.tensor_split((w_uk.shape[-1],), -1)
    q_latent = einsum(q_nope, w_uk, "b s h n, h n c -> b s h c")
    logits = einsum(q_latent, c_kv, "b s h c, b t c -> b h s t") + einsum(q_rope, k_rope, "b s h r, b t r -> b h s t")
    logits = at_least_fp32(logits) * scale
    if mask is not None:
        logits = logits.masked_fill(mask[:, None], -torch.inf)
    latent = einsum(logits.softmax(-1).to(rows.dtype), c_kv, "b h s t, b t c -> b s h c")
    return rearrange(einsum(latent, w_uv, "b s h c, h c v -> b s h v"), "b s h v -> b s (h v)")


class MLA(nn.Module):
    """Multi-head Latent Attention. From a config, or from plain arguments: MLA(dim=64, n_heads=2).

    q_lora_rank None projects the query directly (V2-Lite). Arguments that are left out are the toy's.

    Args:
        mask: hides more keys than those after a query. `lambda q, k: q - k >= 4096` is a sliding window: a function of
            the positions of queries and keys, True for keys that a query may not see.

    Source: DeepSeek-V3 report, section 2.1.1, equations 1 to 11.
    """

    indexer: Any
    """Chooses the keys of a query in DSA; MLA has none."""

    def __init__(self, config: ModelConfig | None = None, /, *, mask: Mask | None = None, **arguments: Any) -> None:
        super().__init__()
        self.mask: Mask | None = mask_function(mask)
        c = layer_config(config, arguments)
        self.dim: int = c.dim
        self.rope: Rope = Rope.from_config(c)
        self.scale: float = self.rope.softmax_scale(c.qk_head_dim)
        self.n_heads: int = c.n_heads
        self.kv_lora_rank: int = c.kv_lora_rank
        self.qk_nope_head_dim: int = c.qk_nope_head_dim
        self.v_head_dim: int = c.v_head_dim
        self.wq: Projection | None = None
        self.wq_a: Projection | None = None
        self.q_norm: RMSNorm | None = None
        self.wq_b: Projection | None = None
        self.indexer = None
        if c.q_lora_rank is None:
            self.wq = make_linear(c, c.dim, c.n_heads * c.qk_head_dim)
        else:
            self.wq_a = make_linear(c, c.dim, c.q_lora_rank)
            self.q_norm = RMSNorm(c.q_lora_rank)  # eps 1e-6 whatever norm_eps says: DeepSeek's code does so
            self.wq_b = make_linear(c, c.q_lora_rank, c.n_heads * c.qk_head_dim)
        self.q_head_norm: RMSNorm | None = RMSNorm(c.qk_head_dim, c.norm_eps) if c.qk_norm else None
        self.k_head_norm: RMSNorm | None = RMSNorm(c.qk_head_dim, c.norm_eps) if c.qk_norm else None
        self.wkv_a: Projection = make_linear(c, c.dim, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_norm: RMSNorm = RMSNorm(c.kv_lora_rank)
        self.wkv_b: Projection = make_linear(c, c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.wo: Projection = output_linear(c, c.n_heads * c.v_head_dim)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        context: Context | None = None,
        *,
        mask: Bool[Tensor, "#b #s s"] | None = None,
    ) -> Any:
        """Attend causally: to the sequence or, with a cache in the context, to all its rows in one of the forms.

        Return the output [b, s, m]; while DSA's indexer learns, the pair of that and its IndexerLoss.

        Args:
            mask: of a layer that stands alone, [b or 1, s or 1, s]: True for keys that a query may not see, as in
                torch.nn.MultiheadAttention. It takes the place of the causal mask. `padding[:, None]`, for padding
                [b, s], makes an encoder's attention, which sees all keys but padding.

        Raises: ValueError for an x or mask of another shape, and a query that may see no key.
        """
        if context is None or mask is not None:
            context = context_of(x, self.dim, context, mask)
        cos_sin = context.cos_sin(self.rope)
        # 1. queries, and what they are made of: [b, s, h, n + r] and [b, s, l]
        codes = quantize_once(x, self.wkv_a, self.wq or self.wq_a)
        latent = self.query_latent(codes)
        q = self.queries(latent, cos_sin)
        # 2. latent and rotary key, which are cached: [b, s, c] and [b, s, r]
        new = self.latents(codes, cos_sin)
        # 3. attention: [b, s, h v]
        y, loss = self.attention(q, new, context, (x, latent if isinstance(latent, Tensor) else x))
        y = self.wo(y)
        return y if loss is None else (y, loss)

    def attention(
        self, q: Float[Tensor, "b s h d"], new: tuple[Tensor, Tensor], context: Context, inputs: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b s hv"], Any]:
        """Attend in the form that is less work.

        Args:
            new: latents and rotary keys of the new tokens.
            inputs: the layer's input and the compressed query, of which DSA's indexer chooses keys.
        """
        if context.cache is not None and form_of(self, q.shape[1], context.cache) == "absorbed":
            return self.absorbed(q, new, context), None
        return self.expanded(q, new, context), None

    def expanded(
        self, q: Float[Tensor, "b s h d"], new: tuple[Tensor, Tensor], context: Context
    ) -> Float[Tensor, "b s hv"]:
        """Attend to keys and values of every head, which are made from the latents."""
        # latent and rotary key of all tokens: [b, t, c] and [b, t, r]
        c_kv, k_rope = new if context.cache is None else context.cache.extend(new, q.dtype)
        # keys and values of every head: [b, t, h, n + r] and [b, t, h, v]
        k, v = self.keys_and_values(c_kv, k_rope)
        q, k = normed(self.q_head_norm, q), normed(self.k_head_norm, k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = attend(q, k, v, self.scale, context, self.mask)
        return rearrange(y, "b h s v -> b s (h v)")

    def absorbed(
        self, q: Float[Tensor, "b s h d"], new: tuple[Tensor, Tensor], context: Context
    ) -> Float[Tensor, "b s hv"]:
        """Attend to the latents of a cache themselves: nothing is expanded.

        Source: DeepSeek-V2 report, section 2.1.2.
        """
        assert context.cache is not None, "latents are read from a cache"
        q_nope, q_rope, rows, w_uk, w_uv = self.absorbed_operands(q, new, context.cache)
        mask = context.masked(self.mask, context.cache.at.n_keys)
        return absorbed_attention(q_nope, q_rope, rows, w_uk, w_uv, self.scale, mask)

    def absorbed_operands(
        self, q: Float[Tensor, "b s h d"], new: tuple[Tensor, Tensor], cache: LayerCacheView
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Append the new rows to the cache, and return queries, all rows, and W_UK and W_UV, which moved to queries and
        values: the operands of absorbed_attention."""
        cache.append(new)
        q_nope, q_rope = q.tensor_split((self.qk_nope_head_dim,), -1)
        if cache.at.all_new:  # a change of a weight's .data is not counted
            cache.memo.clear()
        return q_nope, q_rope, cache.store.read(cache.at.n_keys, q.dtype), *self.absorbed_halves(q.dtype, cache.memo)

    def query_latent(self, x: Float[Tensor, "b s m"] | QuantizedTensor) -> Float[Tensor, "b s l"] | QuantizedTensor:
        """Return the normed compressed query; x itself where the query is not compressed."""
        return x if self.wq_a is None or self.q_norm is None else self.q_norm(self.wq_a(x))

    def queries(self, latent: Float[Tensor, "b s l"] | QuantizedTensor, cos_sin: CosSin) -> Float[Tensor, "b s h d"]:
        """Return each head's query: qk_nope_head_dim without position, then qk_rope_head_dim rotated."""
        project = self.wq or self.wq_b
        assert project is not None
        q = rearrange(project(latent), "b s (h d) -> b s h d", h=self.n_heads)
        q_nope, q_rope = q.tensor_split((self.qk_nope_head_dim,), -1)
        return torch.cat((q_nope, apply_rope(q_rope, cos_sin)), -1)

    def latents(
        self, x: Float[Tensor, "b t m"] | QuantizedTensor, cos_sin: CosSin
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t r"]]:
        """Return what is cached of each token: the normed latent c_kv, and the rotary key of all heads."""
        c_kv, k_rope = self.wkv_a(x).tensor_split((self.kv_lora_rank,), -1)
        return self.kv_norm(c_kv), apply_rope(k_rope.unsqueeze(2), cos_sin).squeeze(2)

    def keys_and_values(
        self, c_kv: Float[Tensor, "b t c"], k_rope: Float[Tensor, "b t r"]
    ) -> tuple[Float[Tensor, "b t h nr"], Float[Tensor, "b t h v"]]:
        """Expand latents: each head's key, n numbers and the rotary key of all heads, and its value."""
        kv = rearrange(self.wkv_b(c_kv), "b t (h d) -> b t h d", h=self.n_heads)
        k_nope, v = kv.tensor_split((self.qk_nope_head_dim,), -1)
        return torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.n_heads, -1)), -1), v

    def new_cache(self, batch_size: int, max_seq_len: int, dtype: CacheDtype, device: torch.device) -> Rows:
        """Return the layer's empty cache: a row holds the latent and the rotary key."""
        return Rows(batch_size, max_seq_len, latent_row(self.kv_lora_rank, self.rope.dim).stored_in(dtype), device)

    def absorbed_halves(
        self, dtype: torch.dtype, memo: dict[str, Any] | None = None
    ) -> tuple[Float[Tensor, "h n c"], Float[Tensor, "h c v"]]:
        """Take wkv_b apart for the absorbed form: W_UK and W_UV of every head, in dtype.

        Args:
            memo: keeps them, until a step, a load or a move changes the weight.

        Raises: ValueError for a module in the place of wkv_b, such as a LoRA wrapper, whose weight nobody can read.
        """
        if not is_plain(self.wkv_b):
            kind = type(self.wkv_b).__name__
            raise ValueError(f"form='absorbed' reads the weight of wkv_b, here a {kind}; use form='expanded' or 'auto'")
        weight = self.wkv_b.weight
        if weight.is_inference() or (torch.is_grad_enabled() and weight.requires_grad):
            memo = None  # nobody counts its changes, or the halves have a gradient
        key = () if memo is None else (id(weight), weight.data_ptr(), weight._version, dtype)
        if memo and memo["halves of"] == key:
            return memo["halves"]
        w_uk, w_uv = rearrange(self.wkv_b.dense(dtype), "(h d) c -> h d c", h=self.n_heads).tensor_split(
            (self.qk_nope_head_dim,), 1
        )
        halves = w_uk.contiguous(), w_uv.transpose(1, 2).contiguous()
        if memo is not None:
            memo.update({"halves of": key, "halves": halves})
        return halves


class AttentionWork(NamedTuple):
    """Floating-point operations of MLA's attention to a cache, for one sequence and layer, in both forms.

    A multiply-add counts as two. Masked pairs of query and key count too. Work that both forms do is left out.
    """

    expanded: int
    absorbed: int

    @property
    def cheaper(self) -> ChosenForm:
        """Form with fewer operations."""
        return "absorbed" if self.absorbed < self.expanded else "expanded"


def attention_work(layer: MLA, queries: int, keys: int, gathered: int | None = None) -> AttentionWork:
    """Count both forms of attention of this many new tokens to this many cached ones, the new ones included.

    Args:
        gathered: number of keys that the absorbed form reads for each query, where it gathers them; None: all.
    """
    h, c, n, r, v = layer.n_heads, layer.kv_lora_rank, layer.qk_nope_head_dim, layer.rope.dim, layer.v_head_dim
    expanded = 2 * keys * c * h * (n + v) + 2 * queries * keys * h * (n + r + v)
    read = keys if gathered is None else gathered
    return AttentionWork(expanded, 2 * queries * h * c * (n + v) + 2 * queries * read * h * (c + r + c))


def form_of(layer: MLA, queries: int, cache: LayerCacheView, chosen: int | None = None) -> ChosenForm:
    """Return the form in which a layer attends to a cache: what the cache asks for, or the one with less work.

    It is absorbed for the keys that an indexer chose, where a kernel gathers them: attention with a mask takes longer
    than the gather, also where it needs fewer operations (docs/log.md). Normed heads have no absorbed form, nor has a
    module in the place of wkv_b, such as a LoRA wrapper.

    Args:
        chosen: number of keys that an indexer chose for each query; None: it attends to all.
    """
    if cache.form != "auto":
        return cache.form
    if layer.q_head_norm is not None or not is_plain(layer.wkv_b):
        return "expanded"
    if chosen is not None and ops.serves("topk_attention", layer.wkv_b.weight):
        return "absorbed"
    return attention_work(layer, queries, cache.at.n_keys, chosen).cheaper
