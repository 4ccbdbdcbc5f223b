"""Sparse attention of DeepSeek-V3.2, counted: cache, bytes and FLOPs of a decoded token, next to dense MLA.

Every layer has an indexer. Its heads score all t cached tokens in FP8, and attention reads only the k best:

    scores       2 * index_n_heads * index_head_dim * t            FLOP of a layer, FP8
    attention    2 * n_heads * (2 kv_lora_rank + rope) * min(t, k)    FLOP of a layer, BF16, absorbed
    read         132 t + 656 min(t, k)                             bytes of a layer; dense 656 t

Worked example at 128K tokens: scores 2.15 GFLOP and attention 0.57, dense 36.5: 13.4 times fewer. Bytes: 4.6 times
fewer. From t = k / (1 - 16384 / 278528) = 2176 tokens on, scores and k tokens are less work than all tokens.

The cache grows: a row is 512 codes, 4 FP32 scales and 64 BF16 numbers, 656 bytes; the indexer's key is 128 codes and
a scale, 132. 61 layers make 48,068 bytes a token, 50.4 GB at 1M tokens. So it saves reading, not memory.

Where scores cost more than attention, as in a model with few narrow heads, the indexer never computes less.

Source: DeepSeek-V3.2 report (arXiv 2512.02556); released inference code.
"""

from dataclasses import dataclass
from functools import cache

from dsmini.planner.model.kv_cache import all_layers, cache_row, index_row
from dsmini.planner.model.matrices import indexer_matrices, parameters_of
from dsmini.planner.model.sizes_files import FOLDER, read_sizes
from dsmini.planner.model.sparse_context import is_sparse
from dsmini.planner.model.weights import weights
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    FLOPS,
    TOKENS,
    Bytes,
    BytesPerToken,
    Count,
    D,
    Flops,
    N,
    Quantity,
    Tokens,
    number_of,
    smallest,
)
from dsmini.planner.quantities.sizes import BF16_COST

SOURCE = "V3.2 report (arXiv 2512.02556)"


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseSizes:
    """Sizes of the indexer, and the published count that the comparison with V4 rounds to."""

    title: str
    prefix: str
    index_n_heads: Count
    """Heads of the indexer."""
    index_head_dim: Count
    """Width of an indexer's head, and of its one key."""
    index_topk: Count
    """Tokens that attention reads."""
    activated: Count
    """Activated parameters as printed."""

    @classmethod
    @cache
    def published(cls) -> "SparseSizes":
        """Return the sizes of DeepSeek-V3.2."""
        return read_sizes(cls, FOLDER / "deepseek-v3.2.toml")

    @classmethod
    def of(cls, model: ModelInputs) -> "SparseSizes":
        """Return the sizes of the model's own indexers."""
        sizes = {name: getattr(model, name) for name in ("index_n_heads", "index_head_dim", "index_topk")}
        return cls(title=model.n_layers.source, prefix="", **sizes, activated=weights(model, "fp8").active)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseAttention(Figures):
    """Cache of a token, and what a token at some context reads and computes."""

    context: Tokens
    """Cached tokens that the token sees."""
    row: Bytes
    """Bytes of a token in one layer for attention."""
    index_row: Bytes
    """Bytes of a token in one layer for the indexer."""
    kv_cache: BytesPerToken
    cache_ratio: Count
    """Cache with the indexer's keys over that without."""
    cache: Bytes
    """Bytes of a sequence of this context."""
    index_flops: Flops
    """Scores of all cached tokens, one layer."""
    attention_flops: Flops
    """Attention to the chosen tokens, one layer."""
    dense_flops: Flops
    """Attention to all cached tokens, one layer."""
    flops_ratio: Count
    """Dense over sparse, operations of FP8 and BF16 alike."""
    crossover: Tokens | None
    """Context from which on sparse attention computes less; None if there is none."""
    read: Bytes
    """Bytes read in one layer."""
    dense_read: Bytes
    read_ratio: Count
    """Dense over sparse."""
    indexer_parameters: Count
    """Parameters of one layer's indexer."""
    layers_flops: Flops
    """Attention and scores of all layers in FP8 units: an operation in BF16 counts twice."""
    token_flops: Flops
    """All operations of a token in FP8 units. Matrices count as FP8."""


def sparse_attention(model: ModelInputs, sizes: SparseSizes, context: Tokens) -> SparseAttention:
    """Return the figures of a decoded token that sees this many cached tokens.

    Args:
        model: a model with MLA or DSA. DeepSeek-V3's config makes it V3.2, which has the same sizes but for indexers.

    Raises: ValueError for attention that is not MLA.
    """
    cached = number_of(context)
    chosen = smallest(cached, sizes.index_topk)
    row = _named(cache_row(model, "fp8"), "row", "Cache of a token for attention, one layer")
    key = _named(index_row(sizes.index_head_dim, "fp8"), "index_row", "Cache of a token for the indexer, one layer")
    per_token = _named(all_layers(model, row + key), "kv_cache", "Cache of a token with an indexer, FP8")
    score = FLOPS(2) * (sizes.index_n_heads * sizes.index_head_dim)
    attend = FLOPS(2) * (model.n_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim))
    index = _named(score * cached, "index_flops", "Scores of a token, one layer")
    sparse = _named(attend * chosen, "attention_flops", "Attention to chosen tokens, one layer")
    dense = _named(attend * cached, "dense_flops", "Attention to all cached tokens, one layer")
    read = _named(key * cached + row * chosen, "read", "Cache that a token reads, one layer")
    dense_read = _named(row * cached, "dense_read", "Cache that a token reads in dense MLA, one layer")
    indexer = _named(_indexer(model, sizes), "indexer_parameters", "Parameters of an indexer")
    active = weights(model, "fp8").active
    if not is_sparse(model):
        active = active + model.n_layers * indexer
    layers = _named(model.n_layers * (index + BF16_COST * sparse), "layers_flops", "Scores and attention, all layers")
    crossover = sizes.index_topk * (attend / (attend - score)) * TOKENS(1) if score < attend else None
    return SparseAttention(
        context=context,
        row=row,
        index_row=key,
        kv_cache=per_token,
        cache_ratio=_named((row + key) / row, "cache_ratio", "Cache with an indexer over that without"),
        cache=_named(context * per_token, "cache", "Cache of a sequence with an indexer"),
        index_flops=index,
        attention_flops=sparse,
        dense_flops=dense,
        flops_ratio=_named(dense / (index + sparse), "flops_ratio", "Operations of dense attention over sparse"),
        crossover=_named(crossover, "crossover", "Context from which on it computes less")
        if crossover is not None
        else None,
        read=read,
        dense_read=dense_read,
        read_ratio=_named(dense_read / read, "read_ratio", "Bytes read by dense attention over sparse"),
        indexer_parameters=indexer,
        layers_flops=layers,
        token_flops=_named(FLOPS(2) * active + layers, "token_flops", "Operations of a token in FP8 units"),
    )


def _named(figure: Quantity[N, D], name: str, title: str) -> Quantity[N, D]:
    return figure.named(f"v32_{name}", title, SOURCE)


def _indexer(model: ModelInputs, sizes: SparseSizes) -> Count:
    """Return wq_b, wk, weights_proj, and the weight and bias of the key's norm."""
    matrices = indexer_matrices(model, sizes.index_n_heads, sizes.index_head_dim)
    return parameters_of(matrices) + 2 * sizes.index_head_dim
