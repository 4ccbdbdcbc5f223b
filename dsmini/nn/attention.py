"""Scaled dot-product attention, and the twins MHA, GQA and MQA that MLA is compared with."""

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.nn.cache import Past
from dsmini.nn.fp32 import at_least_fp32
from dsmini.nn.linear import Linear
from dsmini.nn.norm import RMSNorm
from dsmini.nn.rope import Rope, Table, apply_rope
from dsmini.numerics import quantize

# Up to so many tokens a CPU is faster with explicit logits than with torch's flash attention (docs/log.md).
EXPLICIT_UP_TO = 128
EXPLICIT_UP_TO_BF16 = 1024
EXPLICIT_UP_TO_COMPILED = 512
BLOCK = 128
PAGED, COPIED = 32 << 20, 8 << 20
"""A CPU takes keys or values of several heads or rows in parts from so many bytes on, and so many bytes a part."""


def causal_attention(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b h s d"],
    v: Float[Tensor, "b h s v"],
    scale: float,
    method: Literal["auto", "explicit", "sdpa"] = "auto",
    documents: Int[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b h s v"]:
    """softmax(scale q k^T) v over the positions up to each query's own; softmax in FP32.

    With `documents`, the number of the document that each position belongs to, only over those of its own document.
    explicit makes the logits in q's dtype, for 128 queries at a time against the keys that they may see. sdpa is
    torch's flash attention; it wants q, k and v equally wide, so the narrower are padded with zeros. auto: sdpa, but
    explicit for short sequences on a CPU.
    """
    if method == "auto":
        short = EXPLICIT_UP_TO_BF16 if q.dtype == torch.bfloat16 else EXPLICIT_UP_TO
        short = max(short, EXPLICIT_UP_TO_COMPILED) if torch.compiler.is_compiling() else short
        method = "explicit" if q.device.type == "cpu" and q.shape[2] <= short else "sdpa"
    if method not in ("explicit", "sdpa"):
        raise ValueError(f"method={method!r} is unknown; use auto, explicit or sdpa")
    if method == "sdpa":
        width = max(q.shape[-1], v.shape[-1])
        wide_q, wide_k, wide_v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
        seen = None if documents is None else ~_hidden(documents, q.shape[2], q.device)
        y = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, seen, is_causal=seen is None, scale=scale)
        return y[..., : v.shape[-1]]
    return _explicit(q, k, v, scale, _hidden(documents, q.shape[2], q.device))


def attend(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t v"],
    scale: float,
    hidden: Bool[Tensor, "#b s t"] | None,
) -> Float[Tensor, "b h s v"]:
    """softmax(scale q k^T) v for queries that come after most of the keys, as in decoding; `hidden` is what a query may
    not see. Every key head serves h / g query heads. Logits are made in q's dtype, for 128 queries at a time; softmax
    in FP32."""
    (b, h, s, _), (g, t) = q.shape, k.shape[1:3]
    blocks = []
    for start in range(0, s, BLOCK):
        part = q[:, :, start : start + BLOCK]
        rows = part.reshape(b * g, -1, q.shape[-1])
        # keys times queries: with few queries a CPU takes a sixth of the time of queries times keys (docs/log.md)
        few = rows.shape[1] < t
        logits = _times(k, rows.mT).mT if few else rows @ k.reshape(b * g, t, -1).mT
        logits = at_least_fp32(logits).mul(scale)
        if hidden is not None:
            seen = logits.reshape(b, h, -1, t)
            logits = seen.masked_fill(hidden[:, None, start : start + BLOCK], -torch.inf).view(logits.shape)
        y = _weighted(logits.softmax(-1).to(v.dtype), v)
        blocks.append(y.view(b, h, -1, v.shape[-1]))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def _times(keys: Tensor, queries: Tensor) -> Tensor:
    """[b, g, t, d] times [b * g, d, n]."""
    parts = [part.flatten(0, 1) @ queries for part in _parts(keys)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """[b * g, n, t] times [b, g, t, v]; what is done in parts is summed in FP32."""
    parts = _parts(values)
    if len(parts) == 1:
        return weights @ values.flatten(0, 1)
    shares = weights.split(parts[0].shape[2], 2)
    sums = (at_least_fp32(w @ part.flatten(0, 1)) for w, part in zip(shares, parts, strict=True))
    return functools.reduce(torch.add, sums).to(values.dtype)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """[b, g, t, c] in parts along t. Matrices that lie inside each other, as heads do in a cache's rows, torch copies
    for a product on a CPU; a copy of 32 MB or more gets new memory from the system each time, and takes 6 times as
    long as several small ones (docs/log.md)."""
    b, g, t, c = x.shape
    if b * g == 1 or x.device.type != "cpu" or x.is_contiguous() or x.numel() * x.element_size() < PAGED:
        return (x,)
    return x.split(max(64, min(t, COPIED // (b * g * c * x.element_size()))), 2)


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """Scale and mask ride on the product of q and k; softmax reads and writes q's dtype and computes in FP32."""
    b, h, s, _ = q.shape
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -torch.inf)
    mask = mask if mask.dim() == 2 else mask.expand(b, h, s, s).flatten(0, 1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    blocks = []
    for start in range(0, s, BLOCK):
        end = min(s, start + BLOCK)
        logits = torch.baddbmm(mask[..., start:end, :end], q[:, start:end], k[:, :end].mT, alpha=scale)
        blocks.append(logits.softmax(-1) @ v[:, :end])
    return torch.cat(blocks, 1).unflatten(0, (b, h))


def _hidden(documents: Tensor | None, s: int, device: torch.device) -> Tensor:
    """What a query may not see, [s, s] or [b, 1, s, s]: the future, and other documents."""
    future = torch.ones(s, s, dtype=torch.bool, device=device).triu(1)
    return future if documents is None else future | (documents[:, None, :, None] != documents[:, None, None, :])


def output_linear(c: ModelConfig, width: int) -> Linear:
    """The Linear after attention. Attention's own backward reads its input too, which is why FP8 training keeps it in
    E5M6, with more bits (report, section 3.3.3)."""
    return Linear(width, c.dim, init_std=c.output_init_std, precision=c.precision, saved_format="e5m6")


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary keys and queries: MLA's twin.

    Heads are qk_nope_head_dim wide for q and k and v_head_dim for v, rotated over their whole width: with V3's sizes
    that is the MHA with 128-wide heads against which MLA's cache is 98.24 % smaller.
    """

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments if config else {"attention": "mha", **arguments})
        if c.attention == "mla":
            raise ValueError("attention='mla' is another module; use MLA, or attention='mha', 'gqa' or 'mqa'")
        self.rope = Rope.from_config(c)
        self.scale = self.rope.softmax_scale(c.qk_nope_head_dim)
        self.n_heads, self.n_kv_heads = c.n_heads, c.kv_heads

        self.precision = c.precision

        def linear(i: int, o: int) -> Linear:
            return Linear(i, o, init_std=c.init_std, precision=c.precision)

        self.wq = linear(c.dim, c.n_heads * c.qk_nope_head_dim)
        self.wk = linear(c.dim, c.kv_heads * c.qk_nope_head_dim)
        self.wv = linear(c.dim, c.kv_heads * c.v_head_dim)
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
        """Attend causally, with `documents` within each document; `table` is rope.table(positions), made for
        positions 0, 1, ... if left out. With a `past`, also to what is cached, where the new tokens are put too."""
        table = table or self.rope.table(torch.arange(x.shape[1], device=x.device))
        read = quantize(x) if self.precision == "fp8" else x  # once, for all three
        q = apply_rope(rearrange(self.wq(read), "b s (h d) -> b s h d", h=self.n_heads), table)
        k = apply_rope(rearrange(self.wk(read), "b s (h d) -> b s h d", h=self.n_kv_heads), table)
        if self.q_head_norm is not None and self.k_head_norm is not None:
            q, k = self.q_head_norm(q), self.k_head_norm(k)
        q, k = q.transpose(1, 2), k.flatten(2)
        v = self.wv(read)
        if past is not None:
            past.store.write(torch.cat((k, v), -1), past.window)
        if past is not None and (not past.window.fresh or past.store.rounds(q.dtype)):
            keys = x.shape[1] if past.window.fresh else past.window.end
            k, v = past.store.read(keys, q.dtype).tensor_split((k.shape[-1],), -1)
        if past is None or past.window.fresh:
            group = self.n_heads // self.n_kv_heads
            k, v = (self._heads(rows).repeat_interleave(group, 1) for rows in (k, v))
            y = causal_attention(q, k, v, self.scale, documents=documents)
        else:
            y = attend(q, self._heads(k), self._heads(v), self.scale, past.window.hidden)
        return self.wo(rearrange(y, "b h s d -> b s (h d)"))

    def _heads(self, rows: Tensor) -> Tensor:
        return rearrange(rows, "b t (h d) -> b h t d", h=self.n_kv_heads)
