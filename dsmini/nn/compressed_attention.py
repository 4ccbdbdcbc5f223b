"""Compressed attention of DeepSeek-V4: a window of tokens, and entries that stand for blocks of the tokens before.

One key of head_dim numbers serves all heads, and is their value too. A token with hidden state h has
    c_q = q_norm(W_QA h)                    the compressed query
    q_j = RoPE(rms(W_QB c_q)_j)             a query for each head j, each divided by its own root mean square
    k   = RoPE(kv_norm(W_KV h))             key and value: cached while the window holds them
RoPE rotates the last qk_rope_head_dim numbers in adjacent pairs. A query at position t sees the keys of the last
window_size tokens, itself among them, and compressed entries.

Each block of m tokens that is complete becomes one entry. A token has contents C = W_C h and weights Z = W_G h + ape,
all in FP32, with a bias for its place in the block. For each of the head_dim numbers on its own
    entry = RoPE(norm(sum of softmax(Z) C over the rows of the block))    rotated as the block's first token is
HCA (m = 128) has just that, and a query sees all entries. In CSA (m = 4) entries overlap: a token has two series of
C and Z, and an entry is made of the first series of the block before and the second of its own, in one softmax of 2 m
rows. The first entry has no block before it. In CSA the indexer chooses index_topk entries for each query. It is that
of dsa.py, but for its keys, which a compressor of its own makes, and RoPE as above. Entry i is seen from its last token
on: i < floor((t + 1) / m).

All that a query sees shares one softmax, in FP32, with a learned logit for each head, the sink, which takes weight
and has no value:
    p_s = exp(q.k_s / sqrt(head_dim)) / (exp(sink) + sum over window and entries of exp(q.k / sqrt(head_dim)))
    o   = RoPE^-1(sum of p_s k_s)           rotated back by the query's position: values then know distances alone
    y   = W_OB concat over groups of W_OA_g concat of the group's heads
Layers with entries rotate everything by compress_rope_theta and YaRN, without its temperature; a layer with the window
alone (compress_ratio 0) by rope_theta and no YaRN.

A layer is of one of three kinds, which share all but the entries: Window has none, HCA makes them, CSA chooses among
them. It projects (`forward`), chooses (`Index.choose`) and attends (`entry_attention`), some queries at a time.

The choice of entries is a constant. The indexer learns by the loss of dsa.py, in the same two stages. Its target is the
attention of all heads to entries. Window and sink take part in each head's softmax, so that a head that looks there
counts for less.

Simplified: DeepSeek stores weights of wo_a in FP8 and multiplies them in BF16; here they have the compute dtype in FP8
training too.

Source: DeepSeek-V4 report (arXiv 2606.19348), section 2.3, equations 9 to 23; DeepSeek's released inference code.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config
from dsmini.config.model import CSA_RATIO, SLACK
from dsmini.nn.attention import Context, context_of
from dsmini.nn.cache import CacheDtype, CachePositions, LayerCacheView, Rows, Stores
from dsmini.nn.codec import BLOCK_FP8, Codec, Numbers, index_entry_row, key_row
from dsmini.nn.dsa import (
    BLOCK,
    Indexer,
    IndexerLoss,
    hadamard,
    imposed,
    indexer_agreement,
    mean_loss,
    topk_keys,
    topk_mask,
)
from dsmini.nn.layers import (
    FP32Linear,
    FP32Module,
    Linear,
    Projection,
    RMSNorm,
    at_least_fp32,
    is_plain,
    make_linear,
    quantize_once,
    rms_norm,
)
from dsmini.nn.rope import CosSin, Rope, apply_rope
from dsmini.numerics import quantize
from dsmini.numerics.fp4 import FP4_BLOCK, round_fp4


def sink_logits(
    q: Float[Tensor, "b s h d"],
    kv: Float[Tensor, "b t d"],
    mask: Bool[Tensor, "#b s t"],
    sink: Float[Tensor, " h"],
    scale: float,
) -> Float[Tensor, "b s h t1"]:
    """Return the logits of all keys, in FP32, and after them the sink's. True in mask hides a key from a query."""
    logits = at_least_fp32(einsum(q, kv, "b s h d, b t d -> b s h t")) * scale
    logits = logits.masked_fill(mask[:, :, None], -torch.inf)
    return torch.cat((logits, sink.to(logits.dtype).expand(logits.shape[:-1])[..., None]), -1)


@ops.operation("sink_attention")
def sink_attention(
    q: Float[Tensor, "b s h d"],
    kv: Float[Tensor, "b t d"],
    mask: Bool[Tensor, "#b s t"],
    sink: Float[Tensor, " h"],
    scale: float,
) -> Float[Tensor, "b s h d"]:
    """Return the sum of values by weights softmax([scale q k ; sink]), of which the sink's is left out.

    Args:
        kv: keys of all heads, and their values.
        mask: True for keys that a query may not see.

    Source: DeepSeek-V4 report, section 2.3; attention sinks of Xiao et al. 2023 and gpt-oss.
    """
    weights = sink_logits(q, kv, mask, sink, scale).softmax(-1)[..., :-1]
    return einsum(weights.to(kv.dtype), kv, "b s h t, b t d -> b s h d")


@ops.operation("entry_attention")
def entry_attention(
    q: Float[Tensor, "b s h d"],
    near: Float[Tensor, "b w d"],
    masked: Bool[Tensor, "#b s w"],
    entries: Any,
    hidden: Bool[Tensor, "#b s n"],
    chosen: Int[Tensor, "b s k"] | None,
    sink: Float[Tensor, " h"],
    scale: float,
) -> Float[Tensor, "b s h d"]:
    """Return sink_attention to the window, and to the chosen entries or, for None, to all that are not hidden.

    The plain version masks the other entries; fast ones gather, and read k entries a query.

    Args:
        near, masked: rows of the window, and True for those that a query may not see.
        entries: [b, n or more, d], or Rows of a cache, of which fast versions read the chosen ones alone.
        hidden: True for entries that a query may not see.
        chosen: distinct entries of each query; -1 is none.
    """
    (b, _), n = q.shape[:2], hidden.shape[2]
    some = entries[:, :n] if isinstance(entries, Tensor) else entries.read(n, q.dtype)
    hidden = hidden if chosen is None else topk_mask(chosen, n)
    mask = torch.cat([part.expand(b, -1, -1) for part in (masked, hidden)], 2)
    return sink_attention(q, torch.cat((near, some), 1), mask, sink, scale)


@torch.no_grad()
def lse_of_others(q: Tensor, near: Tensor, masked: Tensor, sink: Tensor, scale: float) -> Float[Tensor, "b h s"]:
    """Return the log-sum-exp of each head's logits of window and sink."""
    return sink_logits(q, near, masked, sink, scale).logsumexp(-1).transpose(1, 2)


def rotated(x: Float[Tensor, "b s h d"], cos_sin: CosSin) -> Float[Tensor, "b s h d"]:
    """Rotate the last numbers of x, adjacent pairs of them."""
    nope, rope = x.tensor_split((x.shape[-1] - 2 * cos_sin[0].shape[-1],), -1)
    return torch.cat((nope, apply_rope(rope, cos_sin)), -1)


@ops.operation("rows_at")
def rows_at(rows: Float[Tensor, "b t d"], places: Int[Tensor, "#b *n"]) -> Float[Tensor, "b *n d"]:
    """Return the rows of each sequence in these places; any row for a negative place."""
    b, t, _ = rows.shape
    places = places.clamp(min=0) + t * torch.arange(b, device=rows.device).view(-1, *[1] * (places.dim() - 1))
    return F.embedding(places, rows.flatten(0, 1))


class Blocks(NamedTuple):
    """The blocks of m tokens that a call completes, each document's counted from its first token."""

    ends: Int[Tensor, "#b n"]
    """Column of a block's last token among the new ones."""
    at: CachePositions
    """Place of a block: its number in its document or sequence. is_token is True for blocks; None if all are."""


def document_starts(documents: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """Return the column of the first token of each position's document. A document is a run of equal numbers."""
    columns = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return torch.where(begins, columns, 0).cummax(1).values


def blocks_of(context: Context, m: int, starts: Int[Tensor, "b s"] | None) -> Blocks:
    """Find the blocks of m tokens that end among the new ones.

    Args:
        starts: document_starts; None: there is one document.
    """
    s, at = context.positions.shape[1], None if context.cache is None else context.cache.at
    columns = torch.arange(s, device=context.positions.device)[None]
    own = columns if at is None else at.positions
    own = own if starts is None else own - starts
    # 1. how many blocks there may be: as many as there are, unless rows differ
    alike = starts is None and (at is None or at.is_token is None)
    before = 0 if at is None else at.shared_start or 0
    n = (before + s) // m - before // m if alike else -(-s // m)
    # 2. in this order the columns of last tokens come first, and stay in theirs
    is_last = (own + 1) % m == 0
    if at is not None and at.is_token is not None:
        is_last = is_last & at.is_token
    ends = is_last.logical_not().byte().argsort(dim=1, stable=True)[:, :n]
    place = CachePositions(
        positions=own.expand_as(is_last).gather(1, ends) // m,
        shared_start=before // m if alike else None,
        all_new=at is None or at.all_new,
        n_keys=n if at is None else at.n_keys // m,
        is_token=None if alike else is_last.gather(1, ends),
        lengths=torch.full((len(is_last),), n, device="cpu") if at is None else at.lengths // m,
    )
    return Blocks(ends, place)


class Compressor(FP32Module):
    """Makes one row of each block of m tokens. All of it is FP32, whatever dtype x has.

    Args:
        d: width of the row.
        overlap: rows are made of the block before too, as in CSA.

    Source: DeepSeek-V4 report, equations 9 to 12 and 20 to 23.
    """

    def __init__(self, c: ModelConfig, m: int, d: int, overlap: bool) -> None:
        super().__init__()
        self.m: int = m
        self.d: int = d
        self.series = 2 if overlap else 1
        self.wkv: FP32Linear = FP32Linear(c.dim, self.series * d, init_std=c.init_std)
        self.wgate: FP32Linear = FP32Linear(c.dim, self.series * d, init_std=c.init_std)
        self.ape: nn.Parameter = nn.Parameter(torch.zeros(m, self.series * d, dtype=torch.float32))
        """Bias of Z for each place in a block. Here and in both weights the series of the block before comes first: b
        in the report, a in transformers."""
        self.norm: RMSNorm = RMSNorm(d, c.norm_eps)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.ape)

    def forward(
        self, x: Float[Tensor, "b s m"], blocks: Blocks, cache: LayerCacheView | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return the row of each block that ends among the tokens x, in the dtype of x.

        Args:
            cache: has the raw rows of the latest tokens, to which those of x are appended.
        """
        rows = torch.cat((self.wkv(x), self.wgate(x)), -1)
        if cache is not None:
            rows = cache.store.raw.extend(rows, cache.at, self.series * self.m - 1, rows.dtype)
        ends = blocks.ends + rows.shape[1] - x.shape[1]
        tokens = ends[..., None] + torch.arange(1 - self.m, 1, device=x.device)
        contents, weights = [], []
        for i in range(self.series):
            back, of = self.m * (self.series - 1 - i), slice(i * self.d, (i + 1) * self.d)
            c, z = (rows_at(part[..., of], tokens - back) for part in rows.chunk(2, -1))
            z = z + self.ape[:, of]
            if back:  # the first block has none before it
                z = z.masked_fill((blocks.at.positions == 0)[..., None, None], -torch.inf)
            contents.append(c)
            weights.append(z)
        row = (torch.cat(weights, 2).softmax(2) * torch.cat(contents, 2)).sum(2)
        return self.norm(row.to(x.dtype))  # rounded before the norm too, as in DeepSeek's code

    def new_rows(self, window: Rows, n: int, codec: Codec) -> dict[str, Rows]:
        """Return empty rows for a cache with this window: entries of n tokens, and raw ones, of which one is made."""
        b, device = len(window.data), window.data.device
        exact = torch.float64 if codec.dtype == torch.float64 else torch.float32
        raw = Numbers(2 * self.series * self.d, exact)
        latest = Rows(b, min(self.series * self.m + SLACK, n), raw, device, None)
        return {"entries": Rows(b, n // self.m, codec, device, self.m), "raw": latest}


class EntryIndexer(Indexer):
    """The indexer of CSA, whose keys are entries of its own compressor."""

    def add_keys(self, c: ModelConfig) -> None:
        self.compressor: Compressor = Compressor(c, CSA_RATIO, self.head_dim, overlap=True)
        self.qat: bool = c.qat

    def _rotated(self, x: Float[Tensor, "b s h d"], cos_sin: CosSin) -> Float[Tensor, "b s h d"]:
        x = hadamard(rotated(x, cos_sin))
        return round_fp4(x, min(FP4_BLOCK, self.head_dim)) if self.qat else x

    def keys(
        self,
        x: Float[Tensor, "b t m"],
        cos_sin: CosSin,
        blocks: Blocks | None = None,
        cache: LayerCacheView | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Return the key of each block that ends among the tokens x; with a cache of all blocks, to which it appends.

        Args:
            cos_sin: of the first token of each block.
            blocks: None: those of whole sequences x.
        """
        if blocks is None:
            blocks = blocks_of(context_of(x, x.shape[-1], None, None), CSA_RATIO, None)
        keys = self._rotated(self.compressor(x, blocks, cache).unsqueeze(2), cos_sin).squeeze(2)
        if cache is None:
            return keys
        rows = cache.store.entries
        rows.write(keys, blocks.at)
        return rows.read(blocks.at.n_keys, x.dtype)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        latent: Float[Tensor, "b s l"],
        cos_sin: CosSin,
        of_blocks: Any = None,
        blocks: Blocks | None = None,
        cache: LayerCacheView | None = None,
    ) -> "Index":
        """Return queries, keys of blocks and head weights of tokens, of which index_scores makes I[t, i].

        Args:
            cos_sin: of the tokens.
            of_blocks: the same of the first token of each block; None: the blocks of whole sequences x.
            blocks, cache: as in keys.
        """
        if of_blocks is None:
            n = x.shape[1] // CSA_RATIO
            of_blocks = tuple(angles[:, : n * CSA_RATIO : CSA_RATIO] for angles in cos_sin)  # pyright: ignore
        keys = self.keys(x, of_blocks, blocks, cache)
        return Index(self.queries(latent, cos_sin), keys, self.head_weights(x))

    def index(self, new: "New", rope: Rope, of_blocks: CosSin, blocks: Blocks) -> "Index | None":
        """Return what chooses entries, or None where each query sees all; with a cache append the keys to it.

        The output does not move the indexer, whose inputs are detached.
        """
        x, latent, context = new.x.detach(), new.latent.detach(), new.context
        cache, stage = context.cache and context.cache.index, context.stage
        longest = blocks.at.n_keys if cache is None else int(blocks.at.lengths.max())
        with torch.set_grad_enabled(stage is not None and torch.is_grad_enabled()):
            if stage is not None or longest > self.topk:
                return self(x, latent, context.cos_sin(rope), of_blocks, blocks, cache)
            if cache is not None:  # keys for later queries
                self.keys(x, of_blocks, blocks, cache)
        return None


class Index(NamedTuple):
    """The indexer's part of a call, of which index_scores makes I[t, s]."""

    q: Float[Tensor, "b s i d"]
    keys: Float[Tensor, "b n d"]
    weights: Float[Tensor, "b s i"]

    def choose(self, part: slice, topk: int, hidden: Bool[Tensor, "#b q n"]) -> Int[Tensor, "b q k"]:
        """Return topk_keys of the queries in these columns, among the first n entries."""
        n = hidden.shape[2]
        return topk_keys(self.q[:, part], self.keys[:, :n], self.weights[:, part], min(topk, n), hidden)


def joined(choices: list[Any]) -> Int[Tensor, "b s k"] | None:
    """Return the choices [b, q, k] of blocks of queries as one of all; None where nothing is chosen."""
    found = [chosen for chosen in choices if chosen is not None]
    most = max((chosen.shape[2] for chosen in found), default=0)
    return torch.cat([F.pad(chosen, (0, most - chosen.shape[2]), value=-1) for chosen in found], 1) if found else None


class Entries(NamedTuple):
    """The entries that the queries of a call may see."""

    rows: Any
    """[b, n, d], or for one block of queries Rows of a cache, of which they read the chosen ones alone if few."""
    ends: Int[Tensor, "#b n"]
    """Position of the last token of each; without a cache, its column. Beyond all queries where there is no entry."""
    index: Index | None
    """Choice among them; None: a query sees all up to its own position."""


class New(NamedTuple):
    """The new tokens of a call, as a layer attends to them."""

    x: Float[Tensor, "b s m"]
    latent: Float[Tensor, "b s l"]
    """The normed compressed queries, of which the indexer makes its own."""
    context: Context
    starts: Int[Tensor, "b s"] | None
    """document_starts; None: there is one document."""


class Window:
    """A layer of the window alone: there are no entries."""

    def add_parts(self, layer: "CompressedAttention", c: ModelConfig) -> None:
        """Make the modules of a layer of this kind."""
        layer.compressor, layer.indexer = None, None

    def entries(self, layer: "CompressedAttention", new: New) -> Entries:
        """Return the entries of the new tokens or, with a cache, append them to it and return all."""
        return Entries(new.x.new_zeros(len(new.x), 0, layer.head_dim), new.context.positions[:, :0], None)


class HCA(Window):
    """Heavily compressed attention: a query sees all entries of whole blocks before it."""

    overlap = False

    def add_parts(self, layer: "CompressedAttention", c: ModelConfig) -> None:
        layer.compressor = Compressor(c, layer.m, layer.head_dim, overlap=self.overlap)
        layer.indexer = None

    def entries(self, layer: "CompressedAttention", new: New) -> Entries:
        x, context = new.x, new.context
        blocks = blocks_of(context, layer.m, new.starts)
        first = context.positions.expand(len(blocks.ends), -1).gather(1, blocks.ends) + 1 - layer.m
        cos_sin = layer.rope.cos_sin(first)
        # 1. the indexer's, and 2. those that are read
        index = self.index(layer, new, cos_sin, blocks)
        rows = layer.key_value(layer.compressor(x, blocks, context.cache), cos_sin)
        if context.cache is None:
            is_block = blocks.at.is_token
            return Entries(rows, blocks.ends if is_block is None else blocks.ends.where(is_block, x.shape[1]), index)
        store, n = context.cache.store.entries, blocks.at.n_keys
        store.write(rows, blocks.at)
        ends = (torch.arange(n, device=x.device)[None] + 1) * layer.m - 1
        # one block of queries reads what it needs; several of them read the same entries
        return Entries(store if x.shape[1] <= BLOCK else store.read(n, x.dtype), ends, index)

    def index(self, layer: "CompressedAttention", new: New, cos_sin: CosSin, blocks: Blocks) -> Index | None:
        """Return what chooses among entries; None: nothing does."""
        return None


class CSA(HCA):
    """Compressed sparse attention: entries overlap, and an indexer chooses among them."""

    overlap = True

    def add_parts(self, layer: "CompressedAttention", c: ModelConfig) -> None:
        super().add_parts(layer, c)
        layer.indexer = EntryIndexer(c)

    def index(self, layer: "CompressedAttention", new: New, cos_sin: CosSin, blocks: Blocks) -> Index | None:
        return layer.indexer.index(new, layer.rope, cos_sin, blocks)


KINDS: Mapping[int, type[Window]] = MappingProxyType({0: Window, CSA_RATIO: CSA})
"""Kinds of layers by their compress_ratio; any other is HCA."""


class CompressedAttention(FP32Module):
    """The attention of a layer of DeepSeek-V4. From a config, or from plain arguments.

    Args:
        compress_ratio: m, number of tokens in an entry. 4: CSA, with overlap and an indexer; 0: the window alone;
            any other: HCA.
    """

    compressor: Any
    indexer: Any

    def __init__(self, config: ModelConfig | None = None, /, *, compress_ratio: int, **arguments: Any) -> None:
        super().__init__()
        alone = {"attention": "compressed", "n_layers": 1, "compress_ratios": (compress_ratio,)}
        c = layer_config(config, arguments if config else alone | arguments)
        if c.head_dim is None or c.window_size is None or c.o_groups is None or c.o_lora_rank is None:
            raise ValueError(f"attention={c.attention!r} is another module; use attention='compressed'")
        assert c.q_lora_rank is not None, "V4 compresses its queries"
        self.dim: int = c.dim
        self.n_heads: int = c.n_heads
        self.head_dim: int = c.head_dim
        self.groups: int = c.o_groups
        self.window_size: int = c.window_size
        self.m: int = compress_ratio
        self.eps: float = c.norm_eps
        self.scale: float = c.head_dim**-0.5
        self.qat: bool = c.qat
        self.rope: Rope = Rope(dim=c.qk_rope_head_dim, rope_theta=c.rope_theta)
        if compress_ratio:
            yarn = {"original_seq_len": c.original_seq_len if c.extended else None, "rope_factor": c.rope_factor}
            yarn |= {"beta_fast": c.beta_fast, "beta_slow": c.beta_slow, "mscale": 0.0, "mscale_all_dim": 0.0}
            self.rope = Rope(dim=c.qk_rope_head_dim, rope_theta=c.compress_rope_theta, **yarn)
        self.wq_a: Projection = make_linear(c, c.dim, c.q_lora_rank)
        self.q_norm: RMSNorm = RMSNorm(c.q_lora_rank, c.norm_eps)
        self.wq_b: Projection = make_linear(c, c.q_lora_rank, c.n_heads * c.head_dim)
        self.wkv: Projection = make_linear(c, c.dim, c.head_dim)
        self.kv_norm: RMSNorm = RMSNorm(c.head_dim, c.norm_eps)
        self.attn_sink: nn.Parameter = nn.Parameter(torch.zeros(c.n_heads, dtype=torch.float32))
        self.wo_a: Linear = Linear(
            c.n_heads * c.head_dim // c.o_groups, c.o_groups * c.o_lora_rank, init_std=c.init_std
        )
        self.wo_b: Projection = make_linear(c, c.o_groups * c.o_lora_rank, c.dim, c.output_init_std)
        self.kind: Window = KINDS.get(compress_ratio, HCA)()
        self.kind.add_parts(self, c)

    def _apply(self, fn: Any, recurse: bool = True) -> "CompressedAttention":
        for part in self.children() if recurse else ():
            part._apply(fn)
        super()._apply(fn, recurse=False)  # the sink alone stays in FP32
        return self

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.attn_sink)

    def forward(
        self,
        x: Float[Tensor, "b s m"],
        context: Context | None = None,
        *,
        mask: Bool[Tensor, "#b #s s"] | None = None,
    ) -> Any:
        """Attend to the window and to the entries that a query sees, or that the indexer chooses.

        Return the output [b, s, m]; while the indexer learns, the pair of that and its IndexerLoss.

        Raises: ValueError for an x of another shape, and for a mask: an entry is made of tokens that it may hide.
        """
        if mask is not None or (context is not None and context.mask is not None):
            raise ValueError(
                "compressed attention got a mask, and has entries of whole blocks, in which it cannot hide single "
                "tokens; leave it out, or give documents"
            )
        if context is None:
            context = context_of(x, self.dim, context, mask)
        cos, sin = cos_sin = context.cos_sin(self.rope)
        # 1. queries, and key-value rows: [b, s, h, d] and [b, s, d]
        codes = quantize_once(x, self.wq_a, self.wkv)
        latent = self.q_norm(self.wq_a(codes))
        q = rearrange(self.wq_b(latent), "b s (h d) -> b s h d", h=self.n_heads)
        q = rotated(rms_norm(q, torch.ones(self.head_dim, device=q.device), self.eps), cos_sin)
        kv = self.key_value(self.kv_norm(self.wkv(codes)), cos_sin)
        # 2. attention: [b, s, h, d]
        starts = None if context.documents is None else document_starts(context.documents)
        y, loss = self.attention(q, kv, New(x, latent, context, starts))
        # 3. the output of each group of heads, and of all: [b, s, g r] and [b, s, m]
        y = self.wo_b(self.grouped(rotated(y, (cos, -sin))))
        return y if loss is None else (y, loss)

    def key_value(self, rows: Float[Tensor, "b s d"], cos_sin: CosSin) -> Float[Tensor, "b s d"]:
        """Return rows as attention reads them: rotated, and in quantization-aware training as FP8 stores them."""
        rows = rotated(rows.unsqueeze(2), cos_sin).squeeze(2)
        if not self.qat:
            return rows
        nope, rope = rows.tensor_split((-self.rope.dim,), -1)
        return torch.cat((quantize(nope, (1, BLOCK_FP8)).dequantize(rows.dtype), rope), -1)

    def grouped(self, y: Float[Tensor, "b s h d"]) -> Float[Tensor, "b s gr"]:
        """Project the heads of each group by its part of wo_a."""
        y = rearrange(y, "b s (g h) d -> b s g (h d)", g=self.groups)
        if is_plain(self.wo_a):
            weight = rearrange(self.wo_a.dense(y.dtype), "(g r) w -> g r w", g=self.groups)
            return einsum(y, weight, "b s g w, g r w -> b s g r").flatten(2)
        # a module in its place, such as a LoRA wrapper, gives each group's output for every group's input
        every = rearrange(self.wo_a(y), "b s g (k r) -> b s r g k", k=self.groups)
        return rearrange(every.diagonal(dim1=-2, dim2=-1), "b s r g -> b s (g r)")

    def attention(
        self, q: Float[Tensor, "b s h d"], kv: Float[Tensor, "b s d"], new: New
    ) -> tuple[Float[Tensor, "b s h d"], IndexerLoss | None]:
        """Attend; return the loss of the indexer too while it learns."""
        (b, s), context, cache = q.shape[:2], new.context, new.context.cache
        # 1. rows of the window before the new tokens, and these, [b, w + s, d]; the entries, [b, n, d]
        if cache is not None:
            kv = cache.store.window.extend(kv, cache.at, self.window_size - 1, kv.dtype)
        entries = self.kind.entries(self, new)
        index, learns = entries.index, context.stage is not None and entries.index is not None
        # 2. some queries at a time
        y, choices, others, blind = [], [], [], torch.zeros((), device=q.device)
        for start in range(0, max(1, s), BLOCK):  # no token at all is one empty part
            part = slice(start, min(start + BLOCK, s))
            some, (near, masked) = q[:, part], self.window(kv, part, new)
            # 3. the entries that a query may not see, [#b, s, n], and those that it reads, [b, s, k]
            hidden, chosen = self.hidden(entries.ends, part, new), None
            if index is not None and hidden.shape[2]:
                chosen = imposed(index.choose(part, self.indexer.topk, hidden), context, start)
            choices.append(chosen)
            if learns:
                blind = blind + hidden.all(-1).expand(b, -1).sum()
                others.append(lse_of_others(some, near, masked, self.attn_sink, self.scale))
            read = None if context.stage == "warmup" else chosen
            y.append(entry_attention(some, near, masked, entries.rows, hidden, read, self.attn_sink, self.scale))
        if context.chosen is not None and self.indexer is not None:
            context.chosen.append(joined(choices))
        return torch.cat(y, 1), self.loss(q, entries, joined(choices), others, blind, new) if learns else None

    def loss(
        self,
        q: Float[Tensor, "b s h d"],
        entries: Entries,
        chosen: Int[Tensor, "b s k"] | None,
        others: list[Any],
        blind: Float[Tensor, ""],
        new: New,
    ) -> IndexerLoss:
        """Compare the indexer with attention.

        Args:
            chosen: entries of each query; None: there are none.
            others: of each block of queries, the log-sum-exp of each head's logits of window and sink, [b, h, q].
            blind: number of queries that see no entry. Each agrees: no KL divergence, and mass 1.
        """
        (b, s), n = q.shape[:2], min(entries.ends.shape[1], q.shape[1] // self.m)
        sums = blind * torch.eye(4, device=q.device)[1]
        if chosen is not None and entries.index is not None:
            index = entries.index._replace(keys=entries.index.keys[:, :n])
            main = q.detach(), entries.rows[:, :n].detach().unsqueeze(2), self.scale, chosen

            def hidden(start: int, stop: int) -> Any:
                return self.hidden(entries.ends, slice(start, stop), new)

            lse = torch.cat(others, 2)
            sums = sums + indexer_agreement(*index, *main, hidden, new.context.stage, 0, lse, self.m)
        return mean_loss(sums, b * s)

    def window(
        self, rows: Float[Tensor, "b t d"], part: slice, new: New
    ) -> tuple[Float[Tensor, "b w d"], Bool[Tensor, "#b q w"]]:
        """Return the rows in the windows of the new tokens in these columns, and True for those a query may not see.

        Args:
            rows: of the new tokens, after those before them that a cache has.
        """
        context, starts = new.context, new.starts
        old = rows.shape[1] - context.positions.shape[1]
        first, stop = max(0, old + part.start - self.window_size + 1), old + part.stop
        keys = torch.arange(first, stop, device=rows.device)
        distance = torch.arange(old + part.start, stop, device=rows.device)[:, None] - keys
        masked = ((distance < 0) | (distance >= self.window_size))[None]
        if context.cache is not None:  # rows before position 0 and those of padding are none
            at, b = context.cache.at, len(rows)
            before = at.positions[:, :1] >= torch.arange(old, 0, -1, device=rows.device)
            is_token = torch.ones_like(at.positions, dtype=torch.bool) if at.is_token is None else at.is_token
            is_row = torch.cat((before.expand(b, -1), is_token.expand(b, -1)), 1)
            masked = masked | ~is_row[:, None, first:stop]
        if starts is not None:
            masked = masked | (keys < starts[:, part, None])
        return rows[:, first:stop], masked

    def hidden(self, ends: Int[Tensor, "#b n"], part: slice, new: New) -> Bool[Tensor, "#b q some"]:
        """Return True for the entries that the queries in these columns may not see: those with a later token.

        An entry is seen from its last token on. It is of the query's document if that token is. Entries that end after
        all these queries are left out, as far as shapes alone tell.
        """
        cache = new.context.cache
        if cache is None or cache.at.all_new:
            ends = ends[:, : part.stop // max(1, self.m)]
        if cache is None:
            positions = torch.arange(part.start, part.stop, device=ends.device)[None]
        else:
            positions = cache.at.positions[:, part]
        hidden = ends[:, None] > positions[..., None]
        return hidden if new.starts is None else hidden | (ends[:, None] < new.starts[:, part, None])

    def new_cache(self, batch_size: int, max_seq_len: int, dtype: CacheDtype, device: torch.device) -> Stores:
        """Return the layer's empty cache. It has three kinds of rows, and that of its indexer the last two again:

            window     the key-value row of the latest tokens           a ring: position p is in place p mod its size
            entries    one row for each whole block of m tokens         entry i is in place i
            raw        FP32 rows [C | Z] of the latest tokens           a ring, as long as an entry is made of

        The two rings have SLACK places more, so that the last tokens may be taken back: their rows are written again.
        Nothing is moved when an entry is complete or a token is taken back, and rows of unequal length need no care: a
        place follows from a position alone, and what lies in places that do not count is hidden from every query.

        Formats in FP8 and FP4: codec.py.
        """
        key = key_row(self.head_dim - self.rope.dim, self.rope.dim).stored_in(dtype)
        window = Rows(batch_size, min(self.window_size + SLACK, max_seq_len), key, device, None)
        index = None
        if self.indexer is not None:
            keys = index_entry_row(self.indexer.head_dim).stored_in(dtype)
            index = Stores(**self.indexer.compressor.new_rows(window, max_seq_len, keys))
        entries = {} if self.compressor is None else self.compressor.new_rows(window, max_seq_len, key)
        return Stores(window=window, **entries, index=index)
