"""Matrices of a layer by their sizes (outputs, inputs).

    MLA                 wq_a (q, m)  wq_b (h d, q)  wkv_a (c + r, m)  wkv_b (h (d_nope + d_v), c)  wo (m, h d_v)
    MLA, whole query    wq (h d, m)  wkv_a  wkv_b  wo
    MHA, GQA, MQA       wq (h d, m)  wk (h_kv d, m)  wv (h_kv d_v, m)  wo
    DSA                 as MLA, and the indexer's wq_b (h_I d_I, q)  wk (d_I, m)  weights_proj (h_I, m)
    SwiGLU              w1 (f, m)  w3 (f, m)  w2 (m, f)

DeepSeek-V3's wkv_b is (128 * (128 + 128), 512) = 16,777,216 parameters.

Source: DeepSeek-V2 report, section 2.1; the shapes of the released checkpoints.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, Count, rounded_up, total
from dsmini.planner.quantities.sizes import FP8_TILE

Matrix = tuple[Count, Count]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMatrices:
    """Matrices of an attention layer, by how tensor parallelism divides them."""

    whole: tuple[Matrix, ...]
    """Projections to latents that all heads share: each GPU holds them whole."""
    heads: tuple[Matrix, ...]
    """Projections of heads, divided by heads."""
    up: tuple[Matrix, ...] = ()
    """MLA's wkv_b, which makes keys and values of the latent; divided by heads."""
    indexer: tuple[Matrix, ...] = ()
    """DSA's wq_b and wk, which are in `whole` too."""
    head_weights: tuple[Matrix, ...] = ()
    """DSA's weights_proj, which stays FP32 as norms do; each GPU holds it whole."""

    @property
    def by_head(self) -> tuple[Matrix, ...]:
        """All that is divided by heads."""
        return (*self.heads, *self.up)

    @property
    def all(self) -> tuple[Matrix, ...]:
        """All that may be FP8."""
        return (*self.whole, *self.by_head)


def key_width(m: ModelInputs) -> Count:
    """Return the width of a head's query and key, of MLA in its expanded form."""
    return m.qk_nope_head_dim + m.qk_rope_head_dim if m.config.is_mla else m.qk_nope_head_dim


def kv_heads(m: ModelInputs) -> Count:
    """Return the number of heads of keys and values: for MLA and MHA that of query heads itself, not a copy of it."""
    return {"mla": m.n_heads, "dsa": m.n_heads, "mha": m.n_heads, "mqa": COUNT(1)}.get(m.config.attention, m.n_kv_heads)


def block_norms(m: ModelInputs) -> Count:
    """Return the parameters of a block's norms."""
    widths = [2 * m.dim]
    if m.config.is_mla:
        widths += [m.kv_lora_rank, *([] if m.config.q_lora_rank is None else [m.q_lora_rank])]
    if m.config.attention == "dsa":  # weight and bias of the key's norm
        widths.append(2 * m.index_head_dim)
    if m.config.qk_norm:
        widths.append(2 * key_width(m))
    return total(widths)


def attention_matrices(m: ModelInputs) -> AttentionMatrices:
    """Return the matrices of an attention layer."""
    queries, output = m.n_heads * key_width(m), (m.dim, m.n_heads * m.v_head_dim)
    if not m.config.is_mla:
        keys, values = (kv_heads(m) * key_width(m), m.dim), (kv_heads(m) * m.v_head_dim, m.dim)
        return AttentionMatrices(whole=(), heads=((queries, m.dim), keys, values, output))
    down = (m.kv_lora_rank + m.qk_rope_head_dim, m.dim)
    up = (m.n_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)
    *index, weights = indexer_matrices(m, m.index_n_heads, m.index_head_dim) if m.config.attention == "dsa" else (None,)
    more = {"indexer": tuple(index), "head_weights": () if weights is None else (weights,), "up": (up,)}
    if m.config.q_lora_rank is None:
        return AttentionMatrices(whole=(down, *index), heads=((queries, m.dim), output), **more)
    whole = ((m.q_lora_rank, m.dim), down, *index)
    return AttentionMatrices(whole=whole, heads=((queries, m.q_lora_rank), output), **more)


def indexer_matrices(m: ModelInputs, heads: Count, width: Count) -> tuple[Matrix, ...]:
    """Return the matrices of an indexer: queries, key, and the weights of heads.

    Queries are made of MLA's compressed query, or of the hidden state where MLA does not compress it.
    """
    query = m.dim if m.config.q_lora_rank is None else m.q_lora_rank
    return ((heads * width, query), (width, m.dim), (heads, m.dim))


def swiglu_matrices(m: ModelInputs, hidden: Count) -> tuple[Matrix, ...]:
    """Return the three matrices of a feed-forward or an expert with this hidden width."""
    return ((hidden, m.dim), (hidden, m.dim), (m.dim, hidden))


def parameters_of(matrices: Iterable[Matrix]) -> Count:
    """Return the number of parameters of one or more matrices."""
    return total(o * i for o, i in matrices)


def scales_of(matrices: Iterable[Matrix]) -> Count:
    """Return the number of 128x128 blocks of one or more matrices, each of which has a scale in FP8."""
    return total(rounded_up(o / FP8_TILE) * rounded_up(i / FP8_TILE) for o, i in matrices)
