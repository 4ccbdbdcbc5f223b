"""Fast sparse attention in plain PyTorch: some queries at a time, and a gather in place of a mask.

A long context's products of all heads and attention to all pairs never exist together.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsmini import ops

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
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


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
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


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
    assert start == 0, "whole sequences are compared"
    options = (main_q, main_k, scale, topk_indices, mask, stage, other_lse, tokens, torch.is_grad_enabled())
    return cast(Tensor, _IndexerAgreement.apply(q, k, weights, *options))


def _as_it_is(saved: Tensor) -> Tensor:
    """Hold a tensor for a backward that follows at once: recomputation would run the whole block again for it."""
    return saved


class _IndexerAgreement(torch.autograd.Function):
    """indexer_agreement of a block of queries at a time, whose gradient is computed at once. First derivatives only."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        main_q: Tensor,
        main_k: Tensor,
        scale: float,
        topk_indices: Tensor,
        mask: Callable[[int, int], Tensor],
        stage: str,
        other_lse: Tensor | None,
        tokens: int,
        with_gradients: bool,
    ) -> Tensor:
        (b, s), heads = q.shape[:2], max(q.shape[2], main_q.shape[2])
        rows = queries_at_a_time(q, 4 * b * heads * k.shape[1])
        with_gradients = with_gradients and any(ctx.needs_input_grad)
        # fp32: all blocks add to the gradient of a key
        grads = [torch.zeros_like(x, dtype=weights.dtype) for x in (q, k, weights)] if with_gradients else []
        sums = torch.zeros(4, dtype=weights.dtype, device=q.device)
        for start in range(0, s, rows):
            part, seen = slice(start, start + rows), slice(0, min(s, start + rows) // tokens)
            others = None if other_lse is None else other_lse[:, :, part]
            if seen.stop == 0:
                continue
            with torch.set_grad_enabled(with_gradients), saved_tensors_hooks(_as_it_is, _as_it_is):
                own = [x.detach().requires_grad_(with_gradients) for x in (q[:, part], k[:, seen], weights[:, part])]
                main = (main_q[:, part], main_k[:, seen], scale, topk_indices[:, part], mask, stage, start)
                found = ops.find("indexer_agreement").reference(*own, *main, others, tokens)
                kl = found[0]
            sums += found.detach()
            if with_gradients:
                of_block = torch.autograd.grad(kl, own)
                for whole, grad in zip(
                    (grads[0][:, part], grads[1][:, seen], grads[2][:, part]), of_block, strict=True
                ):
                    whole += grad
        ctx.save_for_backward(*(total.to(x.dtype) for total, x in zip(grads, (q, k, weights), strict=False)))
        return sums

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_inputs = [g * grad[0].to(g.dtype) for g in ctx.saved_tensors] or [None] * 3
        return (*of_inputs, *[None] * 9)
