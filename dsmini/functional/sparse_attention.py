"""Attention to the keys that an indexer picks: scores, picks, and MLA over the picked rows.

    I[t, s] = sum over heads j of w[t, j] * relu(q[t, j] . k[s])        index_scores
    S[t] = the s of the k largest I[t, s] that t may see                 pick_keys
    u[t] = attention of t to the rows S[t]                               picked_attention

All heads of absorbed MLA read the same rows, so that one set of picks serves all of them. Attention to the picks can be
written in two ways: with a mask over all rows, the reference, or with a gather of the picked rows, which reads k rows
a query instead of all. A set has no order, so the picks have none.

Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1, equations 1 and 2.
"""

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.functional.cached_attention import absorbed_attention
from dsmini.functional.fp32 import at_least_fp32
from dsmini.functional.hadamard import hadamard
from dsmini.functional.rope import Table, apply_rope, apply_rope_to_halves
from dsmini.functional.topk import stable_topk

BLOCK_BYTES = 4 << 20
"""Bytes of products of heads with keys, and of gathered rows, that exist at a time on a CPU, to stay in its caches."""
OFF_CPU = 16
"""Factor by which more exist on other devices, which need long operations."""


def queries_at_a_time(x: Tensor, query_bytes: int) -> int:
    """Return the number of queries whose blocks of query_bytes each may exist together on the device of x."""
    return max(1, BLOCK_BYTES * (1 if x.is_cpu else OFF_CPU) // query_bytes)


def turned(x: Float[Tensor, "b s h d"], table: Table, *, halves: bool) -> Float[Tensor, "b s h d"]:
    """Return an indexer's queries or keys with their first numbers rotated by position, and then transformed.

    Args:
        halves: RoPE pairs the halves of the first numbers, not neighbours.
    """
    rope, nope = x.tensor_split((2 * table[0].shape[-1],), -1)
    rope = (apply_rope_to_halves if halves else apply_rope)(rope, table)
    return hadamard(torch.cat((rope, nope), -1))


def _scores_cost(q: Tensor, k: Tensor, weights: Tensor) -> ops.Cost:
    (b, s, h, d), t = q.shape, k.shape[1]
    return ops.Cost(q.nbytes + k.nbytes + weights.nbytes, 4 * b * s * t, 2 * b * s * h * t * d, t, q.dtype)


@ops.operation("index_scores", cost=_scores_cost)
def index_scores(
    q: Float[Tensor, "b s h d"], k: Float[Tensor, "b t d"], weights: Float[Tensor, "b s h"]
) -> Float[Tensor, "b s t"]:
    """Return the indexer's score of each query and key, in FP32.

    ReLU comes before the weight, which may be negative. A key that no head likes has a score of exactly zero.

    Args:
        weights: weight of each head, with all constant factors.

    Source: DeepSeek-V3.2 report, equation 1.
    """
    # fp32: scores in BF16 tie, and ties pick different keys on different devices
    products = einsum(at_least_fp32(q), at_least_fp32(k), "b s h d, b t d -> b s h t")
    return einsum(products.relu(), weights, "b s h t, b s h -> b s t")


def _picks_cost(q: Tensor, k: Tensor, weights: Tensor, topk: int, hidden: Tensor) -> ops.Cost:
    (b, s), picks = q.shape[:2], min(topk, k.shape[1])
    scores = _scores_cost(q, k, weights)
    return scores._replace(read=scores.read + hidden.nbytes, written=8 * b * s * picks)


@ops.operation("pick_keys", cost=_picks_cost)
@torch.no_grad()
def pick_keys(
    q: Float[Tensor, "b s h d"],
    k: Float[Tensor, "b t d"],
    weights: Float[Tensor, "b s h"],
    topk: int,
    hidden: Bool[Tensor, "#b s t"],
) -> Int[Tensor, "b s k"]:
    """Return the keys with the topk largest index_scores of each query; min(topk, t) of them.

    A query that sees fewer keys than that picks them all, and -1 in the other places. Equal scores are common, since
    ReLU makes exact zeros. Any of them are right at the edge of the picks; here the earlier keys win, so that picks do
    not depend on how a sequence was cut into calls. Picks have no order and no gradient.

    Args:
        hidden: True for keys that a query may not see.

    Source: DeepSeek-V3.2 report, equation 2; -1 as in FlashMLA's kernels.
    """
    scores = index_scores.reference(q, k, weights).masked_fill(hidden, -torch.inf)
    picks = stable_topk(scores.flatten(0, 1), topk).unflatten(0, scores.shape[:2])
    return picks.masked_fill(scores.gather(-1, picks).isneginf(), -1)


@pick_keys.eager
@torch.no_grad()
def _(q: Tensor, k: Tensor, weights: Tensor, topk: int, hidden: Tensor) -> Tensor:
    """Score some queries at a time, so that the products of all heads with a long context never exist together."""
    if not q.numel():
        return pick_keys.reference(q, k, weights, topk, hidden)
    (b, s, h, _), t = q.shape, k.shape[1]
    rows = queries_at_a_time(q, 4 * b * h * t)
    blocks = []
    for start in range(0, s, rows):
        part = slice(start, start + rows)
        scores = index_scores(q[:, part], k, weights[:, part]).masked_fill_(hidden[:, part], -torch.inf)
        blocks.append(_first_largest(scores, min(topk, t)))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _first_largest(scores: Float[Tensor, "b s t"], k: int) -> Int[Tensor, "b s k"]:
    """Return the places of the k largest above -inf, first places first among equals, and -1 where there are fewer.

    torch.topk finds the k-th value alone: the places that it returns among equals depend on the length of a row. NaN is
    as large as infinity, so that it is picked, and seen in the output.
    """
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    edge = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > edge, (scores == edge) & ~scores.isneginf()
    kept = above | equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True))
    rank = torch.where(kept, kept.cumsum(-1) - 1, k)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    return rank.new_full((*scores.shape[:-1], k + 1), -1).scatter_(-1, rank, places)[..., :k]


def unpicked(picks: Int[Tensor, "b s k"], t: int) -> Bool[Tensor, "b s t"]:
    """Return the mask of picks: True for those of t keys that a query did not pick. A pick of -1 is none."""
    mask = torch.ones(*picks.shape[:2], t + 1, dtype=torch.bool, device=picks.device)
    return mask.scatter_(-1, torch.where(picks < 0, t, picks), False)[..., :t]


def _picked_cost(
    q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, picks: Tensor
) -> ops.Cost:
    (b, s, h, n), width, (c, v), k = q_nope.shape, rows.shape[2], w_uv.shape[1:], picks.shape[2]
    read = sum(x.nbytes for x in (q_nope, q_rope, w_uk, w_uv, picks)) + math.prod(picks.shape) * rows[0, 0].nbytes
    flops = 2 * b * s * h * (c * (n + v) + k * (width + c))
    return ops.Cost(read, b * s * h * v * q_nope.element_size(), flops, k, rows.dtype)


@ops.operation("picked_attention", cost=_picked_cost)
def picked_attention(
    q_nope: Float[Tensor, "b s h n"],
    q_rope: Float[Tensor, "b s h r"],
    rows: Float[Tensor, "b t w"],
    w_uk: Float[Tensor, "h n c"],
    w_uv: Float[Tensor, "h c v"],
    scale: float,
    picks: Int[Tensor, "b s k"],
) -> Float[Tensor, "b s hv"]:
    """Return absorbed_attention of each query to the rows that it picked, with the heads concatenated.

    Args:
        picks: distinct rows of each query, at least one; -1 is none.

    Source: DeepSeek-V3.2 report, equation 2.
    """
    mask = unpicked(picks, rows.shape[1])
    return absorbed_attention.reference(q_nope, q_rope, rows, w_uk, w_uv, scale, mask)


@picked_attention.eager
def _(q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, picks: Tensor) -> Tensor:
    """Gather the picked rows of some queries at a time; each query then is a sequence of its own, with k keys."""
    if not picks.numel():
        return picked_attention.reference(q_nope, q_rope, rows, w_uk, w_uv, scale, picks)
    b, k, row = len(rows), picks.shape[2], rows[0, 0].nbytes
    sequence = torch.arange(b, device=rows.device)[:, None, None]
    blocks = []
    some = queries_at_a_time(rows, b * k * row)
    for part in zip(*(x.split(some, 1) for x in (q_nope, q_rope, picks)), strict=True):
        chosen = rows[sequence, part[2].clamp(min=0)].flatten(0, 1)
        nope, rope, none = (rearrange(x, "b s ... -> (b s) 1 ...") for x in (*part[:2], part[2] < 0))
        y = absorbed_attention(nope, rope, chosen, w_uk, w_uv, scale, none)
        blocks.append(rearrange(y, "(b s) 1 d -> b s d", b=b))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def gathers_fast(rows: Tensor) -> bool:
    """Return True where a kernel serves picked_attention of such rows, gradients off.

    Attention with a mask then takes longer than the gather, also where it needs fewer operations (docs/log.md).
    """
    return ops.serves("picked_attention", rows)
