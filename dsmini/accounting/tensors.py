"""Every tensor of a model, and what one token does with it: the one list that all counts are sums over.

DeepSeek-V3's query compression is

    TensorUse("attention", "wq_a", shape=(1536, 7168), visits=1, form="fp8", place="block", times=61)

that is 1536 * 7168 = 11,010,048 parameters in each of 61 blocks. A token is multiplied with each matrix once, so the
multiply-adds of a token are the same number. In FP8 a matrix has 12 * 56 = 672 scales, one for each block of 128x128.
A stack of 256 experts, w1 of [2048, 7168] each, has 3,758,096,384 parameters; a token visits 8 of the 256 matrices,
which is 117,440,512 multiply-adds.

Worked example, DeepSeek-V3 without multi-token prediction: 61 layers, the first 3 of them dense.

    embedding, head       2 * 129280 * 7168                                                 1,853,358,080
    attention             61 * (7168 * 1536 + 1536 * 24576 + 7168 * 576
                                + 512 * 32768 + 16384 * 7168)                              11,413,422,080
    dense feed-forward    3 * 3 * 7168 * 18432                                              1,189,085,184
    gates                 58 * 256 * 7168                                                     106,430,464
    routed experts        58 * 256 * 3 * 7168 * 2048                                      653,908,770,816
    shared experts        58 * 3 * 7168 * 2048                                              2,554,331,136
    norms                 61 * (2 * 7168 + 1536 + 512) + 7168                                   1,006,592
    main                                                                                  671,026,404,352

A token uses 8 of the 256 routed experts, no embedding and no norm: 36.62B parameters are active.

Source: the shapes of the released checkpoints; DeepSeek-V3 report (arXiv 2412.19437), section 4.2: 671B parameters, 37B
activated.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

from dsmini.config import ModelConfig
from dsmini.config.fields import require
from dsmini.config.model import CSA_RATIO

MTP = "mtp "
"""Prefix of the names of what belongs to multi-token prediction blocks."""
OVER = "attention over the context"
"""Attention's products that grow with the context: queries with keys, weights with values."""
INDEXER, SCORES = "indexer", "scores of the indexer"
"""DSA's and CSA's indexer, and its products of queries with keys, which grow with the context too."""

STREAMS = "hyper-connections"
ENGRAM, ENGRAM_TABLES = "engram", "engram tables"
"""Engram's matrices and small weights, and its tables, of which a token reads a few rows."""

HELD_FP8 = ("wo_a", "e_proj", "h_proj")
"""Matrices of V4 that are FP8 in memory, and BF16 in products."""

Dtype = Literal["float32", "bfloat16"]
"""Dtype of numbers that are computed with."""
WeightDtype = Literal["float32", "bfloat16", "fp8", "fp4", "int8", "int4"]
"""fp8: the matrices of attention and feed-forwards as E4M3 codes with an FP32 scale for each block of 128x128. fp4: as
V4 is served, the same but for routed experts, which have E2M1 codes with a scale of one byte for 32 of them. int8: the
bytes of fp8. int4: routed experts as codes of 4 bits with a BF16 scale for 32 of them, all else in BF16."""
DsaStage = Literal["warmup", "sparse"]
"""Stage in which indexers learn: as train.dsa_stage. In the warm-up nothing else does."""
Place = Literal["ends", "mtp", "block", "indexed", "dense", "moe", "scored", "hashed", "compressed", "engram"]
"""Blocks that have a tensor: none, as the ends of the model and of a depth; all; those of DSA with an indexer; those
that are dense; with experts, chosen by scores, or by a table; those of V4 with entries; those with an Engram."""
SIZES = {"float32": 4, "bfloat16": 2, "fp8": 2, "fp4": 2, "int8": 2, "int4": 2}
"""Bytes of a number of a model in a dtype; in narrow ones of what is BF16 there."""
BLOCK_FP4 = 32
"""Numbers of FP4 that share a scale."""
BLOCK = 128
"""Rows and columns of a block of FP8 weights, and numbers of a tile of FP8 activations (report, section 3.3.2)."""


def ceiling(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def divisors(number: int, most: int | None = None) -> list[int]:
    """Return the divisors of a number, up to `most`."""
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


class TensorUse(NamedTuple):
    """A parameter and its use by a token; or products that have no parameter, as attention's over the context."""

    kind: str
    """Kind of module, such as "routed experts"."""
    name: str
    """Name of the parameter in the model, without the path to it."""
    shape: tuple[int, ...] = ()
    """[o, i] of a matrix, [m] of a norm; () for products without a parameter."""
    stack: int = 1
    """Number of such matrices: of routed experts."""
    visits: int = 0
    """Products of a token with matrices [o, i]."""
    form: Literal["fp8", "plain", "fp32"] = "plain"
    """fp8: a matrix of attention or a feed-forward, which may be FP8. plain: follows the model's dtype in any case.
    fp32: a norm or gate, which stays FP32."""
    split: Literal["whole", "heads", "up", "width"] = "whole"
    """Way in which GPUs that share a matrix divide it: not, by heads (up: MLA's wkv_b), or by its hidden width."""
    place: Place = "ends"
    times: int = 1
    """Number of blocks that have it."""
    mtp: bool = False
    """It is of the blocks of multi-token prediction."""
    first: int = 0
    """Depth of multi-token prediction that has it first."""
    owned: bool = True
    """False: a parameter that is listed elsewhere and used once more."""
    per_pair: int = 0
    """Multiply-adds of a query with one key and its value, all heads."""
    most_keys: int | None = None
    """Number of keys above which a query chooses among them; None: it sees all."""
    ratio: int = 1
    """Tokens of a key: more than one in V4's compressed entries."""
    groups: int = 1
    """Parts of the result, each of which reads an input of its own, i numbers."""
    buffers: int = 0
    """Routing biases and numbers of hash layers' tables, which are state but no parameters."""

    @property
    def module(self) -> str:
        """Kind of module, with the prefix of multi-token prediction."""
        return MTP + self.kind if self.mtp else self.kind

    @property
    def numbers(self) -> int:
        """Numbers of one matrix or norm."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def count(self) -> int:
        """Number of such matrices or norms in all blocks."""
        return self.times * self.stack if self.owned else 0

    @property
    def parameters(self) -> int:
        """Parameters in all blocks."""
        return self.count * self.numbers

    @property
    def per_token(self) -> int:
        """Multiply-adds of a token in all blocks, which is also the number of parameters it is multiplied with."""
        return self.times * self.visits * self.numbers

    def learns(self, stage: DsaStage) -> bool:
        """Return whether training changes it in a stage."""
        return stage == "sparse" or self.kind == INDEXER or self.name.startswith("k_norm.")

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in and numbers out of all products of a token."""
        if not self.shape:
            return 0, 0
        products = self.times * self.visits
        return products * self.groups * self.shape[-1], products * self.shape[0]

    @property
    def scales(self) -> int:
        """Number of 128x128 blocks of one matrix, ragged ones at the edges included: 576 rows have five."""
        return ceiling(self.shape[0], BLOCK) * ceiling(self.shape[1], BLOCK)

    def held(self, dtype: str) -> Iterator[tuple[str, int]]:
        """Yield the bytes of one matrix or norm that is held in a dtype, then of its scales and routing biases."""
        if dtype in ("fp4", "int4") and self.kind == "routed experts":
            yield self.module, self.numbers // 2
            yield "scales", self.numbers // BLOCK_FP4 * (2 if dtype == "int4" else 1)
            return
        fp8 = dtype in ("fp8", "fp4", "int8") and (self.form == "fp8" or self.name in HELD_FP8)
        yield self.module, self.numbers * (4 if self.form == "fp32" else 1 if fp8 else SIZES[dtype])
        yield "scales", 4 * self.scales if fp8 else 0
        yield "routing biases", 4 * self.buffers

    def bytes(self, dtype: str) -> int:
        """Return the bytes of one matrix or norm that is held in a dtype, with its scales and routing biases."""
        return sum(amount for _, amount in self.held(dtype))


def blocks(c: ModelConfig) -> tuple[int, int, int, int]:
    """Return the number of blocks: dense, with experts; and of multi-token prediction dense, with experts."""
    dense = min(c.n_dense_layers, c.n_layers)
    mtp_dense = c.n_dense_layers - dense
    return dense, c.n_layers - dense, mtp_dense, c.n_mtp_layers - mtp_dense


def full_layers(c: ModelConfig) -> int:
    """Return the number of layers without those that take another one's choice of keys."""
    return c.n_layers - c.indexer_types.count("shared")


def tensors(c: ModelConfig) -> Iterator[TensorUse]:
    """Yield all tensors of Transformer(c)."""
    yield from main_tensors(c)
    yield from mtp_tensors(c)


def main_tensors(c: ModelConfig) -> Iterator[TensorUse]:
    """Yield all tensors but those of multi-token prediction."""
    yield TensorUse("embedding", "embed", (c.vocab_size, c.dim))
    if c.embed_norm:
        yield _norm("embed_norm", c.dim)
    dense, moe, _, _ = blocks(c)
    hashed = c.n_hash_layers
    times: dict[Place, int] = {"block": c.n_layers, "indexed": full_layers(c), "dense": dense, "moe": moe}
    times["scored"], times["hashed"] = moe - hashed, hashed
    yield from _placed(c, times)
    for ratio, layers in Counter(c.compress_ratios or ()).items():
        for use in _compressed(c, ratio) if ratio else ():
            yield use._replace(place="compressed", times=layers, ratio=ratio)
    for layer in c.engram_layer_ids or ():
        for use in _engram(c, layer):
            yield use._replace(name=f"{layer}.engram.{use.name}", place="engram")  # tables differ
    yield from _hyper_connection(c, "hc_head", c.hc_mult, 1)
    yield _norm("norm", c.dim)
    yield TensorUse("head", "head", (c.vocab_size, c.dim), visits=1)


def mtp_tensors(c: ModelConfig) -> Iterator[TensorUse]:
    """Yield the tensors of multi-token prediction; embedding and head are the main model's."""
    if not c.n_mtp_layers:
        return
    _, _, dense, moe = blocks(c)
    uses = [_norm(name, c.dim) for name in ("enorm", "hnorm", "norm")]
    if c.hc_mult > 1:
        uses.append(TensorUse("projection", "e_proj", (c.dim, c.dim), visits=1))
        uses.append(TensorUse("projection", "h_proj", (c.dim, c.dim), visits=c.hc_mult))  # of each stream
        uses += _hyper_connection(c, "hc_head", c.hc_mult, 1)
    else:
        uses.append(TensorUse("projection", "eh_proj", (c.dim, 2 * c.dim), visits=1))
    uses.append(TensorUse("head", "head", (c.vocab_size, c.dim), visits=1, owned=False))
    for use in uses:
        yield use._replace(mtp=True, place="mtp", times=c.n_mtp_layers)
    every = c.n_mtp_layers
    for use in _placed(c, {"block": every, "indexed": every, "dense": dense, "moe": moe, "scored": moe}):
        yield use._replace(mtp=True, first=dense if use.place in ("moe", "scored") else 0)


def _placed(c: ModelConfig, times: dict[Place, int]) -> Iterator[TensorUse]:
    """Yield the tensors of all blocks, with the number of blocks that have them."""
    of: dict[Place, Callable[[ModelConfig], Iterable[TensorUse]]] = {
        "block": _block,
        "indexed": _indexer,
        "dense": lambda c: _swiglu("dense feed-forward", c.dim, c.inter_dim),
        "moe": _moe,
        "scored": lambda c: [TensorUse("gates", "bias", buffers=c.n_routed_experts)],
        "hashed": lambda c: [TensorUse("gates", "tid2eid", buffers=c.vocab_size * c.n_activated_experts)],
    }
    if c.topk_method != "noaux_tc":
        times = {place: number for place, number in times.items() if place != "scored"}
    for place, number in times.items():
        for use in of[place](c) if number else ():
            yield use._replace(place=place, times=number)


def _block(c: ModelConfig) -> Iterator[TensorUse]:
    yield _norm("attn_norm", c.dim)
    yield from _window(c) if c.attention == "compressed" else _attention(c)
    yield _norm("ffn_norm", c.dim)
    for name in ("hc_attn", "hc_ffn"):
        rows = c.hc_mult * (2 if c.hc_kind == "identity" else 2 + c.hc_mult)
        yield from _hyper_connection(c, name, rows, 2 if c.hc_kind == "identity" else 3)


def _hyper_connection(c: ModelConfig, name: str, rows: int, gates: int) -> Iterator[TensorUse]:
    """Yield a connection to several residual streams, all of it FP32."""
    if c.hc_mult > 1:
        yield TensorUse(STREAMS, f"{name}.fn", (rows, c.hc_mult * c.dim), visits=1, form="fp32")
        for part, width in (("base", rows), ("scale", gates)):
            yield TensorUse(STREAMS, f"{name}.{part}", (width,), form="fp32")


def engram_width(c: ModelConfig) -> int:
    """Return the numbers of the rows that a token reads in the tables of a block with an Engram."""
    return (c.engram_max_ngram_size - 1) * c.engram_n_heads * c.engram_head_dim


def _engram(c: ModelConfig, layer: int) -> Iterator[TensorUse]:
    primes, width, streams = c.engram_primes(layer), engram_width(c), c.hc_mult * c.dim
    yield TensorUse(ENGRAM_TABLES, "embed", (sum(map(sum, primes)), c.engram_head_dim))
    yield TensorUse(ENGRAM, "wk", (streams, width), visits=1, form="fp8")
    yield TensorUse(ENGRAM, "wv", (c.dim, width), visits=1, form="fp8")
    norms = ("q_norm", "k_norm") if c.engram_conv_size is None else ("q_norm", "k_norm", "conv_norm")
    yield from (TensorUse(ENGRAM, name, (streams,), form="fp32") for name in norms)
    if c.engram_conv_size is not None:
        yield TensorUse(ENGRAM, "conv", (c.engram_conv_size, streams), form="fp32")
    hashes = c.vocab_size + c.engram_max_ngram_size + sum(map(len, primes))  # compressed ids, multipliers, primes
    yield TensorUse(ENGRAM, "hash", buffers=hashes)


def _moe(c: ModelConfig) -> Iterator[TensorUse]:
    yield TensorUse("gates", "gate", (c.n_routed_experts, c.dim), visits=1, form="fp32")
    for use in _swiglu("routed experts", c.dim, c.moe_inter_dim):
        yield use._replace(stack=c.n_routed_experts, visits=c.n_activated_experts, split="whole")
    if c.n_shared_experts:
        yield from _swiglu("shared experts", c.dim, c.n_shared_experts * c.moe_inter_dim)


def key_width(c: ModelConfig) -> int:
    """Return the width of a head's query and key, of MLA in its expanded form."""
    return c.head_dim or (c.qk_head_dim if c.is_mla else c.qk_nope_head_dim)


def value_width(c: ModelConfig) -> int:
    """Return the width of a head's value; in V4 the key is the value."""
    return c.head_dim or c.v_head_dim


def key_heads(c: ModelConfig) -> int:
    """Return the number of heads with a key of their own, of MLA in its expanded form."""
    return 1 if c.attention == "compressed" else c.kv_heads


def _attention(c: ModelConfig) -> Iterator[TensorUse]:
    m, h, d, v = c.dim, c.n_heads, key_width(c), c.v_head_dim
    if c.is_mla:
        if c.q_lora_rank is None:
            yield _matrix("wq", h * d, m)
        else:
            yield _matrix("wq_a", c.q_lora_rank, m, "whole")
            yield _norm("q_norm", c.q_lora_rank)
            yield _matrix("wq_b", h * d, c.q_lora_rank)
        yield _matrix("wkv_a", c.kv_lora_rank + c.qk_rope_head_dim, m, "whole")
        yield _norm("kv_norm", c.kv_lora_rank)
        yield _matrix("wkv_b", h * (c.qk_nope_head_dim + v), c.kv_lora_rank, "up")
    else:
        yield _matrix("wq", h * d, m)
        yield _matrix("wk", c.kv_heads * d, m)
        yield _matrix("wv", c.kv_heads * v, m)
    if c.qk_norm:
        yield _norm("q_head_norm", d)
        yield _norm("k_head_norm", d)
    yield TensorUse(OVER, "", per_pair=h * (d + v), most_keys=c.index_topk)
    yield _matrix("wo", m, h * v)


def _window(c: ModelConfig) -> Iterator[TensorUse]:
    """Yield what every layer of V4 has: attention to the window, with one key for all heads, which is their value."""
    m, h, d, g = c.dim, c.n_heads, c.head_dim or 0, c.o_groups or 1
    yield _matrix("wq_a", c.q_lora_rank or 0, m, "whole")
    yield _norm("q_norm", c.q_lora_rank or 0)
    yield _matrix("wq_b", h * d, c.q_lora_rank or 0)
    yield _matrix("wkv", d, m, "whole")
    yield _norm("kv_norm", d)
    yield TensorUse("attention", "attn_sink", (h,), form="fp32")
    yield TensorUse(OVER, "window", per_pair=2 * h * d, most_keys=c.window_size)
    # a group's heads meet its part alone
    wo_a = _matrix("wo_a", g * (c.o_lora_rank or 0), h * d // g)
    yield wo_a._replace(form="plain", groups=g)
    yield _matrix("wo_b", m, g * (c.o_lora_rank or 0))


def _compressed(c: ModelConfig, ratio: int) -> Iterator[TensorUse]:
    """Yield what a layer of V4 with entries has besides. CSA's overlap, and an indexer chooses among them."""
    m, d, series = c.dim, c.head_dim or 0, 2 if ratio == CSA_RATIO else 1
    yield from _compressor("compressor", m, d, ratio, series)
    chosen = c.index_topk if ratio == CSA_RATIO else None
    yield TensorUse(OVER, "entries", per_pair=2 * c.n_heads * d, most_keys=chosen)
    if ratio == CSA_RATIO:
        h, d = c.index_n_heads or 0, c.index_head_dim or 0
        yield TensorUse(INDEXER, "wq_b", (h * d, c.q_lora_rank or 0), visits=1, form="fp8")
        yield from _compressor(INDEXER, m, d, ratio, series)
        yield TensorUse(INDEXER, "weights_proj", (h, m), visits=1, form="fp32")
        yield TensorUse(SCORES, "", per_pair=h * d)


def _compressor(kind: str, m: int, d: int, ratio: int, series: int) -> Iterator[TensorUse]:
    """Yield what makes an entry of each block of tokens, all of it FP32."""
    for name in ("compressor.wkv", "compressor.wgate"):
        yield TensorUse(kind, name, (series * d, m), visits=1, form="fp32")
    yield TensorUse(kind, "compressor.ape", (ratio, series * d), form="fp32")
    yield TensorUse(kind, "compressor.norm", (d,), form="fp32")


def _indexer(c: ModelConfig) -> Iterator[TensorUse]:
    """Yield DSA's indexer: 13,959,424 parameters in a layer of V3.2, its norm's 256 among them."""
    if c.attention != "dsa":
        return
    h, d, m, width = c.index_n_heads or 0, c.index_head_dim or 0, c.dim, c.q_lora_rank or c.dim
    yield TensorUse(INDEXER, "wq_b", (h * d, width), visits=1, form="fp8")
    yield TensorUse(INDEXER, "wk", (d, m), visits=1, form="fp8")
    yield from (_norm(name, d) for name in ("k_norm.weight", "k_norm.bias"))
    yield TensorUse(INDEXER, "weights_proj", (h, m), visits=1, form="fp32")
    yield TensorUse(SCORES, "", per_pair=h * d)


def _matrix(name: str, o: int, i: int, split: Literal["whole", "heads", "up"] = "heads") -> TensorUse:
    return TensorUse("attention", name, (o, i), visits=1, form="fp8", split=split)


def _swiglu(module: str, m: int, f: int) -> Iterator[TensorUse]:
    for name, shape in (("w1", (f, m)), ("w2", (m, f)), ("w3", (f, m))):
        yield TensorUse(module, name, shape, visits=1, form="fp8", split="width")


def _norm(name: str, width: int) -> TensorUse:
    return TensorUse("norms", name, (width,), form="fp32")


def collect(amounts: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the sum of the amounts of each name that has any, in order of first appearance."""
    out: dict[str, Any] = {}
    for name, amount in amounts:
        if amount:
            out[name] = out[name] + amount if name in out else amount
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """An amount of memory or traffic."""

    total: float
    """Bytes; a whole number unless something is a mean or an expectation."""
    by_part: Mapping[str, float]
    """Bytes of each part; they sum to total. The names of multi-token prediction begin with "mtp "."""

    @classmethod
    def of(cls, amounts: Iterable[tuple[str, float]]) -> Self:
        """Return the table of these names and amounts; amounts of one name are added up."""
        by_part = collect(amounts)
        return cls(total=sum(by_part.values()), by_part=by_part)


def check_dtype(dtype: str, known: tuple[str, ...]) -> None:
    """Refuse a dtype that is not among the known ones."""
    require(dtype in known, f"dtype={dtype!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1."""
    for name, value in sizes.items():
        require(value >= 1, f"{name}={value} is not positive; use 1 or more")


def check_context(c: ModelConfig, context: int) -> None:
    """Refuse a context that the model cannot have."""
    fits = 1 <= context <= c.max_seq_len
    require(fits, f"context={context} is not from 1 to max_seq_len={c.max_seq_len}; use such a number")


def check_training(c: ModelConfig, batch_size: int, seq_len: int, dtype: str = "bfloat16") -> None:
    """Refuse a step's sizes and dtype, and sequences that leave a depth of MTP without a position."""
    check_dtype(dtype, ("float32", "bfloat16"))
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    longer = seq_len > c.n_mtp_layers
    require(longer, f"seq_len={seq_len} is too short for n_mtp_layers={c.n_mtp_layers}; use more tokens")


# --- parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Number of parameters of a Transformer, and of those that a token uses in matrix products."""

    total: int
    """All parameters, those of the multi-token prediction blocks included."""
    mtp: int
    """Parameters of the multi-token prediction blocks. V3: 11.610B, printed as 11.5B (11.507B without its
    "mtp projection")."""
    active: int
    """Parameters of the main model that a token is multiplied with: n_activated_experts of the routed experts, and the
    head, but neither the embedding, of which it reads one row, nor norms. V3: 36.62B, printed as 37B; 37.55B with the
    embedding."""
    buffers: int
    """Routing biases, which are state but no parameters and in none of the other counts."""
    by_module: Mapping[str, int]
    """Parameters of each kind of module in the order of the model; they sum to total. In multi-token prediction
    blocks the names begin with "mtp "; the embedding and the head that these share are counted once, without it."""
    active_by_module: Mapping[str, int]
    """Active parameters of each kind of module, with the multi-token prediction blocks and their use of the head:
    V3's block is printed with 2.4B (2.44B with embedding and head and without "mtp projection")."""

    @property
    def main(self) -> int:
        """Parameters without multi-token prediction: V3 671,026,404,352."""
        return self.total - self.mtp


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of Transformer(config), exactly. V3 without MTP: 671,026,404,352, and 14,848 routing biases.

    Source: the shapes of the released checkpoints; DeepSeek-V3 report, section 4.2 (671B, 37B activated).
    """
    uses = list(tensors(config))
    by_module = collect((use.module, use.parameters) for use in uses)
    return Parameters(
        total=sum(by_module.values()),
        mtp=sum(use.parameters for use in uses if use.mtp),
        active=sum(use.per_token for use in uses if not use.mtp),
        buffers=sum(use.times * use.buffers for use in uses),
        by_module=by_module,
        active_by_module=collect((use.module, use.per_token) for use in uses),
    )
