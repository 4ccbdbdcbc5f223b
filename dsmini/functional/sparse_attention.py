"""Fast sparse attention in plain PyTorch: some queries at a time, and a gather in place of a mask.

A long context's products of all heads and attention to all pairs never exist together.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsmini import ops
from dsmini.functional.layers import joined

BLOCK_BYTES = 4 << 20
"""Bytes of products of heads with keys, and of gathered rows, that exist at a time on a CPU, to stay in its caches."""
OFF_CPU = 16
"""Factor by which more exist on other devices, which need long operations."""


def queries_at_a_time(x: Tensor, query_bytes: int) -> int:
    """Return the number of queries whose blocks of query_bytes each may exist together on the device of x."""
    return max(1, BLOCK_BYTES * (1 if x.is_cpu else OFF_CPU) // query_bytes)


@ops.eager("topk_keys")
@torch.no_grad()
def topk_keys_eager(q: Tensor, k: Tensor, weights: Tensor, topk: int, mask: Tensor) -> Tensor:
    """Score some queries at a time, so that the products of all heads with a long context never exist together."""
    if not q.numel():
        return ops.find("topk_keys").reference(q, k, weights, topk, mask)
    (b, s, h, _), t = q.shape, k.shape[1]
    rows = queries_at_a_time(q, 4 * b * h * t)
    index_scores, blocks = ops.find("index_scores"), []
    for start in range(0, s, rows):
        part = slice(start, start + rows)
        scores = index_scores(q[:, part], k, weights[:, part]).masked_fill_(mask[:, part], -torch.inf)
        blocks.append(_first_largest(scores, min(topk, t)))
    return joined(blocks, 1)


def _first_largest(scores: Float[Tensor, "b s t"], k: int) -> Int[Tensor, "b s k"]:
    """Return the places of the k largest above -inf, first places first among equals, and -1 where there are fewer.

    torch.topk finds the k-th value alone: the places that it returns among equals depend on the length of a row. NaN is
    as large as infinity, so that it is chosen, and seen in the output.
    """
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    edge = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > edge, (scores == edge) & ~scores.isneginf()
    kept = above | equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True))
    rank = torch.where(kept, kept.cumsum(-1) - 1, k)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    return rank.new_full((*scores.shape[:-1], k + 1), -1).scatter_(-1, rank, places)[..., :k]


@ops.eager("topk_attention")
def topk_attention_eager(
    q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, topk_indices: Tensor
) -> Tensor:
    """Gather the chosen rows of some queries at a time; each query then is a sequence of its own, with k keys."""
    if not topk_indices.numel():
        return ops.find("topk_attention").reference(q_nope, q_rope, rows, w_uk, w_uv, scale, topk_indices)
    b, k, row = len(rows), topk_indices.shape[2], rows[0, 0].nbytes
    sequence = torch.arange(b, device=rows.device)[:, None, None]
    blocks = []
    some = queries_at_a_time(rows, b * k * row)
    for part in zip(*(x.split(some, 1) for x in (q_nope, q_rope, topk_indices)), strict=True):
        chosen = rows[sequence, part[2].clamp(min=0)].flatten(0, 1)
        nope, rope, none = (rearrange(x, "b s ... -> (b s) 1 ...") for x in (*part[:2], part[2] < 0))
        y = ops.find("absorbed_attention")(nope, rope, chosen, w_uk, w_uv, scale, none)
        blocks.append(rearrange(y, "(b s) 1 d -> b s d", b=b))
    return joined(blocks, 1)


@ops.eager("entry_attention")
def entry_attention_eager(
    q: Tensor,
    near: Tensor,
    masked: Tensor,
    entries: Any,
    hidden: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    scale: float,
) -> Tensor:
    """Gather the chosen entries where they are fewer than all: each query then is a sequence of its own."""
    (b, s), n = q.shape[:2], hidden.shape[2]
    if chosen is None or s * chosen.shape[2] >= n:
        return ops.find("entry_attention").reference(q, near, masked, entries, hidden, chosen, sink, scale)
    gather = ops.find("rows_at")
    some = gather(entries, chosen) if isinstance(entries, Tensor) else entries.read_at(chosen.clamp(0), q.dtype)
    keys = torch.cat((near[:, None].expand(-1, s, -1, -1), some), 2).flatten(0, 1)
    mask = torch.cat((masked.expand(b, -1, -1), chosen < 0), 2).flatten(0, 1)[:, None]
    return ops.find("sink_attention")(q.flatten(0, 1)[:, None], keys, mask, sink, scale).view_as(q)


@ops.eager("indexer_agreement")
def indexer_agreement_eager(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    main_q: Tensor,
    main_k: Tensor,
    scale: float,
    topk_indices: Tensor,
    mask: Callable[[int, int], Tensor],
    stage: str,
    start: int = 0,
    other_lse: Tensor | None = None,
    tokens: int = 1,
) -> Tensor:
    """Compare a block of queries at a time, and compute its gradient at once. First derivatives only."""
    assert start == 0, "whole sequences are compared"
    inputs = (q, k, weights)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    rows = queries_at_a_time(q, 4 * len(q) * max(q.shape[2], main_q.shape[2]) * k.shape[1])

    def forward(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # fp32: all blocks add to the gradient of a key
        grads = [torch.zeros_like(x, dtype=weights.dtype) for x in inputs] if learns else []
        sums = torch.zeros(4, dtype=weights.dtype, device=weights.device)
        for first in range(0, inputs[0].shape[1], rows):
            last = min(inputs[0].shape[1], first + rows)
            part, seen = slice(first, last), slice(0, last // tokens)
            if seen.stop == 0:
                continue
            others = None if other_lse is None else other_lse[:, :, part]
            columns = (part, seen, part)
            with torch.set_grad_enabled(learns), saved_tensors_hooks(_as_it_is, _as_it_is):
                own = [x.detach()[:, some].requires_grad_(learns) for x, some in zip(inputs, columns, strict=True)]
                main = (main_q[:, part], main_k[:, seen], scale, topk_indices[:, part], mask, stage, first)
                found = ops.find("indexer_agreement").reference(*own, *main, others, tokens)
                kl = found[0]
            sums += found.detach()
            if learns:
                for whole, some, grad in zip(grads, columns, torch.autograd.grad(kl, own), strict=True):
                    whole[:, some] += grad
        return sums, tuple(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=False))

    return ops.trained(forward, lambda grad, *saved: [g * grad[0].to(g.dtype) for g in saved], *inputs)


def _as_it_is(saved: Tensor) -> Tensor:
    """Hold a tensor for a backward that follows at once: recomputation would run the whole block again for it."""
    return saved
