"""Compressed attention of DeepSeek-V4, counted: cache, FLOPs, and both compared with V3.2.

One entry of head_dim numbers is key and value of all heads. A layer is one of three kinds:

    window    the last 128 tokens
    CSA       the window, and the index_topk best of one entry for every 4 tokens; its indexer scores all entries
    HCA       the window, and one entry for every 128 tokens, all of them

An entry is 448 FP8 codes, 64 BF16 rotary numbers, 7 scales and a byte of padding: 584 bytes. The indexer's entry is 128
numbers in FP4 and 4 scales: 68 bytes. Worked example, V4-Pro with 30 CSA and 31 HCA layers:

    30 * (584 + 68) / 4 + 31 * 584 / 128 = 5031.4 bytes a token, V3.2 has 48,068: 9.55 times more

FLOPs of a token at context T in FP8 units, where an operation in BF16 counts twice and one in FP4 half:

    2 activated + BF16 * 4 head_dim n_heads (entries attended) + FP4 * 2 index_n_heads index_head_dim (entries scored)

At T = 2^20 V4-Pro takes 0.315 T, V4-Flash 0.119 T and V3.2 1.192 T: 3.78 and 10.03 times fewer. With the activated
parameters as printed, 49, 13 and 37 billion, 3.77 and 10.07. The report prints 3.7 and 9.8.

V4.1 shares entries between layers and keeps them in FP4: 256 + 32 = 288 bytes with an indexer's entry of 68. Three
sources with an entry for every 2 tokens and one with an entry for each make 3 * 356 / 2 + 356 = 890 bytes a token.

Source: DeepSeek-V4 report (arXiv 2606.19348), section 2.3; DeepSeek-V4.1 report (arXiv 2609.19969).
"""

from dataclasses import dataclass

from dsmini.planner.model.compressed_parameters import CompressedParameters, CompressedSizes, compressed_parameters
from dsmini.planner.model.sizes_files import FOLDER, read_sizes
from dsmini.planner.model.sparse_attention import SparseAttention, SparseSizes
from dsmini.planner.quantities.figures import Figures
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
    per,
    smallest,
)
from dsmini.planner.quantities.sizes import BF16, BF16_COST, E8M0, FP4, FP4_COST, FP8

SOURCE = "V4, section 2.3"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedAttention(Figures):
    """Cache of a token, operations of a token at some context, and V3.2's over them."""

    parameters: CompressedParameters
    entry: Bytes
    index_entry: Bytes
    kv_cache: BytesPerToken
    """Bytes that grow with every token."""
    window: Bytes
    """Bytes of the windows, which every sequence holds once."""
    cache: Bytes
    """Bytes of a sequence of this context, windows included."""
    cache_ratio: Count
    """Bytes a token of V3.2 over these."""
    baseline_share: Count
    """Share of the bytes that GQA in BF16 would store."""
    attention_flops: Flops
    """Attention of all layers in FP8 units."""
    index_flops: Flops
    """Scores of all indexers in FP8 units."""
    token_flops: Flops
    """All operations of a token in FP8 units."""
    rounded_flops: Flops
    """The same with the activated parameters as printed."""
    flops_ratio: Count
    """V3.2's operations over these, both counted."""
    rounded_ratio: Count
    """The same, both with the activated parameters as printed."""


def compressed_attention(
    sizes: CompressedSizes, context: Tokens, older: SparseAttention, older_sizes: SparseSizes
) -> CompressedAttention:
    """Return the figures of a token that sees this many tokens.

    Args:
        older: V3.2 at the same context, and its sizes.
    """

    def named(figure: Quantity[N, D], name: str, title: str) -> Quantity[N, D]:
        return figure.named(f"{sizes.prefix}{name}", f"{sizes.title}: {title}", SOURCE)

    counted = compressed_parameters(sizes)
    entry = named(_entry(sizes), "entry", "an entry that attention reads")
    scales = sizes.index_head_dim / sizes.index_scale_group * E8M0
    index_entry = named(sizes.index_head_dim * FP4 + scales, "index_entry", "an indexer's entry")
    growing = sizes.csa_layers * (entry + index_entry) / sizes.csa_ratio + sizes.hca_layers * entry / sizes.hca_ratio
    per_token = named(per(growing, TOKENS), "kv_cache", "cache of a token")
    window = named(counted.layers * sizes.window * entry, "window_cache", "windows of a sequence, all layers")
    attend = named(_attention(sizes, context), "attention_flops", "attention of a token in FP8 units")
    scored = number_of(context) / sizes.csa_ratio
    score = FLOPS(2) * (sizes.index_n_heads * sizes.index_head_dim) * (sizes.csa_layers * scored)
    index = named(FP4_COST * score, "index_flops", "scores of a token in FP8 units")
    flops = named(FLOPS(2) * counted.active + attend + index, "token_flops", "operations of a token in FP8 units")
    rounded = named(
        FLOPS(2) * sizes.activated + attend + index, "rounded_flops", "the same with activated parameters as printed"
    )
    older_rounded = FLOPS(2) * older_sizes.activated + older.layers_flops
    return CompressedAttention(
        parameters=counted,
        entry=entry,
        index_entry=index_entry,
        kv_cache=per_token,
        window=window,
        cache=named(context * per_token + window, "cache", "cache of a sequence"),
        cache_ratio=named(older.kv_cache / per_token, "cache_ratio", "times less cache than V3.2"),
        baseline_share=named(
            per_token / _baseline(sizes, counted.layers), "baseline_share", "share of the bytes of GQA in BF16"
        ),
        attention_flops=attend,
        index_flops=index,
        token_flops=flops,
        rounded_flops=rounded,
        flops_ratio=named(older.token_flops / flops, "flops_ratio", "times fewer FLOPs than V3.2"),
        rounded_ratio=named(older_rounded / rounded, "rounded_ratio", "the same with activated parameters as printed"),
    )


def _entry(sizes: CompressedSizes) -> Bytes:
    codes = sizes.head_dim - sizes.rope_head_dim
    return codes * FP8 + sizes.rope_head_dim * BF16 + codes / sizes.scale_group * E8M0 + sizes.entry_pad


def _attention(sizes: CompressedSizes, context: Tokens) -> Flops:
    """Return the operations of all layers: a query's products with each entry as a key and as a value."""
    tokens = number_of(context)
    chosen = smallest(tokens / sizes.csa_ratio, sizes.index_topk)
    all_of_them = tokens / sizes.hca_ratio
    layers = sizes.window_layers + sizes.csa_layers + sizes.hca_layers
    entries = layers * smallest(sizes.window, tokens) + sizes.csa_layers * chosen + sizes.hca_layers * all_of_them
    return BF16_COST * (FLOPS(2) * (2 * sizes.head_dim * sizes.n_heads) * entries)


def _baseline(sizes: CompressedSizes, layers: Count) -> BytesPerToken:
    """Return the cache of grouped-query attention with as many layers, in BF16."""
    return per(layers * (sizes.baseline_groups * (2 * sizes.baseline_head_dim)) * BF16, TOKENS)


# --- V4.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSizes:
    """Sizes that V4.1's cache depends on."""

    title: str
    prefix: str
    encoder_sources: Count
    """Layers of the encoder whose entries are stored, for others too."""
    encoder_ratio: Count
    """Tokens of an entry in the encoder."""
    decoder_sources: Count
    """Layers of the decoder whose entries are stored."""
    decoder_ratio: Count
    """Tokens of an entry in the decoder."""
    head_dim: Count
    """Numbers of an entry."""
    scale_group: Count
    """Numbers of an entry with one scale."""
    index_head_dim: Count
    """Numbers of an indexer's entry."""
    index_scale_group: Count
    """Numbers of an indexer's entry with one scale."""

    @classmethod
    def published(cls) -> "SharedSizes":
        """Return the sizes of DeepSeek-V4.1-Flash."""
        return read_sizes(cls, FOLDER / "deepseek-v4.1-flash.toml")


def shared_cache(sizes: SharedSizes) -> BytesPerToken:
    """Return V4.1's bytes of cache a token, in all layers that store any."""
    entry = sizes.head_dim * FP4 + sizes.head_dim / sizes.scale_group * FP8
    index = sizes.index_head_dim * FP4 + sizes.index_head_dim / sizes.index_scale_group * E8M0
    stored = sizes.encoder_sources / sizes.encoder_ratio + sizes.decoder_sources / sizes.decoder_ratio
    return per(stored * (entry + index), TOKENS).named(
        f"{sizes.prefix}kv_cache",
        f"{sizes.title}: cache of a token",
        "V4.1 report (arXiv 2609.19969)",
    )
