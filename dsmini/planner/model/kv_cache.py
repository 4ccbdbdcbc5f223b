"""Cache of a model: bytes that decoding stores of a token, compared with multi-head attention, and what fits.

    MLA               kv_lora_rank + qk_rope_head_dim numbers in a layer
    DSA               index_head_dim numbers more: the indexer's key
    MHA, GQA, MQA     n_kv_heads * (qk_nope_head_dim + v_head_dim) numbers in a layer

Worked example, DeepSeek-V3 in BF16: (512 + 64) numbers * 2 bytes * 61 layers = 70,272 bytes a token. Multi-head
attention with as many heads stores 128 * (128 + 128) = 32,768 numbers, of which MLA saves 1 - 576 / 32768 = 98.24 %.
MLA stores as much as GQA with 576 / 256 = 2.25 groups. In FP8 the latent has scales and the rotary key stays in BF16:
512 + 4 * 4 + 64 * 2 = 656 bytes in a layer.

80 GB of memory next to 20 GB of weights hold 60e9 / (70,272 * 4096) = 208 sequences of 4096 tokens.

Source: DeepSeek-V2 report, table 1; "Insights into DeepSeek-V3", table 1 (its KB are 1000 bytes).
"""

from dataclasses import dataclass

from dsmini.accounting.kv_cache import CacheDtype
from dsmini.planner.model.matrices import kv_heads
from dsmini.planner.model.sparse_context import is_sparse, keys_met
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import (
    BYTES,
    TOKENS,
    Bytes,
    BytesPerToken,
    Count,
    Tokens,
    largest,
    number_of,
    per,
    rounded_down,
)
from dsmini.planner.quantities.sizes import BF16, SIZES, fp8_row

SOURCE = "V2, table 1; INS, table 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan(Figures):
    """Cache of a token, and the multi-head attention that it is compared with."""

    row: Bytes
    """Bytes that one layer stores of a token."""
    index_row: Bytes | None
    """The part of them that is an indexer's key; None without indexers."""
    per_token: BytesPerToken
    """Bytes that all layers store of a token."""
    baseline: BytesPerToken
    """Bytes of multi-head attention with as many heads, in BF16, or in FP32 for a cache in FP32."""
    saving: Count
    """Share of the baseline that is saved."""
    groups: Count
    """Number of GQA groups that would store as many numbers."""


def cache_plan(model: ModelInputs, dtype: CacheDtype) -> CachePlan:
    """Return the cache of a token in this dtype.

    Raises: ValueError for "fp8" where attention is not MLA, and for an unknown dtype.
    """
    row, index = cache_row(model, dtype), None
    if is_sparse(model):
        index = index_row(model.index_head_dim, dtype).named("index_row", "Indexer's key of a token, one layer", SOURCE)
        row = row + index
    row = row.named("cache_row", "Cache of a token in one layer", SOURCE)
    per_token = all_layers(model, row).named("kv_cache", "Cache of a token, all layers", SOURCE)
    head = model.qk_nope_head_dim + model.v_head_dim
    number = SIZES.get(dtype, BF16)
    baseline = all_layers(model, model.n_heads * head * number)
    baseline = baseline.named("mha_kv_cache", "Cache of a token with MHA, all layers", SOURCE)
    groups = (row_numbers(model) + model.index_head_dim if is_sparse(model) else row_numbers(model)) / head
    return CachePlan(
        row=row,
        index_row=index,
        per_token=per_token,
        baseline=baseline,
        saving=cache_saving(per_token, baseline).named("cache_saving", "Share of MHA's cache that is saved", SOURCE),
        groups=groups.named("equal_gqa_groups", "Groups of GQA with as large a cache", "V2, table 1"),
    )


def row_numbers(model: ModelInputs) -> Count:
    """Return how many numbers a layer stores of a token for attention."""
    if model.config.is_mla:
        return model.kv_lora_rank + model.qk_rope_head_dim
    return kv_heads(model) * (model.qk_nope_head_dim + model.v_head_dim)


def cache_row(model: ModelInputs, dtype: CacheDtype) -> Bytes:
    """Return the bytes that a layer stores of a token for attention.

    Raises: ValueError for "fp8" where attention is not MLA, and for an unknown dtype.
    """
    if dtype == "fp8":
        if not model.config.is_mla:
            raise ValueError(
                f"dtype='fp8' is the layout of MLA's latent, not of attention={model.config.attention!r}; use bfloat16"
            )
        return fp8_row(model.kv_lora_rank) + model.qk_rope_head_dim * BF16
    if dtype not in SIZES:
        raise ValueError(f"a cache of dtype={dtype!r}; use float32, bfloat16 or fp8")
    return row_numbers(model) * SIZES[dtype]


def index_row(width: Count, dtype: CacheDtype) -> Bytes:
    """Return the bytes that a layer stores of a token for an indexer with a key of this width."""
    return fp8_row(width) if dtype == "fp8" else width * SIZES[dtype]


def read_share(model: ModelInputs, cache: CachePlan, context: Tokens) -> Count | None:
    """Return the share of a sequence's cache that a new token reads: None for all of it, without indexers.

    An indexer's keys are read whole, and of attention's rows those that it picked.
    """
    if cache.index_row is None:
        return None
    return (cache.index_row + (cache.row - cache.index_row) * keys_met(model, context) / number_of(context)) / cache.row


def all_layers(model: ModelInputs, row: Bytes) -> BytesPerToken:
    """Return the bytes of a token in all layers, those of multi-token prediction not among them."""
    return per(model.n_layers * row, TOKENS)


def cache_saving(per_token: BytesPerToken, baseline: BytesPerToken) -> Count:
    """Return the share of a baseline's cache that is saved."""
    return (baseline - per_token) / baseline


def memory_left(memory: Bytes, weights: Bytes) -> Bytes:
    """Return the memory beside the weights, or zero bytes where the weights do not fit."""
    return largest(memory - weights, BYTES(0))


def sequences_that_fit(left: Bytes, context: Tokens, per_token: BytesPerToken) -> Count:
    """Return how many sequences of this length fit into the memory that is left: a whole number."""
    return rounded_down(left / (context * per_token))


def longest_context(left: Bytes, sequences: Count, per_token: BytesPerToken) -> Tokens:
    """Return the whole tokens that each of some sequences can hold in the memory that is left."""
    return rounded_down(left / (sequences * per_token) / TOKENS(1)) * TOKENS(1)
