"""Causal attention, what it needs besides its input, and MHA, GQA and MQA: the baselines of MLA."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config, mask_function
from dsmini.nn.cache import CacheDtype, LayerCache, LayerCacheView
from dsmini.nn.layers import Projection, RMSNorm, at_least_fp32, make_linear, normed, output_linear, quantize_once
from dsmini.nn.rope import CosSin, Rope, apply_rope

Mask = Callable[[Tensor, Tensor], Tensor]
"""A function of the positions of queries [b, s, 1] and of keys [t]. It returns a bool tensor [b, s, t], True for keys
that a query may not see. Keys after the query are hidden in any case. b is 1 where all rows have the same positions."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Inputs of a call that the layers of a block need besides x. All blocks share them, but for the cache."""

    positions: Int[Tensor, "#b s"]
    """Position of each new token; one row if all rows have the same."""
    tokens: Int[Tensor, "b s"] | None = None
    """Ids of the new tokens, for a layer that looks something up by them; None for a layer that stands alone."""
    documents: Int[Tensor, "b s"] | None = None
    """Number of each position's document, rising along a row. A position sees its own alone. None: there is one."""
    mask: Bool[Tensor, "#b #s s"] | None = None
    """True for keys that a query may not see, in the place of the causal mask; None: those after it."""
    cache: LayerCacheView | None = None
    """The layer's part of a cache. The new tokens are appended to it and attend to all its rows."""
    experts: Int[Tensor, "b s k"] | None = None
    """Experts of the new tokens that the layer's gate gets imposed, -1 where it chooses; None: it chooses all."""
    keys: Int[Tensor, "b s topk"] | None = None
    """Keys of the new tokens that the layer's indexer gets imposed, in a row of -1 it chooses; None: it chooses all."""
    chosen: list[Any] | None = None
    """Gets the keys [b, s, k] of each layer with an indexer, or None of one that reads all; None: they are not kept."""
    stage: Any = None
    """Stage in which indexers learn in this call (dsa.py), warmup or sparse: attention then returns a pair, their loss
    too. None: they do not learn."""
    choices: UserDict[int, Any] = field(default_factory=lambda: UserDict(), repr=False)  # the compiler knows a lambda
    """The Choice (dsa.py) of each layer that later ones without an indexer take, by its number. All blocks share them.
    A block that is computed again finds what it found before. FSDP gives each block a copy of a dict, not of this."""
    angles: dict[Rope, tuple[Tensor, CosSin]] = field(default_factory=dict, repr=False)
    """Positions, cosine and sine by each Rope that was asked for. All blocks share them."""

    def __post_init__(self) -> None:
        if self.stage not in (None, "warmup", "sparse"):
            raise ValueError(f"stage is {self.stage!r}; use None, 'warmup' or 'sparse'")
        if self.cache is not None and (self.mask is not None or self.documents is not None):
            raise ValueError(
                "Context got a cache, and a mask or documents, which no cache keeps; leave out one of them"
            )

    def cos_sin(self, rope: Rope) -> CosSin:
        """Return cosine and sine of the new tokens' rotary angles, computed once for all layers with an equal Rope."""
        of, cos_sin = self.angles.get(rope, (None, None))
        if cos_sin is None or of is not self.positions:  # a layer may be given positions of its own
            cos_sin = rope.cos_sin(self.positions)
            self.angles[rope] = self.positions, cos_sin
        return cos_sin

    def masked(
        self, hides: Mask | None, t: int, start: int = 0, stop: int | None = None
    ) -> Bool[Tensor, "#b n t"] | None:
        """Return True for those of t keys that the new tokens in columns start to stop may not see; None: they see all.

        Args:
            hides: the layer's own mask, which hides further keys.

        Raises: ValueError, in eager mode on a CPU, if that leaves a query without a key.
        """
        if hides is None and stop is None and self.cache is not None:
            return self.cache.at.mask
        columns = slice(start, stop)
        if self.cache is None:
            positions = torch.arange(t, device=self.positions.device)[None, columns]
        else:  # those of padding may lie after all keys
            positions = self.cache.at.positions[:, columns].clamp(max=t - 1)
        if self.mask is None:
            masked = attention_mask(hides, positions, t)
        else:
            masked = self.mask.expand(-1, self.positions.shape[1], -1)[:, columns, :t]
            masked = masked if hides is None else masked | hidden_by(hides, positions, t)
        if self.documents is not None:
            masked = masked | (self.documents[:, columns, None] != self.documents[:, None, :t])
        if (hides or self.mask is not None) and ops.can_read_values(masked) and bool((blind := masked.all(-1)).any()):
            position = int(positions.expand(blind.shape)[blind][0])
            raise ValueError(f"mask hides all keys from the query at position {position}; let each query see itself")
        return masked


def context_of(x: Tensor, m: int, context: Context | None, mask: Tensor | None) -> Context:
    """Return the context of whole sequences x [b, s, m]: positions 0, 1, ..., no cache, and a mask or None.

    Raises: ValueError for rows [n, m], such as a gate takes, for another width, for a mask that is not bool
        [b or 1, s or 1, s], and for a mask next to a context.
    """
    if context is not None:
        raise ValueError("attention got a context and mask=; use one of them, such as Context(mask=...)")
    if x.dim() != 3 or x.shape[-1] != m:
        fix = "join its first dimensions"
        if x.shape[-1] != m:
            fix = f"make the layer with dim={x.shape[-1]}"
        elif x.dim() == 2:
            fix = "x[None] is one sequence"
        raise ValueError(f"attention got {tuple(x.shape)}; want [b, s, {m}], sequences of hidden states; {fix}")
    b, s = x.shape[:2]
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.dim() != 3
        or any(n not in sizes for n, sizes in zip(mask.shape, ({1, b}, {1, s}, {s}), strict=True))
    ):
        got = f"mask is {mask.dtype} {list(mask.shape)}"
        raise ValueError(f"{got}; want bool [{b} or 1, {s} or 1, {s}], True for keys that a query may not see")
    return Context(positions=torch.arange(s, device=x.device)[None], mask=mask)


def attention_mask(hides: Mask | None, queries: Int[Tensor, "#b s"], t: int) -> Bool[Tensor, "#b s t"]:
    """Return True for the keys 0 to t - 1 that a query may not see: those after it, and those that a mask hides."""
    masked = torch.arange(t, device=queries.device) > queries[..., None]
    return masked if hides is None else masked | hidden_by(hides, queries, t)


def hidden_by(hides: Mask, queries: Int[Tensor, "#b s"], t: int) -> Tensor:
    """Return True for the keys 0 to t - 1 that a mask hides, [b, s, t] or what broadcasts to it.

    Raises: ValueError for a function that returns no bool.
    """
    hidden = hides(queries[..., None], torch.arange(t, device=queries.device))
    if hidden.dtype != torch.bool:
        raise ValueError(f"mask returned {hidden.dtype}; want bool, True for keys that a query may not see")
    return hidden


@ops.operation("causal_attention")
def causal_attention(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b h s d"],
    v: Float[Tensor, "b h s v"],
    scale: float,
    documents: Int[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b h s v"]:
    """Return softmax(scale q k^T) v over the positions up to each query's own. The softmax runs in FP32.

    Args:
        documents: number of each position's document. A query sees its own document only.
    """
    logits = at_least_fp32(einsum(q, k, "b h s d, b h t d -> b h s t")) * scale
    seen = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).tril()
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return einsum(logits.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype), v, "b h s t, b h t v -> b h s v")


@ops.operation("cached_attention")
def cached_attention(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t v"],
    scale: float,
    mask: Bool[Tensor, "#b s t"] | None,
) -> Float[Tensor, "b h s v"]:
    """Return softmax(scale q k^T) v for queries that come after most of the keys, as in decoding.

    Every key head serves h / g query heads. The softmax runs in FP32.

    Args:
        mask: True for keys that a query may not see. None: each query sees all keys.
    """
    k, v = (rows.repeat_interleave(q.shape[1] // k.shape[1], 1) for rows in (k, v))
    logits = at_least_fp32(einsum(q, k, "b h s d, b h t d -> b h s t")) * scale
    if mask is not None:
        logits = logits.masked_fill(mask[:, None], -torch.inf)
    return einsum(logits.softmax(-1).to(v.dtype), v, "b h s t, b h t v -> b h s v")


def attend(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t v"],
    scale: float,
    context: Context,
    mask: Mask | None,
) -> Float[Tensor, "b h s v"]:
    """Attend to the new tokens, or to all rows of a cache: causally, or as the context's mask says.

    Args:
        mask: hides further keys.
    """
    if mask is not None or context.mask is not None or (context.cache is not None and not context.cache.at.all_new):
        return cached_attention(q, k, v, scale, context.masked(mask, k.shape[2]))
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
    return causal_attention(q, k, v, scale, context.documents)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary keys and queries: MLA's baseline.

    Heads are qk_nope_head_dim wide for q and k and v_head_dim for v, rotated over their whole width: with V3's sizes
    that is the MHA with 128-wide heads against which MLA's cache is 98.24 % smaller.

    Args:
        mask: as in MLA.
    """

    def __init__(self, config: ModelConfig | None = None, /, *, mask: Mask | None = None, **arguments: Any) -> None:
        super().__init__()
        self.mask: Mask | None = mask_function(mask)
        c = layer_config(config, arguments if config else {"attention": "mha", **arguments})
        if not c.is_baseline:
            module = "CompressedAttention" if c.attention == "compressed" else c.attention.upper()
            raise ValueError(f"attention={c.attention!r} is another module; use {module}, or 'mha', 'gqa' or 'mqa'")
        self.dim: int = c.dim
        self.rope: Rope = Rope.from_config(c)
        self.scale: float = self.rope.softmax_scale(c.qk_nope_head_dim)
        self.n_heads: int = c.n_heads
        self.n_kv_heads: int = c.kv_heads
        self.widths: tuple[int, int] = (c.qk_nope_head_dim, c.v_head_dim)
        self.wq: Projection = make_linear(c, c.dim, c.n_heads * c.qk_nope_head_dim)
        self.wk: Projection = make_linear(c, c.dim, c.kv_heads * c.qk_nope_head_dim)
        self.wv: Projection = make_linear(c, c.dim, c.kv_heads * c.v_head_dim)
        self.q_head_norm: RMSNorm | None = RMSNorm(c.qk_nope_head_dim, c.norm_eps) if c.qk_norm else None
        self.k_head_norm: RMSNorm | None = RMSNorm(c.qk_nope_head_dim, c.norm_eps) if c.qk_norm else None
        self.wo: Projection = output_linear(c, c.n_heads * c.v_head_dim)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        context: Context | None = None,
        *,
        mask: Bool[Tensor, "#b #s s"] | None = None,
    ) -> Float[Tensor, "b s m"]:
        """Attend as MLA.forward does."""
        if context is None or mask is not None:
            context = context_of(x, self.dim, context, mask)
        cos_sin = context.cos_sin(self.rope)
        # 1. queries and keys, rotated: [b, s, h, d] and [b, s, g, d]
        x = quantize_once(x, self.wq, self.wk, self.wv)
        q = apply_rope(rearrange(self.wq(x), "b s (h d) -> b s h d", h=self.n_heads), cos_sin)
        k = apply_rope(rearrange(self.wk(x), "b s (g d) -> b s g d", g=self.n_kv_heads), cos_sin)
        q, k = normed(self.q_head_norm, q), normed(self.k_head_norm, k)
        # 2. rows as they are cached, keys and values of all heads side by side: [b, s, g d] and [b, s, g v]
        q, k, v = q.transpose(1, 2), k.flatten(2), self.wv(x)
        if context.cache is not None:
            k, v = context.cache.extend((k, v), q.dtype)
        # 3. attention: [b, h, s, v]
        k, v = (rearrange(rows, "b t (g d) -> b g t d", g=self.n_kv_heads) for rows in (k, v))
        y = attend(q, k, v, self.scale, context, self.mask)
        return self.wo(rearrange(y, "b h s d -> b s (h d)"))

    def new_cache(self, batch_size: int, max_seq_len: int, dtype: CacheDtype, device: torch.device) -> LayerCache:
        """Return the layer's empty cache: a row holds [k | v] of every key-value head.

        Raises: ValueError for FP8, which is the layout of MLA's latent.
        """
        if dtype == "fp8":
            raise ValueError("dtype='fp8' is the layout of MLA's latent, not of keys and values of heads; use BF16")
        return LayerCache(batch_size, max_seq_len, self.n_kv_heads * sum(self.widths), dtype, device)
