"""Bytes that are held: weights, gradients, the optimizer's state, the cache, and activations that training saves.

Worked example, DeepSeek-V3 with multi-token prediction, 682.6B parameters, in training:

    FP32 parameters, routing biases               4 bytes a parameter    2.73 TB
    FP32 gradients                                4                      2.73 TB
    AdamW's two moments in BF16                   4                      2.73 TB

Its weights alone, without multi-token prediction, are 673.4 GB in FP8: 669.1e9 codes of one byte, 163 MB of scales,
1.85e9 numbers of embedding and head in BF16, 107e6 of gates and norms in FP32.

The cache.

    MLA              kv_lora_rank + qk_rope_head_dim numbers a layer
    DSA              index_head_dim numbers more: the indexer's key
    MHA, GQA, MQA    n_kv_heads (d_k + d_v) numbers a layer

Worked example, DeepSeek-V3 in BF16: (512 + 64) * 61 layers * 2 bytes = 70,272 bytes a token. MHA with 128 heads of 128
would store 128 * (128 + 128) = 32,768 numbers a layer, and 1 - 576 / 32768 = 98.24 % of them are saved.

Activations are a lower bound, exact but for attention's implementation. They are followed through the layers tensor by
tensor, as autograd saves them when each layer runs as it is written: every storage once, however many operations saved
it. For each of n tokens, in numbers of e bytes,

    norm               its input, and the inverse of its root mean square in FP32
    product            its input, once for all products that read it
    attention          queries, keys, values, its result, and one FP32 number for each query and head: what a fused
                       kernel (flash attention) needs to make the softmax again
    SwiGLU             both results of the products, silu of one, and their product
    gate               scores, their order, the chosen weights; of a hash layer the choice in place of the order
    hyper-connection   the streams, the inverse of their root mean square, and the weights, Sinkhorn's also before it
    indexer            an FP32 copy of the hidden state, for the weights of heads; in FP32 the input of the key's norm,
                       with its mean and deviation; the gradients of its loss, which are made in forward
    routed experts     a row for each visit: its input and its result

In FP8 the inputs of products are codes and scales, and SwiGLU is made again from its two inputs.

In backward nothing is computed again; with `full` recomputation whole blocks are; with `selective`, as in DeepSeek-V3,
norms, MLA's up-projections and SwiGLU's product. Then attention's result is saved once, and results of experts are not
saved, because the gradient of an expert's weight is also the product of SwiGLU's result with its gradient [assumed].

What an implementation saves beyond that is measured, not predicted: softmax weights where logits are explicit, keys and
values padded to one width or repeated for grouped heads, padded rows of experts.

Worked example, DeepSeek-V3 at 4096 tokens in BF16: fused attention saves 128 * ((2 * 192 + 2 * 128) * 2 + 4) = 164,352
bytes a token and layer, which is 673 MB a layer; explicit weights would be 128 * 4096 * 2 = 1,048,576 more.

Source: the shapes and dtypes of the released checkpoints; DeepSeek-V3 report, sections 3.3.3 and 3.2.3; DeepSeek-V2
report, table 1; "Insights into DeepSeek-V3" (arXiv 2505.09343), table 1; FlashAttention (arXiv 2205.14135), section
3.1.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsmini.accounting.tensors import (
    BLOCK,
    BLOCK_FP4,
    ENGRAM,
    HELD_FP8,
    INDEXER,
    MTP,
    OVER,
    SIZES,
    STREAMS,
    Bytes,
    DsaStage,
    Dtype,
    TensorUse,
    WeightDtype,
    blocks,
    ceiling,
    check_dtype,
    check_sizes,
    check_training,
    engram_width,
    full_layers,
    key_width,
    tensors,
)
from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.model import CSA_RATIO, NO_INDEXER, SLACK

Amounts = Iterator[tuple[str, int]]
Optimizer = Literal["adamw", "muon"]
Recompute = Literal["none", "selective", "full"]
CacheDtype = Literal["float32", "bfloat16", "fp8"]
"""fp8: V3.2's layout of MLA's rows."""
Part = Literal["embedding", "indexed", "dense", "moe", "hashed", "head", "state", "mtp"]
STATE, TABLES = "residual stream and norms", "rotary tables"
PLAIN = ("eh_proj", *HELD_FP8)
"""Matrices between hidden states whose products are never FP8."""
BLOCK_FP8 = 64
"""Numbers that share a scale in V4's cache."""


def weight_bytes(config: ModelConfig, dtype: WeightDtype = "bfloat16", mtp: bool = True) -> Bytes:
    """Return the bytes of a model's parameters and routing biases as dsmini holds them. Exact.

    Norms, gates and routing biases are FP32 whatever dtype says. In FP8 the embedding, the head and MTP's projection
    are BF16, and the scales a part of their own; the released folders are smaller by the norms and gates, which they
    have in BF16. V3 without MTP in FP8: 673.4 GB.

    Args:
        mtp: with the multi-token prediction blocks.

    Source: the shapes and dtypes of the released checkpoints.
    """
    check_dtype(dtype, tuple(SIZES))
    uses = (use for use in tensors(config) if mtp or not use.mtp)
    return Bytes.of((name, use.count * amount) for use in uses for name, amount in use.held(dtype))


def gradient_bytes(config: ModelConfig, dsa_stage: DsaStage = "sparse") -> Bytes:
    """Return the bytes of the gradients: FP32, as the parameters of training are; a stack of experts has one whole."""
    return Bytes.of((use.module, 4 * use.parameters) for use in tensors(config) if use.learns(dsa_stage))


def optimizer_bytes(
    config: ModelConfig,
    optimizer: Optimizer = "adamw",
    moments: Dtype = "float32",
    dsa_stage: DsaStage = "sparse",
) -> Bytes:
    """Return the bytes that the optimizers store of FP32 parameters after a step. Exact.

    AdamW: two moments of every parameter, and a count of steps, 4 bytes, of every tensor. Muon: one FP32 momentum of
    the matrices inside the blocks, MTP's projections among them; embedding, head, gates, norms, hyper-connections and
    indexers are AdamW's then too.
    V3's two moments in BF16 are 4 bytes a parameter for 8 (report, section 3.3.3).

    Args:
        moments: dtype of AdamW's moments.

    Temporary tensors of a step are not in it.
    """
    check_dtype(moments, ("float32", "bfloat16"))
    require(optimizer in ("adamw", "muon"), f"optimizer={optimizer!r} is unknown; use adamw or muon")

    def amount(use: TensorUse) -> int:
        inside = use.form == "fp8" or use.name in (*PLAIN, "compressor.wkv", "compressor.wgate")
        if optimizer == "muon" and inside and use.kind != INDEXER:
            return 4 * use.parameters
        return 2 * SIZES[moments] * use.parameters + 4 * use.times * use.owned * bool(use.shape)

    return Bytes.of((use.module, amount(use)) for use in tensors(config) if use.learns(dsa_stage))


def training_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    optimizer: Optimizer = "adamw",
    moments: Dtype = "float32",
    recompute: bool | Recompute = False,
    dsa_stage: DsaStage = "sparse",
) -> Bytes:
    """Return the bytes that are held at the end of a forward in training: a lower bound, as activation_bytes is.

    They are FP32 parameters and gradients, the optimizer's state, and all that is saved for backward: activations,
    copies of weights, and the head's gradient, which the chunked cross-entropy makes in the forward.
    The peak of a step is higher by the operation at work, such as an optimizer's temporary tensors.

    Args:
        batch_size: sequences that go through the model at a time: with gradient accumulation a part of the step's.
        dtype, recompute: as in activation_bytes.
        optimizer, moments: as in optimizer_bytes.
        dsa_stage: in the warm-up, where only indexers learn, what is saved for backward is left out.
    """
    held = {
        "parameters": weight_bytes(config, "float32").total,
        "gradients": gradient_bytes(config, dsa_stage).total,
        "optimizer": optimizer_bytes(config, optimizer, moments, dsa_stage).total,
    }
    if dsa_stage == "sparse":
        saved = activation_bytes(config, batch_size=batch_size, seq_len=seq_len, dtype=dtype, recompute=recompute)
        held["activations"] = saved.total
        held["weights kept for backward"] = sum(saved_copy(use, config, dtype) for use in tensors(config))
        held["the head's gradient"] = 4 * (1 + config.n_mtp_layers) * config.vocab_size * config.dim
    return Bytes.of(held.items())


def saved_copy(use: TensorUse, config: ModelConfig, dtype: Dtype) -> int:
    """Return the bytes of the copies of a weight that autograd saves, besides the FP32 parameter itself.

    Matrices are saved in the dtype they were multiplied in; experts' w1 and w3 also in FP32, where they are joined.
    """
    if use.form == "fp8" and config.precision == "fp8":
        return use.count * use.bytes("fp8")
    if use.kind == INDEXER or (use.form != "fp8" and use.name not in PLAIN):  # an indexer's inputs are detached
        return 0
    joined = use.kind == "routed experts" and use.name != "w2"
    return use.parameters * SIZES[dtype] if joined or dtype != "float32" else 0


# --- the cache


def kv_bytes_per_token(config: ModelConfig, dtype: CacheDtype = "bfloat16") -> float:
    """Return the bytes of cache that a token occupies in all layers together. V3 in BF16: 70,272.

    The rows of multi-token prediction blocks are not in it. V4's are those of its entries, a mean; the window and the
    rows of which the next entry is made are a constant of each sequence.

    Args:
        dtype: "fp8" is 656 bytes a layer at V3's sizes: 512 codes, four FP32 scales, and
            64 numbers of rotary key in BF16. DSA's are 132 more, the indexer's key: 48,068 in all layers of V3.2.
            V4's entries are 584 and the indexer's 68: 3,514.25 a token of V4-Flash.

    Source: DeepSeek-V2 report, table 1; "Insights into DeepSeek-V3", table 1 (its KB are 1000 bytes).
    Raises: ValueError for "fp8" where attention is a baseline.
    """
    row, index = row_bytes(config, dtype), index_row_bytes(config, dtype)
    if config.compress_ratios is None:
        return config.n_layers * row + full_layers(config) * index
    return sum((row + index * (ratio == CSA_RATIO)) / ratio for ratio in config.compress_ratios if ratio)


def mha_kv_bytes_per_token(config: ModelConfig, dtype: CacheDtype = "bfloat16") -> int:
    """Return kv_bytes_per_token of the mha_twin, also where qk_nope_head_dim is odd and no such model can be built."""
    widths = 2 * config.head_dim if config.head_dim else config.qk_nope_head_dim + config.v_head_dim
    return config.n_layers * (config.n_heads * widths * SIZES[dtype])


def mha_twin(config: ModelConfig) -> ModelConfig:
    """Return the same model with multi-head attention of the same number of heads: the baseline of MLA's cache.

    Its keys are qk_nope_head_dim wide and its values v_head_dim, V4's head_dim. Against it V3's cache is 98.24 %
    smaller: 576 numbers a layer next to 128 * (128 + 128) = 32768. That figure needs keys of 128; against MLA's own
    192-wide expanded keys, 128 * (192 + 128) = 40960, the same cache saves 98.59 %.

    Raises: ValueError if qk_nope_head_dim is odd, since the baseline rotates it.
    """
    widths = {"qk_nope_head_dim": config.head_dim, "v_head_dim": config.head_dim} if config.head_dim else {}
    return dataclasses.replace(config, attention="mha", n_kv_heads=None, **widths, **NO_INDEXER)


def cache_bytes(
    config: ModelConfig, *, max_seq_len: int, batch: int = 1, dtype: CacheDtype = "bfloat16", mtp: bool = False
) -> Bytes:
    """Return the bytes of the storage of Transformer.new_cache, all of which is allocated at once.

    Args:
        mtp: with the rows of the multi-token prediction blocks, a layer's each.

    Raises: ValueError for sizes below 1, and "fp8" where attention is not MLA.
    """
    check_sizes(max_seq_len=max_seq_len, batch=batch)
    c, row, index = config, row_bytes(config, dtype), index_row_bytes(config, dtype)
    main = max_seq_len * (c.n_layers * row + full_layers(c) * index)
    of_mtp = c.n_mtp_layers * max_seq_len * (row + index)
    if c.compress_ratios is not None:
        of_layer = (layer_cache_bytes(c, ratio, max_seq_len, row, index) for ratio in c.compress_ratios)
        main, of_mtp = sum(of_layer), c.n_mtp_layers * layer_cache_bytes(c, 0, max_seq_len, row, index)
    main += engram_cache_bytes(c, dtype, max_seq_len)
    return Bytes.of([("cache", batch * main), (MTP + "cache", batch * of_mtp if mtp else 0)])


def layer_cache_bytes(c: ModelConfig, ratio: int, tokens: int, row: int, index: int) -> int:
    """Return the bytes that a layer of V4 stores of a sequence: window, entries, and FP32 rows of which one is made.

    Args:
        row, index: bytes of a row, and of an indexer's.
    """
    entries = tokens // ratio if ratio else 0
    return fixed_layer_bytes(c, ratio, row, tokens) + entries * (row + index * (ratio == CSA_RATIO))


def fixed_layer_bytes(c: ModelConfig, ratio: int, row: int, tokens: int | None = None) -> int:
    """Return the bytes of a layer's window, and of the FP32 rows of which an entry is made: not of its entries.

    Args:
        tokens: room of the sequence; None: more than the window has.
    """
    series, widths = (2, (c.head_dim or 0) + (c.index_head_dim or 0)) if ratio == CSA_RATIO else (1, c.head_dim or 0)
    window, raw = (c.window_size or 0) + SLACK, series * ratio + SLACK
    if tokens is not None:
        window, raw = min(window, tokens), min(raw, tokens)
    return window * row + (raw * 2 * series * widths * 4 if ratio else 0)


def fixed_cache_bytes(config: ModelConfig, dtype: CacheDtype = "bfloat16") -> int:
    """Return the bytes of cache of a sequence besides kv_bytes_per_token of each token: V4's windows, and Engram's."""
    windows = (fixed_layer_bytes(config, ratio, row_bytes(config, dtype)) for ratio in config.compress_ratios or ())
    return sum(windows) + engram_cache_bytes(config, dtype)


def engram_cache_bytes(c: ModelConfig, dtype: CacheDtype, tokens: int | None = None) -> int:
    """Return the bytes of a sequence that Engrams store: the ids of the latest tokens, and inputs of the convolution.

    Args:
        tokens: room of the sequence; None: more than they need.
    """
    ids, inputs = c.engram_max_ngram_size - 1 + SLACK, c.engram_reach + SLACK if c.engram_reach else 0
    if tokens is not None:
        ids, inputs = min(ids, tokens), min(inputs, tokens)
    row = c.hc_mult * c.dim * (4 if dtype == "float32" else 2)
    return len(c.engram_layer_ids or ()) * (4 * ids + inputs * row)


def rows_read(c: ModelConfig, context: int, dtype: CacheDtype) -> float:
    """Return the bytes of a sequence's cache that one new token reads in all layers.

    It reads the rows of attention that a query chose, and all keys of an indexer.
    """
    row, index = row_bytes(c, dtype), index_row_bytes(c, dtype)
    if c.compress_ratios is None:
        return c.n_layers * min(context, c.index_topk or context) * row + full_layers(c) * context * index
    read = float(c.n_layers * min(context, c.window_size or context) * row)
    for ratio in filter(None, c.compress_ratios):
        entries = context // ratio
        read += min(entries, c.index_topk or 0) * row + entries * index if ratio == CSA_RATIO else entries * row
    return read


def row_width(c: ModelConfig) -> int:
    """Return the numbers that a layer stores of a token for attention."""
    if c.head_dim is not None:
        return c.head_dim
    if c.is_mla:
        return c.kv_lora_rank + c.qk_rope_head_dim
    return c.kv_heads * (c.qk_nope_head_dim + c.v_head_dim)


def row_bytes(c: ModelConfig, dtype: CacheDtype) -> int:
    """Return the bytes that a layer stores of a token for attention."""
    require(dtype in ("float32", "bfloat16", "fp8"), f"a cache of dtype={dtype!r}; use float32, bfloat16 or fp8")
    if dtype != "fp8":
        return row_width(c) * SIZES[dtype]
    if c.head_dim is not None:
        codes, rotary = c.head_dim - c.qk_rope_head_dim, 2 * c.qk_rope_head_dim
        return 8 * ceiling(codes + rotary + ceiling(codes, BLOCK_FP8), 8)
    kind = c.attention
    require(c.is_mla, f"dtype='fp8' is the layout of MLA's latent, not of attention={kind!r}; use bfloat16")
    return c.kv_lora_rank + 4 * ceiling(c.kv_lora_rank, BLOCK) + 2 * c.qk_rope_head_dim


def index_row_bytes(c: ModelConfig, dtype: CacheDtype) -> int:
    """Return the bytes that a layer stores of a token for its indexer: 132 of V3.2 in FP8; 0 without an indexer."""
    d = c.index_head_dim or 0
    if c.attention == "compressed" and dtype == "fp8":  # FP4
        return d // 2 + d // min(BLOCK_FP4, d)
    return d + 4 * ceiling(d, BLOCK) if dtype == "fp8" else d * SIZES[dtype]


# --- activations


def activation_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    recompute: bool | Recompute = False,
) -> Bytes:
    """Return the bytes of activations that Transformer.losses saves for backward, multi-token prediction's included.

    With config.precision "fp8" the inputs of the products in attention and feed-forwards are FP8 codes and scales
    (E5M6 for the one after attention), as is SwiGLU's; attention's inside, the norms and the gates are as before.

    Not in it: copies of weights in the compute dtype and the head's gradient, which are training_bytes's; what exists
    only for a moment, such as an operation's result next to its inputs. A CPU's kernels save less of routed experts.

    Lower bound. With fused attention, keys as wide as values and a head of keys for each head of queries, what is
    really saved is the same within 0.1 %, tested; a few numbers a sequence and an expert are left out.

    Args:
        dtype: of activations.
        recompute: only the blocks' inputs are saved, and, when backward is in it, the activations of one block, the
            largest; or the name of what is made again.

    Raises: ValueError for sizes below 1, and sequences too short for the depths of multi-token prediction.
    """
    check_training(config, batch_size, seq_len, dtype)
    saved = Saved(
        c=config,
        size=SIZES[dtype],
        fp8=config.precision == "fp8",
        recompute=recompute if isinstance(recompute, str) else "full" if recompute else "none",
    )

    def amounts() -> Amounts:
        for prefix, part, tokens in _passes(config, seq_len):
            yield from ((prefix + name, batch_size * tokens * amount) for name, amount in saved.part(part))
        if saved.recompute == "full":
            yield "one block, made again", batch_size * seq_len * saved.largest_block()
        # cosines and sines in FP32, one of each a pair
        pairs = config.qk_nope_head_dim if config.is_baseline else config.qk_rope_head_dim
        depths = 1 if saved.recompute == "full" else config.n_mtp_layers + 1  # full: of the block made again
        for depth in range(depths):
            yield TABLES, 4 * pairs * (seq_len - depth)

    return Bytes.of(amounts())


def _passes(c: ModelConfig, seq_len: int) -> Iterator[tuple[str, Part, int]]:
    """Yield the parts that the tokens of a sequence pass: the prefix of the names, the part, and the tokens.

    Depth k of multi-token prediction has seq_len - k positions. The state that a depth gives to the next is saved too.
    """
    dense, moe, mtp_dense, _ = blocks(c)
    yield "", "embedding", seq_len
    yield "", "indexed", full_layers(c) * seq_len
    yield "", "dense", dense * seq_len
    yield "", "hashed", c.n_hash_layers * seq_len
    yield "", "moe", (moe - c.n_hash_layers) * seq_len
    yield "", "head", seq_len
    states = c.hc_mult > 1 or c.mtp_input == "post_norm"
    if c.n_mtp_layers and c.mtp_input == "post_norm" and c.hc_mult == 1:  # the head saves streams
        yield MTP, "state", seq_len
    for depth in range(c.n_mtp_layers):
        positions = seq_len - (depth + 1)
        yield MTP, "mtp", positions
        yield MTP, "indexed", positions
        yield MTP, "moe" if depth >= mtp_dense else "dense", positions
        if states and depth + 1 < c.n_mtp_layers:
            yield MTP, "state", positions


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Bytes that a token saves in each part of a model."""

    c: ModelConfig
    size: int
    """Bytes of a number between products."""
    fp8: bool
    """Inputs of the products in attention and feed-forwards are FP8."""
    recompute: Recompute = "none"

    def part(self, part: Part) -> Amounts:
        """Yield what a token saves in a part: of a model's ends, a block, or multi-token prediction's ends."""
        c, row, none = self.c, self.row(self.c.dim), self.recompute == "none"
        if part == "embedding":
            yield "tokens", 8
            if c.hc_mult > 1:  # equal streams are views of one row
                yield "inputs of blocks" if self.recompute == "full" else STREAMS, (1 - c.hc_mult) * row
        if part in ("embedding", "mtp") and c.embed_norm:
            yield STATE, self.normed(c.dim)
        if part == "mtp":
            if none:  # enorm, and the inverse of hnorm, which norms each stream
                yield STATE, self.normed(c.dim) + 4 * c.hc_mult
            if self.recompute != "full":
                yield "projection", (c.hc_mult + (1 if none else 2)) * row
            elif c.hc_mult > 1:  # the embedding; but streams, an input too, are saved by the main model's end
                yield "inputs of blocks", (1 - c.hc_mult) * row
        if part == "head" or (part == "mtp" and self.recompute != "full"):
            yield STATE, self.normed(c.dim)
            if c.hc_mult > 1:
                yield STREAMS, self.collapsed()
        if part in ("head", "mtp"):
            yield "losses", row
        elif part == "state" and c.hc_mult == 1:
            yield STATE, row
        elif part == "state" and self.recompute == "full":
            yield "inputs of blocks", c.hc_mult * row
        elif part == "indexed" and c.attention == "dsa" and self.recompute != "full":
            yield from self.indexer()
        elif part in ("dense", "moe", "hashed") and self.recompute == "full":
            yield "inputs of blocks", c.hc_mult * row
            yield "gates", self.scores() if part == "moe" else 0
        elif part in ("dense", "moe", "hashed"):
            yield STATE, 2 * self.normed(c.dim)
            if c.hc_mult > 1:  # of both sublayers
                yield STREAMS, 2 * (self.connected() + row)
            yield from self.engram()
            yield from self.compressed_attention() if c.attention == "compressed" else self.attention()
            yield from self.dense() if part == "dense" else self.moe(hashed=part == "hashed")

    def engram(self) -> Amounts:
        """Yield the mean of all blocks: rows of the tables, key and value, and streams in FP32, normed and gated."""
        c, width = self.c, engram_width(self.c)
        streams, rows = c.hc_mult * c.dim, (c.engram_max_ngram_size - 1) * c.engram_n_heads
        saved = 8 * rows + self.read(width) + self.row(streams + c.dim) + 3 * 4 * streams
        yield ENGRAM, len(c.engram_layer_ids or ()) * saved // c.n_layers

    def total(self, part: Part) -> int:
        """Return the bytes that a token saves in a part."""
        return sum(amount for _, amount in self.part(part))

    def connected(self) -> int:
        """Return the bytes of a hyper-connection without what a sublayer writes.

        They are the streams, and the numbers by which they are read and mixed: Sinkhorn's are logits, twice, and comb.
        """
        n, row = self.c.hc_mult, self.row(self.c.dim)
        return n * row + 4 * (1 + 6 * n + (0 if self.c.hc_kind == "identity" else 3 * n * n))

    def collapsed(self) -> int:
        """Return the bytes of the end of the streams, which reads them and writes none."""
        n, row = self.c.hc_mult, self.row(self.c.dim)
        return n * row + 4 * (1 + 3 * n)

    def attention(self) -> Amounts:
        """Yield the inputs of the products, then what lies between them (report, section 2.1.1)."""
        c = self.c
        d, v, h = key_width(c), c.v_head_dim, c.n_heads
        latent_up = self.recompute == "selective" and c.is_mla  # made again
        yield "attention", self.norm_result(c.dim)
        if c.is_mla:
            if c.q_lora_rank is not None:
                yield STATE, self.normed(c.q_lora_rank)
                yield "attention", self.norm_result(c.q_lora_rank)
            yield STATE, self.normed(c.kv_lora_rank) + self.row(c.qk_rope_head_dim)
            yield "attention", self.norm_result(c.kv_lora_rank)
        if c.qk_norm and not latent_up:
            yield STATE, (h + c.kv_heads) * self.normed(d)
        # fused: queries and result, keys and values, and a number a query for the softmax
        if not latent_up or c.q_lora_rank is None:
            yield OVER, h * self.row(d)
        if not latent_up:
            yield OVER, c.kv_heads * self.row(d + v)
        if not self.fp8 or self.recompute == "none":
            yield OVER, h * self.row(v)
        yield OVER, h * 4
        if self.fp8:  # wo reads the result in E5M6, 12 bits a number (report, section 3.3.3)
            yield "attention", 12 * ceiling(h * v, 8) + 4 * ceiling(h * v, BLOCK)

    def compressed_attention(self) -> Amounts:
        """Yield V4's: of entries the mean of all layers, since their kinds take turns. A lower bound, as if fused."""
        c, h, d = self.c, self.c.n_heads, self.c.head_dim or 0
        latent, outputs = c.q_lora_rank or 0, (c.o_groups or 1) * (c.o_lora_rank or 0)
        yield "attention", self.norm_result(c.dim) + self.norm_result(latent)
        yield STATE, self.normed(latent) + self.normed(d)
        made = 0 if self.recompute == "selective" else h * self.normed(d)  # queries before the norm of each head
        yield OVER, made + (2 * h + 1) * self.row(d) + 4 * h
        yield "attention", self.row(h * d) + self.read(outputs)
        ratios = [ratio for ratio in c.compress_ratios or () if ratio]
        series = sum(2 if ratio == CSA_RATIO else 1 for ratio in ratios)
        yield "compressor", 4 * (len(ratios) * c.dim + 2 * series * d) // c.n_layers

    def indexer(self) -> Amounts:
        """Yield an indexer's own; it reads what attention reads, in FP8 as codes of its own."""
        c, h, d = self.c, self.c.index_n_heads or 0, self.c.index_head_dim or 0
        if self.size < 4 or self.fp8:
            yield INDEXER, 4 * c.dim
        if self.fp8:
            yield INDEXER, self.read(c.dim) + self.read(c.q_lora_rank or c.dim)
        yield INDEXER, 4 * d + 8
        yield INDEXER, (h + 1) * self.row(d) + 4 * h

    def dense(self) -> Amounts:
        """Yield a dense feed-forward."""
        yield "dense feed-forward", self.norm_result(self.c.dim)
        yield "dense feed-forward", self.swiglu(self.c.inter_dim)

    def moe(self, hashed: bool = False) -> Amounts:
        """Yield the gate, the routed experts at perfect balance, and the shared ones."""
        c, none = self.c, self.recompute == "none"
        yield "gates", self.gate(hashed)
        if none and (self.size < 4 or self.fp8):  # the gate reads FP32: a copy, unless experts read FP32 too
            yield "gates", 4 * c.dim
        # their inputs and results, which token a row is of, and where a visit's row is
        result = self.row(c.dim) if none else 0
        visit = self.read(c.dim) + result + 8 + 8 + self.swiglu(c.moe_inter_dim)
        yield "routed experts", c.n_activated_experts * visit
        if none and (c.n_shared_experts or (self.size == 4 and not self.fp8)):
            yield "shared experts" if c.n_shared_experts else "gates", self.read(c.dim)
        if c.n_shared_experts:
            yield "shared experts", self.swiglu(c.n_shared_experts * c.moe_inter_dim)

    def gate(self, hashed: bool) -> int:
        """Return bytes of scores, of their order, of which the choice is a part, and of the weights.

        Normalised weights are saved twice, divided and undivided, with their sum. A table chooses without an order, and
        no balance loss reads its layer's scores.
        """
        e, k = self.c.n_routed_experts, self.c.n_activated_experts
        weights = 8 * k + 4 if self.c.norm_topk_prob else 4 * k
        return weights + (4 * e + 8 * k if hashed else self.scores() + 8 * e)

    def scores(self) -> int:
        """Return bytes of the scores, and of their sum, which the balance loss divides by."""
        return 4 * self.c.n_routed_experts + 4

    def swiglu(self, f: int) -> int:
        """Return w1's and w3's results, silu and the product; in FP8 the results as codes, the rest is made again."""
        if self.fp8:
            return 2 * self.read(f)
        return (4 if self.recompute == "none" else 2) * self.row(f)

    def row(self, width: int) -> int:
        """Return the bytes of a row between products."""
        return width * self.size

    def read(self, width: int) -> int:
        """Return the bytes that are saved of one row that a product reads."""
        return width + 4 * ceiling(width, BLOCK) if self.fp8 else self.row(width)

    def normed(self, width: int) -> int:
        """Return the bytes of a norm's input, and of the inverse of its root mean square unless it is made again."""
        return self.row(width) if self.recompute == "selective" else self.row(width) + 4

    def norm_result(self, width: int) -> int:
        """Return the bytes of a norm's result, which a product reads; none if it is made again."""
        return self.read(width) if self.recompute == "none" else 0

    def largest_block(self) -> int:
        """Return the bytes of a token of the block whose activations are made again in backward, the largest."""
        whole, c = dataclasses.replace(self, recompute="none"), self.c
        dense, moe, _, _ = blocks(c)
        there: dict[Part, int] = {"dense": dense, "moe": moe - c.n_hash_layers, "hashed": c.n_hash_layers}
        return whole.total("indexed") + max(whole.total(part) for part, number in there.items() if number)
