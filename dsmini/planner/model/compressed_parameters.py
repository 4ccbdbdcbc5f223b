"""Parameters of DeepSeek-V4, counted from its sizes: they show that the sizes are right and complete.

V4 replaces MLA by one key-value head of head_dim, projects outputs in groups, mixes 4 residual streams around every
sublayer, and has experts in all layers. For a sublayer of width d:

    attention     wq_a, wq_b, wkv, wo_a, wo_b, two norms, a sink for each head
    compressor    wkv and wgate [series * width, d], position bias [ratio, series * width], norm [width]
    indexer       wq_b, weights_proj, and a compressor of its own
    streams       24 mixes of 4 d numbers, 24 biases, 3 scales; 24 = 4 + 4 + 4 * 4

Worked example: V4-Flash has 284,332,240,471 parameters without multi-token prediction and the hash table, as its
released files do (284B), and V4-Pro 1,572,997,201,763 (1.6T). A token meets 13.27 and 48.85 billion (13B and 49B).

Source: DeepSeek-V4 report (arXiv 2606.19348), section 2; shapes of the released checkpoints.
"""

from dataclasses import dataclass

from dsmini.planner.model.sizes_files import FOLDER, read_sizes
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import COUNT, Bytes, Count

SOURCE = "shapes of the released checkpoints"
ONE = COUNT(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedSizes:
    """Sizes of a DeepSeek-V4 model, none of which a ModelConfig can express together."""

    title: str
    prefix: str
    dim: Count
    """Width of a residual stream."""
    vocab_size: Count
    """Number of token ids."""
    window_layers: Count
    """Layers with the window only."""
    csa_layers: Count
    """Layers with compressed sparse attention."""
    hca_layers: Count
    """Layers with heavily compressed attention."""
    csa_ratio: Count
    """Tokens of an entry in CSA."""
    csa_series: Count
    """Series of entries in CSA, which overlap."""
    hca_ratio: Count
    """Tokens of an entry in HCA."""
    window: Count
    """Tokens that every layer sees uncompressed."""
    n_heads: Count
    """Number of query heads."""
    head_dim: Count
    """Width of a query head and of the one key-value head."""
    rope_head_dim: Count
    """Rotary part of a head."""
    q_lora_rank: Count
    """Width of the compressed query."""
    o_groups: Count
    """Groups of heads whose outputs are projected apart."""
    o_lora_rank: Count
    """Width of a group's compressed output."""
    index_n_heads: Count
    """Heads of the indexer."""
    index_head_dim: Count
    """Width of an indexer's head, and of its entries."""
    index_topk: Count
    """Entries that CSA chooses."""
    n_routed_experts: Count
    """Routed experts of a layer."""
    n_shared_experts: Count
    """Shared experts of a layer."""
    n_activated_experts: Count
    """Routed experts of a token."""
    moe_inter_dim: Count
    """Hidden width of an expert."""
    hash_layers: Count
    """Leading layers that choose experts by token id and have no routing bias."""
    streams: Count
    """Residual streams."""
    scale_group: Count
    """Numbers of an entry with one scale."""
    index_scale_group: Count
    """Numbers of an indexer's entry with one scale."""
    entry_pad: Bytes
    """Bytes of padding in an entry."""
    activated: Count
    """Activated parameters as printed."""
    baseline_groups: Count
    """Key-value heads of the grouped-query attention that the cache is compared with."""
    baseline_head_dim: Count
    """Width of its heads."""

    @classmethod
    def published(cls, name: str) -> "CompressedSizes":
        """Return the sizes of a released model: "deepseek-v4-flash" or "deepseek-v4-pro".

        Raises: ValueError for another name.
        """
        known = sorted(path.stem for path in FOLDER.glob("deepseek-v4-*.toml"))
        if name not in known:
            raise ValueError(f"sizes of {name!r} are not published here; use {' or '.join(known)}")
        return read_sizes(cls, FOLDER / f"{name}.toml")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedParameters(Figures):
    """Parameters without multi-token prediction and the table of hash routing."""

    layers: Count
    total: Count
    active: Count
    """Multiply-adds of a token with all matrices, the head and the mixing of streams among them."""


def compressed_parameters(sizes: CompressedSizes) -> CompressedParameters:
    """Count the parameters of a V4 model."""
    layers = sizes.window_layers + sizes.csa_layers + sizes.hca_layers

    def named(figure: Count, name: str, title: str) -> Count:
        return figure.named(f"{sizes.prefix}{name}", f"{sizes.title}: {title}", SOURCE)

    m, c = sizes.dim, sizes.head_dim
    matrices = _attention_matrices(sizes)
    attention = matrices + sizes.q_lora_rank + c + sizes.n_heads
    expert = 3 * m * sizes.moe_inter_dim
    experts = (sizes.n_routed_experts + sizes.n_shared_experts) * expert
    gate = sizes.n_routed_experts * m
    block = attention + 2 * _streams(sizes) + 2 * m + gate + experts
    biases = (layers - sizes.hash_layers) * sizes.n_routed_experts
    ends = 2 * sizes.vocab_size * m + m + sizes.streams * (sizes.streams * m) + sizes.streams + ONE
    csa = _compressor(sizes, c, sizes.csa_ratio, sizes.csa_series) + _indexer(sizes)
    csa = csa + _compressor(sizes, sizes.index_head_dim, sizes.csa_ratio, sizes.csa_series)
    hca = _compressor(sizes, c, sizes.hca_ratio, ONE)
    total = layers * block + biases + sizes.csa_layers * csa + sizes.hca_layers * hca + ends
    met = (sizes.n_activated_experts + sizes.n_shared_experts) * expert
    active = layers * (matrices + 2 * (_mixes(sizes) * (sizes.streams * m)) + gate + met)
    series = 2 * sizes.csa_series * m * (c + sizes.index_head_dim)
    active = active + sizes.csa_layers * (series + _indexer(sizes)) + sizes.hca_layers * (2 * m * c)
    active = active + sizes.vocab_size * m + sizes.streams * (sizes.streams * m)
    return CompressedParameters(
        layers=named(layers, "layers", "number of layers"),
        total=named(total, "parameters", "parameters without multi-token prediction"),
        active=named(active, "active_products", "multiply-adds of a token with all matrices"),
    )


def _attention_matrices(sizes: CompressedSizes) -> Count:
    """Return wq_a, wq_b, wkv, wo_a and wo_b."""
    m, q, heads = sizes.dim, sizes.q_lora_rank, sizes.n_heads * sizes.head_dim
    return q * m + heads * q + sizes.head_dim * m + sizes.o_lora_rank * heads + m * (sizes.o_groups * sizes.o_lora_rank)


def _compressor(sizes: CompressedSizes, width: Count, ratio: Count, series: Count) -> Count:
    """Return wkv, wgate, the position bias and the norm."""
    return 2 * (series * width) * sizes.dim + ratio * (series * width) + width


def _indexer(sizes: CompressedSizes) -> Count:
    """Return wq_b and weights_proj."""
    return sizes.index_n_heads * (sizes.index_head_dim * sizes.q_lora_rank + sizes.dim)


def _mixes(sizes: CompressedSizes) -> Count:
    """Return how many mixing weights a sublayer has: streams in, streams out, and between streams."""
    return sizes.streams * (2 * ONE + sizes.streams)


def _streams(sizes: CompressedSizes) -> Count:
    """Return the projection to the mixing weights, their biases, and 3 scales."""
    return _mixes(sizes) * (sizes.streams * sizes.dim) + _mixes(sizes) + 3 * ONE
