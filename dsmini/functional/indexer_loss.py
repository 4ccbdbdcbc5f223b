"""The loss of an indexer: how far its scores are from the attention that it has to foresee.

    p[t, s] = the main model's attention of t to s, summed over heads and L1-normalised: the target, a constant
    dense warm-up    mean over t of KL(p[t, :] || softmax I[t, :])            all keys that t sees
    sparse stage     mean over t of KL(p[t, S_t] || softmax I[t, S_t])        the picks S_t, p normalised over them
The gradient of both with respect to the scores is softmax(I) - p.

A block of queries at a time is scored and compared, and its gradient computed at once: neither the scores of all pairs
nor the heads' attention to them exist together.

Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1.1, equations 3 and 4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsmini import ops
from dsmini.functional.fp32 import at_least_fp32
from dsmini.functional.sparse_attention import index_scores, queries_at_a_time, unpicked


class IndexerFit(NamedTuple):
    """The agreement of an indexer with the main model's attention, FP32 scalars."""

    kl: Float[Tensor, ""]
    """KL divergence in nats, mean over queries: the loss of the indexer."""
    recall: Float[Tensor, ""]
    """Share of the top-k keys by attention that were picked, over the queries that see more than k keys; 1 without."""
    mass: Float[Tensor, ""]
    """Share of the attention to all keys that went to picked ones, mean over queries."""


class MainAttention(NamedTuple):
    """The attention of the main model that an indexer learns from. No gradient reaches it."""

    q: Float[Tensor, "b s h d"]
    k: Float[Tensor, "b s h d"]
    scale: float
    hidden: Callable[[int, int], Bool[Tensor, "#b n t"]]
    """Returns for the queries from a first to before a second position True for the keys, before the second position
    too, that they may not see."""


def head_sum(logits: Float[Tensor, "b h s t"], hidden: Bool[Tensor, "#b s t"]) -> Float[Tensor, "b s t"]:
    """Return softmax(logits) over the keys that are not hidden, summed over heads and L1-normalised."""
    return logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1).mean(1)  # each head's row sums to 1


def kl_of_scores(
    target: Float[Tensor, "*rows t"], scores: Float[Tensor, "*rows t"], hidden: Bool[Tensor, "*rows t"]
) -> Float[Tensor, "*rows"]:
    """Return KL(target || softmax(scores)) of each row in nats, over the keys that are not hidden.

    The logarithm of the softmax is computed from the scores: no small number is added inside it.

    Args:
        target: sums to 1 over the keys that are not hidden, and is 0 elsewhere.
    """
    log_q = scores.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0.0)
    return (torch.xlogy(target, target) - target * log_q).sum(-1)


def indexer_fit(
    q: Float[Tensor, "b s h d"],
    k: Float[Tensor, "b s d"],
    weights: Float[Tensor, "b s h"],
    main: MainAttention,
    picks: Int[Tensor, "b s k"],
    stage: str,
) -> IndexerFit:
    """Compare index_scores with the main model's attention. Only kl has a gradient, of first order.

    Args:
        q, k, weights: as in index_scores.
        picks: of each query, -1 for none.
        stage: "warmup" compares all keys that a query sees, "sparse" those that it picked.
    """
    values: Any = _IndexerFit.apply(q, k, weights, main, picks, stage, torch.is_grad_enabled())
    return IndexerFit(*values)


def _as_it_is(saved: Tensor) -> Tensor:
    """Hold a tensor for a backward that follows at once: recomputation would run the whole block again for it."""
    return saved


class _IndexerFit(torch.autograd.Function):
    """indexer_fit; gradients are computed block by block in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        main: MainAttention,
        picks: Tensor,
        stage: str,
        with_gradients: bool,
    ) -> tuple[Tensor, ...]:
        (b, s), heads, topk = q.shape[:2], max(q.shape[2], main.q.shape[2]), picks.shape[2]
        rows = queries_at_a_time(q, 4 * b * heads * s)
        with_gradients = with_gradients and any(ctx.needs_input_grad)
        # fp32: all blocks add to the gradient of a key
        sums = [torch.zeros_like(x, dtype=weights.dtype) for x in (q, k, weights)] if with_gradients else []
        kl, mass, found, asked = torch.zeros(4, dtype=weights.dtype, device=q.device).unbind()
        for start in range(0, s, rows):
            end = min(s, start + rows)
            hidden, missed = main.hidden(start, end), unpicked(picks[:, start:end], end)
            # 1. the attention of the main model to all keys: [b, n, end]
            logits = einsum(main.q[:, start:end], main.k[:, :end], "b s h d, b t h d -> b h s t")
            logits = at_least_fp32(logits) * main.scale
            attention = head_sum(logits, hidden)
            mass += attention.masked_fill(missed, 0.0).sum()
            many = (~hidden).sum(-1).expand(b, -1) > topk
            if topk < end:
                best = attention.topk(topk, sorted=False).indices
                found += (~missed).gather(-1, best)[many].sum()
                asked += many.sum() * topk
            # 2. the indexer's scores next to it, of the keys that are compared: [b, n, end]
            target, left_out = attention, hidden.expand_as(missed)
            if stage == "sparse":
                target, left_out = head_sum(logits, missed), missed
            with torch.set_grad_enabled(with_gradients), saved_tensors_hooks(_as_it_is, _as_it_is):
                parts = [x.detach().requires_grad_(with_gradients) for x in (q[:, start:end], k[:, :end])]
                parts.append(weights[:, start:end].detach().requires_grad_(with_gradients))
                scores = index_scores(*parts)
            kl += kl_of_scores(target, scores.detach(), left_out).sum()
            # 3. the gradient, softmax(I) - p
            if with_gradients:
                softmax = scores.detach().masked_fill(left_out, -torch.inf).softmax(-1)
                of_block = torch.autograd.grad(scores, parts, (softmax - target) / (b * s))
                for whole, grad in zip((sums[0][:, start:], sums[1], sums[2][:, start:]), of_block, strict=True):
                    whole[:, : grad.shape[1]] += grad
        ctx.save_for_backward(*(total.to(x.dtype) for total, x in zip(sums, (q, k, weights), strict=False)))
        recall = torch.where(asked > 0, found / asked.clamp(min=1), 1.0)
        mass = mass / (b * s)
        ctx.mark_non_differentiable(recall, mass)
        return kl / (b * s), recall, mass

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        of_inputs = [g * grad.to(g.dtype) for g in ctx.saved_tensors] or [None] * 3
        return (*of_inputs, None, None, None, None)
