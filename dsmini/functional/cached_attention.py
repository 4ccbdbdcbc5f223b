"""Attention of new tokens to a cache, expanded and absorbed.

Expanded, every head has its own keys and values. Absorbed, all heads of MLA read the one latent: with k_nope = W_UK c
    q_nope.k_nope = (W_UK^T q_nope).c        sum_t p_t v_t = W_UV (sum_t p_t c_t)
(DeepSeek-V2 report, section 2.1.2). Each pair of query and key then costs more, but no cached latent is expanded.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.functional.fp32 import at_least_fp32

BLOCK = 128
"""Queries whose logits exist at a time."""
KEY_STEP = 64
"""Step in which the number of keys grows."""
SPLIT_FROM, PART = 32 << 20, 8 << 20
"""Bytes of keys or values from which a product on a CPU runs in parts, and bytes of a part."""


Mask = Callable[[Tensor, Tensor], Tensor]
"""A function of the positions of queries [b, s, 1] and of keys [t]. It returns a bool tensor [b, s, t], True for keys
that a query may not see. Keys after the query are hidden in any case. b is 1 where all rows have the same positions."""


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """Floating-point operations of MLA's attention to a cache, for one sequence and layer, in both forms.

    A multiply-add counts as two. Masked pairs of query and key count too. Work that both forms do is left out.
    """

    queries: int
    keys: int
    to_expand: int
    """Expanding the latents of all keys."""
    expanded: int
    """The whole expanded form, to_expand included."""
    absorbed: int

    @property
    def cheaper(self) -> Literal["expanded", "absorbed"]:
        """Form with fewer operations."""
        return "absorbed" if self.absorbed < self.expanded else "expanded"

    def __str__(self) -> str:
        return (
            f"{self.cheaper}, for {self.queries:,} queries and {self.keys:,} keys: expanded "
            f"{self.expanded / 1e6:,.1f} MFLOP, {self.to_expand / 1e6:,.1f} of them to expand the latents, absorbed "
            f"{self.absorbed / 1e6:,.1f}"
        )


def count_work(queries: int, keys: int, *, h: int, c: int, n: int, r: int, v: int) -> AttentionWork:
    """Count MLA's attention of `queries` new tokens to `keys` cached ones, the new ones included, in both forms.

    Args:
        h, c, n, r, v: heads, kv_lora_rank, and the head dims without position, of the rotary part, and of values.
    """
    expand = 2 * keys * c * h * (n + v)
    return AttentionWork(
        queries=queries,
        keys=keys,
        to_expand=expand,
        expanded=expand + 2 * queries * keys * h * (n + r + v),
        absorbed=2 * queries * h * c * (n + v) + 2 * queries * keys * h * (c + r + c),
    )


def keys_and_values(
    kv: Float[Tensor, "b t hd"], k_rope: Float[Tensor, "b t r"], h: int, n: int
) -> tuple[Float[Tensor, "b t h nr"], Float[Tensor, "b t h v"]]:
    """Take expanded latents apart: each head's key, n numbers and the rotary key of all heads, and its value."""
    k_nope, v = rearrange(kv, "b t (h d) -> b t h d", h=h).tensor_split((n,), -1)
    return torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, h, -1)), -1), v


def keys_to_read(filled: int, room: int) -> int:
    """Return the number of keys to give to attention of a cache that has `filled` of `room` keys.

    The mask hides those that are not filled. A CPU prepares a BF16 product again for each number of rows, so that
    number changes in steps (docs/log.md).
    """
    return min(room, -(-filled // KEY_STEP) * KEY_STEP)


def hidden_keys(mask: Mask | None, queries: Int[Tensor, "#b s"], t: int) -> Bool[Tensor, "#b s t"]:
    """Return True for the keys 0 to t - 1 that a query may not see: those after it, and those that a mask hides.

    Raises: ValueError for a mask of another type or shape. In eager mode on a CPU also for a query that sees no key.
    """
    keys, positions = torch.arange(t, device=queries.device), queries[..., None]
    if mask is None:
        return keys > positions
    hidden = mask(positions, keys)
    shape = (*queries.shape, t)
    if not isinstance(hidden, Tensor) or hidden.dtype != torch.bool or not _expands(hidden.shape, shape):
        got = f"{hidden.dtype} {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            f"mask returned {got}, want torch.bool {shape}, True for keys that a query may not see; compare the "
            "positions that it is given"
        )
    hidden = hidden | (keys > positions)
    if ops.shows_numbers(hidden) and bool((blind := hidden.all(-1)).any()):
        raise ValueError(
            f"mask hides all keys from the query at position {int(queries[blind][0])}; let each query see itself"
        )
    return hidden


def _expands(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Return True if a tensor of this shape can be expanded to the wanted one."""
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(a in (1, b) for a, b in pairs)


def _cost(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> ops.Cost:
    (b, h, s, d), (t, width) = q.shape, v.shape[2:]
    written = b * h * s * width * v.element_size()
    return ops.Cost(q.nbytes + k.nbytes + v.nbytes, written, 2 * b * h * s * t * (d + width))


@ops.operation("cached_attention", cost=_cost)
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


@cached_attention.eager
def cached_attention_eager(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Compute cached_attention for 128 queries at a time, with logits in q's dtype."""
    if not q.numel() or not k.numel():
        return cached_attention.reference(q, k, v, scale, mask)
    (b, h, s, _), (g, t) = q.shape, k.shape[1:3]
    blocks = []
    for start in range(0, s, BLOCK):
        part = q[:, :, start : start + BLOCK]
        rows = part.reshape(b * g, -1, q.shape[-1])
        # keys times queries: with few queries a CPU takes a sixth of the time of queries times keys (docs/log.md)
        few = rows.shape[1] < t
        logits = _times(k, rows.mT).mT if few else rows @ k.reshape(b * g, t, -1).mT
        logits = at_least_fp32(logits).mul(scale)
        if mask is not None:
            heads = logits.reshape(b, h, -1, t)
            logits = heads.masked_fill(mask[:, None, start : start + BLOCK], -torch.inf).view(logits.shape)
        y = _weighted(logits.softmax(-1).to(v.dtype), v)
        blocks.append(y.view(b, h, -1, v.shape[-1]))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def _absorbed_cost(
    q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, mask: Tensor | None
) -> ops.Cost:
    (b, s, h, n), (t, width), (c, v) = q_nope.shape, rows.shape[1:], w_uv.shape[1:]
    read = sum(x.nbytes for x in (q_nope, q_rope, rows, w_uk, w_uv))
    return ops.Cost(read, b * s * h * v * q_nope.element_size(), 2 * b * s * h * (c * (n + v) + t * (width + c)))


@ops.operation("absorbed_attention", cost=_absorbed_cost)
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


@absorbed_attention.eager
def _(
    q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    b, s = q_nope.shape[:2]
    q_latent = rearrange(rearrange(q_nope, "b s h n -> h (b s) n") @ w_uk, "h (b s) c -> b h s c", b=b)
    query = torch.cat((q_latent, q_rope.transpose(1, 2)), -1)
    keys = rows.unsqueeze(1)
    latent = cached_attention_eager(query, keys, keys[..., : w_uk.shape[-1]], scale, mask)
    y = rearrange(latent, "b h s c -> h (b s) c") @ w_uv
    return rearrange(y, "h (b s) v -> b s (h v)", s=s)


def _times(keys: Tensor, queries: Tensor) -> Tensor:
    """Multiply keys [b, g, t, d] by queries [b * g, d, n]."""
    parts = [part.flatten(0, 1) @ queries for part in parts_of(keys)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply weights [b * g, n, t] by values [b, g, t, v]. The products of parts are added in FP32."""
    parts = parts_of(values)
    if len(parts) == 1:
        return weights @ values.flatten(0, 1)
    shares = weights.split(parts[0].shape[2], 2)
    sums = (at_least_fp32(w @ part.flatten(0, 1)) for w, part in zip(shares, parts, strict=True))
    return functools.reduce(torch.add, sums).to(values.dtype)


def parts_of(x: Float[Tensor, "b g t c"]) -> tuple[Tensor, ...]:
    """Split keys or values along t where torch would copy all of them for a product on a CPU.

    torch copies matrices that are interleaved in memory, as the heads of a cache's rows are. A copy of 32 MB or more
    gets new memory from the system each time. It takes 6 times as long as several small copies (docs/log.md).
    """
    b, g, t, c = x.shape
    if b * g == 1 or x.device.type != "cpu" or x.is_contiguous() or x.numel() * x.element_size() < SPLIT_FROM:
        return (x,)
    return x.split(max(64, min(t, PART // (b * g * c * x.element_size()))), 2)
