"""DeepSeek Sparse Attention: MLA in which a query attends to the keys that its indexer chooses.

    1. queries, latent and rotary key as in MLA
    2. the indexer's scores of all keys that a query sees, and the index_topk largest of them
    3. MLA's attention to these keys alone

The lightning indexer has small heads that score every key for every query. For a token with hidden state h, and its
query latent c_q, from which MLA makes its own queries:
    q_j = H RoPE(W_QB c_q)_j        a query for each of index_n_heads heads
    k   = H RoPE(LayerNorm(W_K h))  one key for all heads: cached
    w_j = W_w h                     a weight for each head, in FP32
    I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]) / sqrt(heads * head dim)
RoPE rotates the first qk_rope_head_dim numbers, in MLA the last ones. It pairs their two halves, where MLA pairs
neighbours. Its angles are MLA's, YaRN included. H is the Hadamard transform. It leaves all products as they
are, and makes the rounding to FP8 harmless: no number of a row is much larger than the others.

With no more than index_topk keys there is nothing to choose, and the layer is MLA. MLA's two forms remain. Expanded
makes keys and values of all tokens and masks those that were not chosen: training, and short prompts. Absorbed gathers
the chosen rows of the cache, so that a decoded token reads index_topk rows of it, whatever the context.

The choice is a constant: no gradient of the output reaches the indexer, which learns from a loss of its own. In
training there are two stages (section 2.1.1). In the dense warm-up attention reads all keys, and the indexer learns to
predict it; in the sparse stage attention reads the chosen keys, and the indexer learns to predict it among them.

In GLM-5.2 three of four layers have no indexer. They take the keys that the last layer before them with one chose, its
`source`, and attend to their own latents of these tokens. Its indexers rotate adjacent pairs
(indexer_rope_interleave). The choice goes through the layers in Context.choices. An
indexer learns to predict its own layer's attention, or the mean p of all g layers that take its choice. For these each
layer j adds KL(p_j || softmax(I)) / g. The sum has the gradient of KL(p || softmax(I)), which is softmax(I) - p, and
differs from it by a constant.

Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1; DeepSeek's released inference code; IndexCache (arXiv
2603.12201) for the objective of several layers. Which objective GLM-5.2 was trained with is not published, and no
trusted implementation trains shared layers, so their training is tested next to a second definition of ours alone.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config
from dsmini.nn.attention import Context, Mask, attend, cached_attention
from dsmini.nn.cache import CacheDtype, Rows
from dsmini.nn.codec import index_row
from dsmini.nn.gate import stable_topk
from dsmini.nn.layers import FP32Linear, LayerNorm, Projection, at_least_fp32, make_linear
from dsmini.nn.mla import MLA, absorbed_attention, form_of
from dsmini.nn.rope import CosSin, apply_rope, apply_rope_to_halves
from dsmini.numerics import quantize

BLOCK = 128
"""Queries that are masked, scored and attended together: of a long context no tensor of all pairs exists."""


def hadamard(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return x H / sqrt(d), with Sylvester's matrix H of ones and minus ones. Computed in FP32, returned in x's dtype.

    H / sqrt(d) is orthogonal and its own inverse: two transformed rows have the product that they had before. With
    H_2n = [[H_n, H_n], [H_n, -H_n]] each of log2(d) steps adds and subtracts the halves of groups of 2n numbers. d is a
    power of two.
    """
    d, y, n = x.shape[-1], at_least_fp32(x), 1
    while n < d:
        first, second = y.unflatten(-1, (-1, 2, n)).unbind(-2)
        y = torch.stack((first + second, first - second), -2).flatten(-3)
        n *= 2
    return (y * d**-0.5).to(x.dtype)


@ops.operation("index_scores")
def index_scores(
    q: Float[Tensor, "b s h d"], k: Float[Tensor, "b t d"], weights: Float[Tensor, "b s h"]
) -> Float[Tensor, "b s t"]:
    """Return the indexer's score of each query and key, in FP32.

    ReLU comes before the weight, which may be negative. A key whose products are all negative scores exactly zero.

    Args:
        weights: weight of each head, with all constant factors.

    Source: DeepSeek-V3.2 report, equation 1.
    """
    # fp32: scores in BF16 tie, and ties choose different keys on different devices
    with ops.without_autocast(q):
        products = einsum(at_least_fp32(q), at_least_fp32(k), "b s h d, b t d -> b s h t")
        return einsum(products.relu(), weights, "b s h t, b s h -> b s t")


@ops.operation("topk_keys")
@torch.no_grad()
def topk_keys(
    q: Float[Tensor, "b s h d"],
    k: Float[Tensor, "b t d"],
    weights: Float[Tensor, "b s h"],
    topk: int,
    mask: Bool[Tensor, "#b s t"],
) -> Int[Tensor, "b s k"]:
    """Return the keys with the topk largest index_scores of each query; min(topk, t) of them.

    A query that sees fewer keys than that chooses them all, and -1 in the other places. Equal scores are common, since
    ReLU makes exact zeros. Any of them are right at the edge; here the earlier keys win, so that the choice does not
    depend on how a sequence was cut into calls. It has no order and no gradient.

    Args:
        mask: True for keys that a query may not see.

    Source: DeepSeek-V3.2 report, equation 2; -1 as in FlashMLA's kernels.
    """
    scores = index_scores.reference(q, k, weights).masked_fill(mask, -torch.inf)
    indices = stable_topk(scores.flatten(0, 1), topk).unflatten(0, scores.shape[:2])
    return indices.masked_fill(scores.gather(-1, indices).isneginf(), -1)


def topk_mask(topk_indices: Int[Tensor, "b s k"], t: int) -> Bool[Tensor, "b s t"]:
    """Return True for those of t keys that a query did not choose. An index of -1 is none."""
    mask = torch.ones(*topk_indices.shape[:2], t + 1, dtype=torch.bool, device=topk_indices.device)
    return mask.scatter(-1, torch.where(topk_indices < 0, t, topk_indices), False)[..., :t]


@ops.operation("topk_attention")
def topk_attention(
    q_nope: Float[Tensor, "b s h n"],
    q_rope: Float[Tensor, "b s h r"],
    rows: Float[Tensor, "b t w"],
    w_uk: Float[Tensor, "h n c"],
    w_uv: Float[Tensor, "h c v"],
    scale: float,
    topk_indices: Int[Tensor, "b s k"],
) -> Float[Tensor, "b s hv"]:
    """Return absorbed_attention of each query to the rows that it chose, with the heads concatenated.

    All heads read the same rows, so that one choice serves all of them. The plain version masks all other rows; fast
    ones gather, and read k rows a query.

    Args:
        topk_indices: distinct rows of each query; -1 is none. A query without any has NaN, the softmax of nothing.

    Source: DeepSeek-V3.2 report, equation 2.
    """
    mask = topk_mask(topk_indices, rows.shape[1])
    return absorbed_attention.reference(q_nope, q_rope, rows, w_uk, w_uv, scale, mask)


def imposed(topk_indices: Int[Tensor, "b s k"], context: Context, start: int = 0) -> Int[Tensor, "b s k"]:
    """Return the keys that the context imposes on the queries from `start` on, and where it imposes none the chosen.

    Scores are computed in any case, so that the indexer learns. Source: as of experts, gate.py.
    """
    if context.keys is None:
        return topk_indices
    keys = context.keys[:, start : start + topk_indices.shape[1]]
    topk_indices = F.pad(topk_indices, (0, keys.shape[2] - topk_indices.shape[2]), value=-1)
    return keys.where((keys >= 0).any(-1, keepdim=True), topk_indices)


class Indexer(nn.Module):
    """The indexer of a layer. From a config, or from plain arguments with the three index sizes."""

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments if config else {"attention": "dsa", **arguments})
        if c.index_n_heads is None or c.index_head_dim is None or c.index_topk is None:
            raise ValueError(f"attention={c.attention!r} has no indexer; use attention='dsa'")
        self.n_heads: int = c.index_n_heads
        self.head_dim: int = c.index_head_dim
        self.topk: int = c.index_topk
        self.interleaved: bool = c.indexer_rope_interleave
        self.fp8: bool = c.indexer_fp8
        width = c.dim if c.q_lora_rank is None else c.q_lora_rank
        self.wq_b: Projection = make_linear(c, width, self.n_heads * self.head_dim)
        self.add_keys(c)
        self.weights_proj: FP32Linear = FP32Linear(c.dim, self.n_heads, init_std=c.init_std)

    def add_keys(self, c: ModelConfig) -> None:
        """Make the layers that make keys."""
        self.wk: Projection = make_linear(c, c.dim, self.head_dim)
        self.k_norm: LayerNorm = LayerNorm(self.head_dim)

    def forward(
        self, x: Float[Tensor, "b s m"], latent: Float[Tensor, "b s l"], cos_sin: CosSin
    ) -> tuple[Float[Tensor, "b s h d"], Float[Tensor, "b s d"], Float[Tensor, "b s h"]]:
        """Return queries, keys and head weights of tokens, of which index_scores makes I[t, s].

        Args:
            latent: the normed compressed query of MLA, or x where it compresses none.
        """
        return self.queries(latent, cos_sin), self.keys(x, cos_sin), self.head_weights(x)

    def queries(self, latent: Float[Tensor, "b s l"], cos_sin: CosSin) -> Float[Tensor, "b s h d"]:
        """Return the query of each head."""
        return self._rotated(rearrange(self.wq_b(latent), "b s (h d) -> b s h d", h=self.n_heads), cos_sin)

    def keys(self, x: Float[Tensor, "b t m"], cos_sin: CosSin) -> Float[Tensor, "b t d"]:
        """Return the key of each token, which is cached."""
        return self._rotated(self.k_norm(self.wk(x)).unsqueeze(2), cos_sin).squeeze(2)

    def head_weights(self, x: Float[Tensor, "b s m"]) -> Float[Tensor, "b s h"]:
        """Return the weight of each head, in FP32, with both constant factors of the score."""
        return self.weights_proj(x) * (self.n_heads * self.head_dim) ** -0.5

    def _rotated(self, x: Float[Tensor, "b s h d"], cos_sin: CosSin) -> Float[Tensor, "b s h d"]:
        """Rotate the first numbers by position, and transform all."""
        rope, nope = x.tensor_split((2 * cos_sin[0].shape[-1],), -1)
        rope = (apply_rope if self.interleaved else apply_rope_to_halves)(rope, cos_sin)
        x = hadamard(torch.cat((rope, nope), -1))
        # a scale is a power of two: products of rounded numbers are those of the codes, times both scales
        return quantize(x).dequantize(x.dtype) if self.fp8 else x


class IndexerLoss(NamedTuple):
    """The agreement of an indexer with the main model's attention, FP32 scalars."""

    kl: Float[Tensor, ""]
    """KL divergence in nats, mean over queries: the loss of the indexer."""
    recall: Float[Tensor, ""]
    """Share of the top-k keys by attention that were chosen, over the queries that see more than k keys; 1 without."""
    mass: Float[Tensor, ""]
    """Share of the attention to all keys that went to chosen ones, mean over queries."""


def head_sum(
    logits: Float[Tensor, "b h s t"], mask: Bool[Tensor, "#b s t"], other_lse: Float[Tensor, "b h s"] | None = None
) -> Float[Tensor, "b s t"]:
    """Return softmax(logits) over the keys that are not masked, summed over heads and L1-normalised.

    Args:
        other_lse: log-sum-exp of the logits of further keys, such as V4's window and sink. They take part in each
            head's softmax, so that a head that attends to them counts for less, and are left out of the result. A
            query that sees these alone has zeros.
    """
    logits = logits.masked_fill(mask[:, None], -torch.inf)
    if other_lse is None:
        return logits.softmax(-1).mean(1)  # each head's row sums to 1
    # a head's weight is the share of the keys here in its attention; a softmax over heads normalises it: [b, h, s]
    weight = F.logsigmoid(logits.logsumexp(-1) - other_lse).softmax(1)
    return einsum(logits.softmax(-1), weight, "b h s t, b h s -> b s t").masked_fill(mask.all(-1, keepdim=True), 0.0)


def kl_of_scores(
    target: Float[Tensor, "*rows t"], scores: Float[Tensor, "*rows t"], mask: Bool[Tensor, "*rows t"]
) -> Float[Tensor, "*rows"]:
    """Return KL(target || softmax(scores)) of each row in nats, over the keys that are not masked.

    The logarithm of the softmax is computed from the scores: no small number is added inside it.

    Args:
        target: sums to 1 over the keys that are not masked, and is 0 elsewhere.
    """
    log_q = scores.masked_fill(mask, -torch.inf).log_softmax(-1).masked_fill(mask, 0.0)
    return (torch.xlogy(target, target) - target * log_q).sum(-1)


@ops.operation("indexer_agreement")
def indexer_agreement(
    q: Float[Tensor, "b s h d"],
    k: Float[Tensor, "b t d"],
    weights: Float[Tensor, "b s h"],
    main_q: Float[Tensor, "b s heads width"],
    main_k: Float[Tensor, "b t groups width"],
    scale: float,
    topk_indices: Int[Tensor, "b s k"],
    mask: Callable[[int, int], Bool[Tensor, "#b s t"]],
    stage: Literal["warmup", "sparse"],
    start: int = 0,
    other_lse: Float[Tensor, "b heads s"] | None = None,
    tokens: int = 1,
) -> Float[Tensor, " 4"]:
    """Compare an indexer's scores with the main model's attention, for the queries from `start` on.

        p[t, s] = the main model's attention of t to s, summed over heads and L1-normalised: the target, a constant
        dense warm-up    KL(p[t, :] || softmax I[t, :])            all keys that t sees
        sparse stage     KL(p[t, S_t] || softmax I[t, S_t])        the chosen S_t, p normalised over them

    Args:
        q, k, weights: of the indexer, as in index_scores; t is (start + s) // tokens.
        main_q, main_k: queries and keys of the main model, detached. A key may serve several heads.
        mask: returns for queries start to stop True for those of the keys 0 to stop // tokens that they may not see.
        other_lse: as in head_sum.
        tokens: number of tokens that a key stands for.

    Returns:
        Sums over queries: the KL divergence, which alone has a gradient; the share of attention that went to chosen
        keys; the number of chosen keys among the top-k by attention, and the number of the latter, both over the
        queries that see more than k keys.

    Source: DeepSeek-V3.2 report, section 2.1.1, equations 3 and 4.
    """
    t, topk = k.shape[1], topk_indices.shape[2]
    # 1. the attention of the main model to all keys: [b, s, t]
    masked, left_out = mask(start, start + q.shape[1]), topk_mask(topk_indices, t)
    groups = main_q.unflatten(2, (main_k.shape[2], -1))
    logits = at_least_fp32(einsum(groups, main_k, "b s g h d, b t g d -> b g h s t").flatten(1, 2)) * scale
    attention = head_sum(logits, masked, other_lse)
    # 2. the indexer's scores next to it, of the keys that are compared
    target, compared = (head_sum(logits, left_out, other_lse), left_out) if stage == "sparse" else (attention, masked)
    kl = kl_of_scores(target, index_scores(q, k, weights), compared.expand_as(left_out)).sum()
    # 3. how much of the attention was chosen
    mass = attention.masked_fill(left_out, 0.0).sum()
    wanted = attention.topk(min(topk, t), sorted=False).indices
    many = ((~masked).sum(-1) > topk).expand(left_out.shape[:2])
    found = ((~left_out).gather(-1, wanted) & many[..., None]).sum()
    return torch.stack((kl, mass.detach(), found.to(kl.dtype), (many.sum() * topk).to(kl.dtype)))


def mean_loss(sums: Float[Tensor, " 4"], queries: int) -> IndexerLoss:
    """Return the loss of this many queries from the sums of indexer_agreement."""
    kl, mass, found, asked = sums.unbind()
    recall = torch.where(asked > 0, found / asked.clamp(min=1), 1.0)
    return IndexerLoss(kl / queries, recall.detach(), mass.detach() / queries)


class Choice(NamedTuple):
    """The keys that the queries of a call attend to in one layer, or in several."""

    topk_indices: Int[Tensor, "b s k"] | None = None
    """Positions of the keys; -1 is none. None: a query attends to all keys that it sees."""
    index: tuple[Float[Tensor, "b s i d"], Float[Tensor, "b s d"], Float[Tensor, "b s i"]] | None = None
    """Queries, keys and head weights of the indexer, where it learns from a layer that attends to these keys."""


class DSA(MLA):
    """DeepSeek Sparse Attention. From a config, or from plain arguments with the three index sizes.

    Args:
        layer: number of the block in its model. One that config.indexer_types calls shared has no indexer.
        mask: as in MLA; the indexer chooses among the keys that it leaves.

    Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1; GLM-5.2's config and transformers' glm_moe_dsa for
    shared layers.
    """

    source: int = 0
    """Number of the layer whose indexer chooses: its own, or the last one before it that has an indexer."""
    passed_on: int = 0
    """Number of fields of its Choice that later layers get: none, its keys, or what their losses compare too."""

    def __init__(
        self, config: ModelConfig | None = None, /, layer: int = 0, *, mask: Mask | None = None, **arguments: Any
    ) -> None:
        c = layer_config(config, arguments if config else {"attention": "dsa", **arguments})
        super().__init__(c, mask=mask)
        self.source = c.index_source(layer)
        if c.index_source(layer + 1) == layer:
            self.passed_on = 2 if c.indexer_target == "served" else 1
        self.indexer: Any = Indexer(c) if self.source == layer else None

    def attention(
        self, q: Float[Tensor, "b s h d"], new: tuple[Tensor, Tensor], context: Context, inputs: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b s hv"], IndexerLoss | None]:
        """Attend to the keys that an indexer chooses; to all where there are no more than index_topk.

        While an indexer learns from this layer, its loss is returned too. It moves the indexer alone, whose inputs are
        detached.
        """
        cache, stage = context.cache, context.stage
        # 1. the keys of each query: [b, s, k]
        topk_indices, index = self.choose(context, inputs)
        if topk_indices is None:
            return super().attention(q, new, context, inputs)
        # 2. attention to the chosen rows of the cache, absorbed: [b, s, h v]
        if cache is not None and form_of(self, q.shape[1], cache, topk_indices.shape[2]) == "absorbed":
            q_nope, q_rope, rows, w_uk, w_uv = self.absorbed_operands(q, new, cache)
            return topk_attention(q_nope, q_rope, rows, w_uk, w_uv, self.scale, topk_indices), None
        # 3. or to keys and values of every head, all but the chosen ones masked: [b, h, s, v]
        k, v = self.keys_and_values(*(new if cache is None else cache.extend(new, q.dtype)))
        loss = None
        if index is not None and stage is not None:
            loss = self.indexer_loss(index, q, k, topk_indices, context, stage)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if stage == "warmup":
            y = attend(q, k, v, self.scale, context, self.mask)
        else:
            y = self.masked(q, k, v, topk_indices, context)
        return rearrange(y, "b h s v -> b s (h v)"), loss

    def choose(self, context: Context, inputs: tuple[Float[Tensor, "b s m"], Float[Tensor, "b s l"]]) -> Choice:
        """Return the keys of the new tokens: the indexer's choice, or in a shared layer that of its source.

        The indexer's keys are cached in any case.

        Args:
            inputs: as in `attention`.

        Raises: ValueError for a shared layer in a call without its source.
        """
        if self.indexer is None:
            if self.source not in context.choices:
                raise ValueError(
                    f"a shared layer takes the keys that layer {self.source} chose, and this call has none; run that "
                    "layer before it, with the same Context"
                )
            return context.choices[self.source]
        (x, latent), cache, cos_sin, stage = inputs, context.cache, context.cos_sin(self.rope), context.stage
        longest = x.shape[1] if cache is None else int(cache.at.lengths.max())
        choice = Choice()
        if stage is not None or longest > self.indexer.topk:
            with torch.set_grad_enabled(stage is not None and torch.is_grad_enabled()):
                index = self.indexer(x.detach(), latent.detach(), cos_sin)
            choice = Choice(imposed(self.select_topk(index, context), context), None if stage is None else index)
        elif cache is not None:
            cache.index.append((self.indexer.keys(x, cos_sin),))
        if context.chosen is not None:
            context.chosen.append(choice.topk_indices)
        context.choices[self.source] = choice._replace(**dict.fromkeys(Choice._fields[self.passed_on :]))
        return choice

    def new_cache(self, batch_size: int, max_seq_len: int, dtype: CacheDtype, device: torch.device) -> Rows:
        """Return MLA's cache with another one for the indexer's keys, whose scales in FP8 are powers of two."""
        cache = super().new_cache(batch_size, max_seq_len, dtype, device)
        if self.indexer is not None:
            cache.index = Rows(batch_size, max_seq_len, index_row(self.indexer.head_dim).stored_in(dtype), device)
        return cache

    @torch.no_grad()
    def select_topk(
        self,
        index: tuple[Float[Tensor, "b s i d"], Float[Tensor, "b s d"], Float[Tensor, "b s i"]],
        context: Context,
    ) -> Int[Tensor, "b s k"]:
        """Return the positions of the keys that each new token attends to; -1 where it sees fewer than index_topk.

        With a cache the indexer's keys are appended to it.

        Args:
            index: the indexer's queries, keys and head weights of the new tokens.
        """
        q, keys, weights = index
        if context.cache is not None:
            (keys,) = context.cache.index.extend((keys,), keys.dtype)
        blocks, k = [], min(self.indexer.topk, keys.shape[1])
        for start in range(0, q.shape[1], BLOCK):
            part, t = slice(start, start + BLOCK), _keys_before(start + BLOCK, keys.shape[1], context)
            mask: Any = context.masked(self.mask, t, start, min(start + BLOCK, q.shape[1]))
            chosen = topk_keys(q[:, part], keys[:, :t], weights[:, part], k, mask)
            blocks.append(F.pad(chosen, (0, k - chosen.shape[2]), value=-1))
        return torch.cat(blocks, 1)

    def indexer_loss(
        self,
        index: tuple[Float[Tensor, "b s i d"], Float[Tensor, "b s d"], Float[Tensor, "b s i"]],
        q: Float[Tensor, "b s h n"],
        k: Float[Tensor, "b s h n"],
        topk_indices: Int[Tensor, "b s k"],
        context: Context,
        stage: Literal["warmup", "sparse"],
    ) -> IndexerLoss:
        """Compare the indexer's queries, keys and head weights with attention by the queries q and keys k.

        Raises: ValueError for a context with a mask: an indexer learns from causal attention.
        """
        if context.mask is not None:
            raise ValueError("an indexer that learns got a mask of keys; leave it out, or let none learn")

        def mask(start: int, stop: int) -> Any:
            return context.masked(self.mask, stop, start, stop)

        sums = indexer_agreement(*index, q.detach(), k.detach(), self.scale, topk_indices, mask, stage)
        return mean_loss(sums, q.shape[0] * q.shape[1])

    def masked(
        self,
        q: Float[Tensor, "b h s d"],
        k: Float[Tensor, "b h t d"],
        v: Float[Tensor, "b h t v"],
        topk_indices: Int[Tensor, "b s k"],
        context: Context,
    ) -> Float[Tensor, "b h s v"]:
        """Attend to keys and values of every head, all but the chosen ones masked."""
        y = []
        for i, (part, chosen) in enumerate(zip(q.split(BLOCK, 2), topk_indices.split(BLOCK, 1), strict=True)):
            t = _keys_before((i + 1) * BLOCK, k.shape[2], context)
            y.append(cached_attention(part, k[:, :, :t], v[:, :, :t], self.scale, topk_mask(chosen, t)))
        return torch.cat(y, 2)


def dsa_layers(model: nn.Module) -> list[Any]:
    """Return the attention layers with an indexer in the order of a model, those of MTP blocks last.

    They are DSA, or V4's CompressedAttention.
    """
    return [module for module in model.modules() if isinstance(getattr(module, "indexer", None), Indexer)]


def _keys_before(stop: int, t: int, context: Context) -> int:
    """Return the number of t keys that new tokens before column `stop` may see, as far as shapes alone tell."""
    causal = context.mask is None and (context.cache is None or context.cache.at.all_new)
    return min(stop, t) if causal else t
