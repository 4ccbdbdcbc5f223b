"""Fast attention in plain PyTorch: causal, as in training and prefill, and of new tokens to a cache."""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dsmini import ops
from dsmini.functional.layers import is_slow_bf16

# Up to this many tokens a CPU is faster with explicit logits than with torch's flash attention (docs/log.md).
EXPLICIT_UP_TO = 128
EXPLICIT_UP_TO_BF16 = 1024
EXPLICIT_UP_TO_COMPILED = 512
BLOCK = 128
"""Queries whose logits exist at a time."""
FEW_ROWS = 32
"""Queries of a key head, of all its heads, up to which BF16 products are as fast as FP32 ones on any CPU."""
SPLIT_FROM, PART = 32 << 20, 8 << 20
"""Bytes of keys or values from which a product on a CPU runs in parts, and bytes of a part."""


@ops.eager("causal_attention")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """Compute causal_attention of short sequences on a CPU with explicit logits, else by torch's flash attention."""
    if not q.numel():
        return ops.find("causal_attention").reference(q, k, v, scale, documents)
    limit = EXPLICIT_UP_TO_BF16 if q.dtype == torch.bfloat16 else EXPLICIT_UP_TO
    if torch.compiler.is_compiling():
        limit = max(limit, EXPLICIT_UP_TO_COMPILED)
    short = q.is_cpu and q.shape[2] <= limit and not is_slow_bf16(q)  # flash attention multiplies in FP32
    return (explicit_attention if short else flash_attention)(q, k, v, scale, documents)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """Compute causal_attention by torch, which wants equal widths: zeros are appended to the narrower operands."""
    width = max(q.shape[-1], v.shape[-1])
    wide_q, wide_k, wide_v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    seen = None if documents is None else ~_mask(documents, q.shape[2], q.device)
    y = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, seen, is_causal=seen is None, scale=scale)
    return y[..., : v.shape[-1]]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """Compute causal_attention for 128 queries at a time and the keys up to the last of them, with logits in q's dtype.

    One operation multiplies q and k, scales the product and adds the mask. The softmax reads and writes q's dtype and
    computes in FP32.
    """
    (b, h, s, _), mask = q.shape, _mask(documents, q.shape[2], q.device)
    added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -torch.inf)
    added = added if added.dim() == 2 else added.expand(b, h, s, s).flatten(0, 1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    blocks = []
    for start in range(0, s, BLOCK):
        end = min(s, start + BLOCK)
        logits = torch.baddbmm(added[..., start:end, :end], q[:, start:end], k[:, :end].mT, alpha=scale)
        blocks.append(logits.softmax(-1) @ v[:, :end])
    return torch.cat(blocks, 1).unflatten(0, (b, h))


def _mask(documents: Tensor | None, s: int, device: torch.device) -> Bool[Tensor, "..."]:
    """Return the mask [s, s] or [b, 1, s, s], True for later positions and for other documents."""
    future = torch.ones(s, s, dtype=torch.bool, device=device).triu(1)
    return future if documents is None else future | (documents[:, None, :, None] != documents[:, None, None, :])


@ops.eager("cached_attention")
def cached_attention_eager(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Compute cached_attention for 128 queries at a time, with logits in q's dtype."""
    if not q.numel() or not k.numel():
        return ops.find("cached_attention").reference(q, k, v, scale, mask)
    (b, h, s, _), (g, t) = q.shape, k.shape[1:3]
    if s * h // g > FEW_ROWS and is_slow_bf16(q):
        return cached_attention_eager(q.float(), k.float(), v.float(), scale, mask).to(v.dtype)
    blocks = []
    for start in range(0, s, BLOCK):
        part = q[:, :, start : start + BLOCK]
        rows = part.reshape(b * g, -1, q.shape[-1])
        # keys times queries: with few queries a CPU takes a sixth of the time of queries times keys (docs/log.md)
        few = rows.shape[1] < t
        logits = _times(k, rows.mT).mT if few else rows @ k.reshape(b * g, t, -1).mT
        logits = _wide(logits).mul(scale)
        if mask is not None:
            heads = logits.reshape(b, h, -1, t)
            logits = heads.masked_fill(mask[:, None, start : start + BLOCK], -torch.inf).view(logits.shape)
        y = _weighted(logits.softmax(-1).to(v.dtype), v)
        blocks.append(y.view(b, h, -1, v.shape[-1]))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


@ops.eager("absorbed_attention")
def absorbed_attention_eager(
    q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    b, s, h, _ = q_nope.shape
    if s * h > FEW_ROWS and is_slow_bf16(q_nope):
        queries, keys = (q_nope.float(), q_rope.float()), rows.float()
        return absorbed_attention_eager(*queries, keys, w_uk.float(), w_uv.float(), scale, mask).to(rows.dtype)
    q_latent = rearrange(rearrange(q_nope, "b s h n -> h (b s) n") @ w_uk, "h (b s) c -> b h s c", b=b)
    query = torch.cat((q_latent, q_rope.transpose(1, 2)), -1)
    keys = rows.unsqueeze(1)
    latent = cached_attention_eager(query, keys, keys[..., : w_uk.shape[-1]], scale, mask)
    y = rearrange(latent, "b h s c -> h (b s) c") @ w_uv
    return rearrange(y, "h (b s) v -> b s (h v)", s=s)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _times(keys: Tensor, queries: Tensor) -> Tensor:
    """Multiply keys [b, g, t, d] by queries [b * g, d, n]."""
    parts = [part.flatten(0, 1) @ queries for part in split_keys(keys)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply weights [b * g, n, t] by values [b, g, t, v]. The products of parts are added in FP32."""
    parts = split_keys(values)
    if len(parts) == 1:
        return weights @ values.flatten(0, 1)
    shares = weights.split(parts[0].shape[2], 2)
    sums = (_wide(w @ part.flatten(0, 1)) for w, part in zip(shares, parts, strict=True))
    return functools.reduce(torch.add, sums).to(values.dtype)


def split_keys(x: Float[Tensor, "b g t c"]) -> tuple[Tensor, ...]:
    """Split keys or values along t where torch would copy all of them for a product on a CPU.

    torch copies matrices that are interleaved in memory, as the heads of a cache's rows are. A copy of 32 MB or more
    gets new memory from the system each time. It takes 6 times as long as several small copies (docs/log.md).
    """
    b, g, t, c = x.shape
    if b * g == 1 or x.device.type != "cpu" or x.is_contiguous() or x.numel() * x.element_size() < SPLIT_FROM:
        return (x,)
    return x.split(max(64, min(t, PART // (b * g * c * x.element_size()))), 2)
