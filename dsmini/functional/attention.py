"""Fast attention in plain PyTorch: causal, as in training and prefill, and of new tokens to a cache.

In training there are two more operations with a backward of their own, which kernels can serve. Their forward keeps the
result y and, of each query, lse = log sum exp(scale q.k). With the gradient dy of y, a pair of query and key adds

    p  = exp(scale q.k - lse),  ds = scale p (dy.v - dy.y),  dq += ds k,  dk += ds q,  dv += p dy

A sink is one more logit of a head, without a value. So it makes lse' = log(exp(lse) + exp(sink)) of lse, and of y

    y' = exp(lse - lse') y,  dsink -= exp(sink - lse') dy.y'

With y' and lse' in place of y and lse, the gradients above stay as they are.
"""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dsmini import ops
from dsmini.functional.layers import is_slow_bf16, joined
from dsmini.numerics import at_least_fp32

# Up to this many tokens a CPU is faster with explicit logits than with torch's flash attention (docs/log.md).
EXPLICIT_UP_TO = 128
EXPLICIT_UP_TO_BF16 = 1024
EXPLICIT_UP_TO_COMPILED = 512
BLOCK = 128
"""Queries whose logits exist at a time."""
KERNEL_FROM = 1 << 20
"""Number of multiplications of a forward below which torch's operations cost no more than those of training."""
SPLIT_FROM, PART = 32 << 20, 8 << 20
"""Bytes of keys or values from which a product on a CPU runs in parts, and bytes of a part."""


@ops.eager("causal_attention")
def causal_attention_eager(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> Tensor:
    """Compute causal_attention of short sequences on a CPU with explicit logits, else by torch's flash attention."""
    if not q.numel():
        return ops.find("causal_attention").reference(q, k, v, scale, documents)
    if torch.is_grad_enabled() and trains_by_kernel(q, k, v):
        return train_attention(q, k, v, scale, documents)
    slow = is_slow_bf16(q)
    if slow and torch.is_grad_enabled():  # flash attention multiplies in FP32, but its backward in BF16
        return causal_attention_eager(q.float(), k.float(), v.float(), scale, documents).to(v.dtype)
    limit = EXPLICIT_UP_TO_BF16 if q.dtype == torch.bfloat16 else EXPLICIT_UP_TO
    if torch.compiler.is_compiling():
        limit = max(limit, EXPLICIT_UP_TO_COMPILED)
    short = q.is_cpu and q.shape[2] <= limit and not slow
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


@ops.operation("trained_attention")
def trained_attention(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b h t d"],
    v: Float[Tensor, "b h t v"],
    scale: float,
    mask: Bool[Tensor, "#b s t"] | None,
) -> tuple[Float[Tensor, "b h s v"], Float[Tensor, "b h s"]]:
    """Return attention, and the logarithm of each query's sum of exponentials.

    Args:
        mask: True for keys that a query may not see; None: those after its own.
    """
    logits = _masked_logits(q, k, scale, mask)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@ops.operation("trained_attention_gradients")
def trained_attention_gradients(
    grad: Float[Tensor, "b h s v"],
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b h t d"],
    v: Float[Tensor, "b h t v"],
    y: Float[Tensor, "b h s v"],
    lse: Float[Tensor, "b h s"],
    scale: float,
    mask: Bool[Tensor, "#b s t"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    # masked before exp: the logit of a masked key may be so large that exp is infinite
    p = (_masked_logits(q, k, scale, mask) - lse[..., None]).exp()
    ds = scale * p * (grad @ v.mT - (grad * y).sum(-1, keepdim=True))
    return ds @ k, ds.mT @ q, p.mT @ grad


def _masked_logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    hidden = _mask(None, q.shape[2], q.device) if mask is None else mask[:, None]
    return (q @ k.mT * scale).masked_fill(hidden, -torch.inf)


def train_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None) -> Tensor:
    """Compute causal_attention by the two operations, in FP32. First derivatives only."""

    def mask_of(documents: Tensor | None) -> Tensor | None:
        return None if documents is None else _mask(documents, q.shape[2], q.device).squeeze(1)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y, lse = trained_attention(q.float(), k.float(), v.float(), scale, mask_of(documents))
        y = y.to(q.dtype)
        return y, (q, k, v, y, lse, documents)

    def gradients(grad: Tensor, *saved: Tensor) -> list[Tensor]:
        *short, lse, documents = saved
        dy, q, k, v, y = (t.float() for t in (grad, *short))
        of_inputs = trained_attention_gradients(dy, q, k, v, y, lse, scale, mask_of(documents))
        return [g.to(grad.dtype) for g in of_inputs]

    return ops.trained(forward, gradients, q, k, v)


@ops.eager("sink_attention")
def sink_attention_eager(q: Tensor, kv: Tensor, mask: Tensor, sink: Tensor, scale: float) -> Tensor:
    if torch.is_grad_enabled() and sink.dtype == torch.float32 and trains_by_kernel(q.transpose(1, 2), kv, kv):
        return train_sink_attention(q, kv, mask, sink, scale)
    return ops.find("sink_attention").reference(q, kv, mask, sink, scale)


def train_sink_attention(q: Tensor, kv: Tensor, mask: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Compute sink_attention, whose heads share keys and values, by the two operations. First derivatives only."""

    def of_heads(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        return q.transpose(1, 2).float(), kv.float()[:, None].expand(-1, q.shape[2], -1, -1)

    def forward(q: Tensor, kv: Tensor, sink: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        heads, keys = of_heads(q, kv)
        y, lse = trained_attention(heads, keys, keys, scale, mask)
        total = torch.logaddexp(lse, sink[:, None])
        share = (lse - total).exp()[..., None]
        y = (y * share).masked_fill(share == 0, 0).transpose(1, 2).to(q.dtype)  # without any key y is NaN
        return y, (q, kv, mask, sink, y, total)

    def gradients(
        grad: Tensor, q: Tensor, kv: Tensor, mask: Tensor, sink: Tensor, y: Tensor, total: Tensor
    ) -> list[Tensor]:
        (heads, keys), (dy, y) = of_heads(q, kv), (t.transpose(1, 2).float() for t in (grad, y))
        dq, dk, dv = trained_attention_gradients(dy, heads, keys, keys, y, total, scale, mask)
        dsink = (torch.exp(sink[:, None] - total) * (dy * y).sum(-1)).sum((0, 2)).neg()
        return [dq.transpose(1, 2).to(q.dtype), (dk + dv).sum(1).to(kv.dtype), dsink]

    return ops.trained(forward, gradients, q, kv, sink)


def trains_by_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True where a kernel with a backward of its own serves attention."""
    if torch.compiler.is_compiling() or q.numel() * q.shape[2] < KERNEL_FROM:
        return False
    if not all((t.dtype == torch.float32 or is_slow_bf16(t)) and t.requires_grad for t in (q, k, v)):
        return False
    heads = q.shape[0] * q.shape[1]  # a head is computed by one thread
    enough = heads >= torch.get_num_threads() and not torch.is_autocast_enabled(q.device.type)
    return enough and ops.serves("trained_attention", q)


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
    if is_slow_bf16(q):
        return cached_attention_eager(q.float(), k.float(), v.float(), scale, mask).to(v.dtype)
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
    return joined(blocks, 2)


@ops.eager("absorbed_attention")
def absorbed_attention_eager(
    q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    b, s = q_nope.shape[:2]
    if is_slow_bf16(q_nope):
        queries, keys = (q_nope.float(), q_rope.float()), rows.float()
        return absorbed_attention_eager(*queries, keys, w_uk.float(), w_uv.float(), scale, mask).to(rows.dtype)
    q_latent = rearrange(rearrange(q_nope, "b s h n -> h (b s) n") @ w_uk, "h (b s) c -> b h s c", b=b)
    query = torch.cat((q_latent, q_rope.transpose(1, 2)), -1)
    keys = rows.unsqueeze(1)
    latent = cached_attention_eager(query, keys, keys[..., : w_uk.shape[-1]], scale, mask)
    y = rearrange(latent, "b h s c -> h (b s) c") @ w_uv
    return rearrange(y, "h (b s) v -> b s (h v)", s=s)


def _times(keys: Tensor, queries: Tensor) -> Tensor:
    """Multiply keys [b, g, t, d] by queries [b * g, d, n]."""
    parts = [part.flatten(0, 1) @ queries for part in split_keys(keys)]
    return joined(parts, 1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply weights [b * g, n, t] by values [b, g, t, v]. The products of parts are added in FP32."""
    parts = split_keys(values)
    if len(parts) == 1:
        return weights @ values.flatten(0, 1)
    shares = weights.split(parts[0].shape[2], 2)
    sums = (at_least_fp32(w @ part.flatten(0, 1)) for w, part in zip(shares, parts, strict=True))
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
