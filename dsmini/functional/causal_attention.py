"""Causal attention: each query sees the positions up to its own, as in training and prefill."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.functional.fp32 import at_least_fp32

# Up to this many tokens a CPU is faster with explicit logits than with torch's flash attention (docs/log.md).
EXPLICIT_UP_TO = 128
EXPLICIT_UP_TO_BF16 = 1024
EXPLICIT_UP_TO_COMPILED = 512
BLOCK = 128
"""Queries whose logits exist at a time."""


def _cost(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None) -> ops.Cost:
    b, h, s, d = q.shape
    pairs = b * h * s * (s + 1) // 2
    written = b * h * s * v.shape[-1] * v.element_size()
    return ops.Cost(q.nbytes + k.nbytes + v.nbytes, written, 2 * pairs * (d + v.shape[-1]))


@ops.operation("causal_attention", cost=_cost)
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


@causal_attention.eager
def causal_attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    documents: Tensor | None = None,
    method: Literal["auto", "explicit", "sdpa"] = "auto",
) -> Tensor:
    """Compute causal_attention by one of two ways.

    Args:
        method: "explicit" computes the logits in q's dtype, for 128 queries at a time and the keys up to the last of
            them. "sdpa" runs torch's flash attention. It needs q, k and v of equal width, so zeros are appended to the
            narrower ones. "auto" runs explicit for short sequences on a CPU, else sdpa.
    """
    if not q.numel():
        return causal_attention.reference(q, k, v, scale, documents)
    if method == "auto":
        method = "explicit" if q.device.type == "cpu" and q.shape[2] <= _explicit_up_to(q.dtype) else "sdpa"
    if method == "sdpa":
        return _sdpa(q, k, v, scale, documents)
    if method != "explicit":
        raise ValueError(f"method={method!r} is unknown; use auto, explicit or sdpa")
    return _explicit(q, k, v, scale, _mask(documents, q.shape[2], q.device))


def _explicit_up_to(dtype: torch.dtype) -> int:
    short = EXPLICIT_UP_TO_BF16 if dtype == torch.bfloat16 else EXPLICIT_UP_TO
    return max(short, EXPLICIT_UP_TO_COMPILED) if torch.compiler.is_compiling() else short


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None) -> Tensor:
    width = max(q.shape[-1], v.shape[-1])
    wide_q, wide_k, wide_v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    seen = None if documents is None else ~_mask(documents, q.shape[2], q.device)
    y = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, seen, is_causal=seen is None, scale=scale)
    return y[..., : v.shape[-1]]


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Compute attention block by block of queries.

    One operation multiplies q and k, scales the product and adds the mask. The softmax reads and writes q's dtype and
    computes in FP32.
    """
    b, h, s, _ = q.shape
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
