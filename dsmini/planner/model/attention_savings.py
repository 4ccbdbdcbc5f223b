"""Savings of later attention: V3.2's indexer in a model with MLA, and V4's compressed entries next to V3.2 itself.

Worked example, DeepSeek-V3 at 4096 tokens: a layer computes 0.64 GFLOP of a token's attention with an indexer, 1.14
without. From 2176 tokens on it computes less. At 1M tokens V4-Pro stores 9.55 times fewer bytes of a token than V3.2.
"""

from dataclasses import dataclass

from dsmini.planner.model.compressed_attention import (
    CompressedAttention,
    SharedSizes,
    compressed_attention,
    shared_cache,
)
from dsmini.planner.model.compressed_parameters import CompressedSizes
from dsmini.planner.model.references import is_v3
from dsmini.planner.model.sparse_attention import SparseAttention, SparseSizes, sparse_attention
from dsmini.planner.model.sparse_context import is_sparse
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import BytesPerToken, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSavings(Figures):
    """The model with V3.2's indexer, or with its own; V4 and V4.1 for DeepSeek-V3 alone, whose successors they are."""

    sparse: SparseAttention
    pro: CompressedAttention | None
    flash: CompressedAttention | None
    shared: BytesPerToken | None
    """V4.1-Flash's cache of a token."""


def attention_savings(model: ModelInputs, context: Tokens) -> AttentionSavings | None:
    """Return the savings for a decoded token that sees this many cached tokens; None for attention that is not MLA."""
    if not model.config.is_mla:
        return None
    sizes = SparseSizes.of(model) if is_sparse(model) else SparseSizes.published()
    sparse = sparse_attention(model, sizes, context)
    if not is_v3(model):
        return AttentionSavings(sparse=sparse, pro=None, flash=None, shared=None)
    pro, flash = (
        compressed_attention(CompressedSizes.published(f"deepseek-v4-{name}"), context, sparse, sizes)
        for name in ("pro", "flash")
    )
    return AttentionSavings(sparse=sparse, pro=pro, flash=flash, shared=shared_cache(SharedSizes.published()))
