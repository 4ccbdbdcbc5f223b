"""Bytes that a token moves between memory and what computes: where a model is memory bound, these are its time.

Counted at the level of matrices: every product reads its operands and writes its result, once. Norms, rotary embedding,
SwiGLU, residuals, softmax and the gate's choice are left out, as if they rode on the products; attention too is counted
as one operation that reads queries, keys and values and writes its sums, as a fused kernel does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dsmini.accounting.flops import Form, check_context, check_depths, check_sizes, form_taken, rows_read
from dsmini.accounting.kv_cache import CacheDtype, row_bytes, row_width
from dsmini.accounting.memory import Optimizer, WeightDtype, check_dtype, optimizer_bytes
from dsmini.accounting.parameters import parameters
from dsmini.accounting.table import Bytes
from dsmini.accounting.tensors import BLOCK, SIZES, Dtype, Part, key_width, main_parts, mtp_parts
from dsmini.config import ModelConfig

Amounts = Iterator[tuple[str, float]]
READ, WRITE, COPIES = "cache read", "cache write", "cache copies"
EXPANDED = "expanded keys and values"
ATTENDED = "attention operands"
ATTENTION_LOGITS = "attention logits"
OTHERS = ("activations", "logits", "weight gradients", "optimizer")
NO_WEIGHTS = frozenset((READ, WRITE, COPIES, EXPANDED, ATTENDED, ATTENTION_LOGITS, *OTHERS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic(Bytes):
    """Bytes moved a token, by part: a module's name stands for its weights, read once a step, whatever the batch."""

    @property
    def weights(self) -> float:
        """Those parts that are weights."""
        return sum(amount for name, amount in self.by_part.items() if name not in NO_WEIGHTS)


def expected_experts(config: ModelConfig, tokens: float) -> float:
    """How many of a layer's routed experts so many tokens choose together: e (1 - (1 - k/e)^tokens).

    Derivation: with uniform routing, all experts alike and tokens independent, a token misses a given expert with
    probability 1 - k/e, whatever groups it is limited to; all tokens miss it with the power; the expectation is the sum
    over experts. Real tokens of one text are alike and choose fewer.

    Raises: ValueError for fewer than 0 tokens.
    """
    if tokens < 0:
        raise ValueError(f"tokens={tokens}; 0 or more")
    e, k = config.n_routed_experts, config.n_activated_experts
    return e * (1 - (1 - k / e) ** tokens)


def decode_bytes_per_token(
    config: ModelConfig,
    *,
    context: int,
    batch: int = 1,
    dtype: WeightDtype = "bfloat16",
    cache_dtype: CacheDtype | None = None,
    form: Form = "auto",
    experts: float | None = None,
    as_run: bool = False,
) -> Traffic:
    """Bytes a token moves when each of `batch` sequences, holding `context` tokens with the new one, decodes one more.

    Weights are read once a step and shared by the batch; of the routed experts those that some sequence chose. Every
    sequence reads its own cache: context rows a layer. Multi-token prediction does not run.
    The absorbed form reads wkv_b as the two halves it prepared once, in the compute dtype also where the weights are
    FP8. The expanded form reads wkv_b, writes the keys and values of the whole context and reads them again.

    Args:
        dtype: of the weights; the compute dtype is the same, or BF16 for "fp8".
        cache_dtype: left out: the compute dtype.
        form: how MLA attends; auto: as dsmini does, the form with fewer operations.
        experts: distinct routed experts that a layer's step reads, measured; left out: expected_experts(config, batch).
        as_run: what dsmini's plain code moves, for the least that must be. It reads rows up to a multiple of 64, the
            latent once as keys and once as values; writes and reads again FP8 weights that it dequantises, rows of
            a cache in another dtype, and keys and values that it lays out anew for products in batches; and writes
            and reads attention's logits. In a cache that has room for max_seq_len tokens. At 85M parameters in BF16
            this was 97 to 99 % of what all operations move; the rest is operations on few rows, such as norms.

    Raises: ValueError for a context outside 1 to max_seq_len, a batch below 1, more or fewer experts than can be, and
        as_run of precision="fp8", whose rounding of weights in every step is not counted.
    """
    check_dtype(dtype, ("float32", "bfloat16", "fp8"))
    check_context(config, context)
    check_sizes(batch=batch)
    if as_run and config.precision == "fp8":
        raise ValueError("as_run counts products in the compute dtype, got precision='fp8'; use precision='native'")
    compute = _compute(dtype)
    cache = _cache_dtype(cache_dtype, compute)
    taken = form_taken(config, context, form)
    distinct = _distinct(config, batch, experts)
    step = _Step(config=config, n=batch, compute=compute, fp8=dtype == "fp8", experts=distinct, as_run=as_run)
    attention = _CachedAttention(config=config, context=context, n=batch, compute=compute, cache=cache, as_run=as_run)

    def amounts() -> Amounts:
        for part in main_parts(config):
            halves = part.name == "wkv_b" and taken == "absorbed"
            yield part.module, part.parameters * SIZES[compute] if halves else step.weights(part)
            if part.name == "head":
                yield "activations", batch * config.dim * SIZES[compute]
                yield "logits", batch * config.vocab_size * SIZES[compute]
            elif halves:  # of every head's query into the latent, and of its sum out of it
                width = config.qk_nope_head_dim + 2 * config.kv_lora_rank + config.v_head_dim
                yield "activations", batch * config.n_heads * width * SIZES[compute]
            elif part.name != "wkv_b":  # which reads the cache, and writes keys and values
                yield "activations", step.activations(part)
        for name, amount in attention.absorbed() if taken == "absorbed" else attention.expanded():
            yield name, config.n_layers * amount

    return Traffic.of((name, amount / batch) for name, amount in amounts())


def prefill_bytes_per_token(
    config: ModelConfig,
    *,
    seq_len: int,
    batch: int = 1,
    dtype: WeightDtype = "bfloat16",
    cache_dtype: CacheDtype | None = None,
    experts: float | None = None,
    last_logits: bool = True,
) -> Traffic:
    """Bytes a token moves when `batch` sequences of seq_len tokens go through the model at once into an empty cache.

    At the level of matrices, the least: MLA is expanded, its attention fused, nothing is dequantised in memory.

    Args:
        dtype, cache_dtype, experts: as in decode_bytes_per_token; experts for all batch * seq_len tokens together.
        last_logits: the head reads the last token of each sequence only, as generation does.

    Raises: ValueError for sizes below 1, and more or fewer experts than can be.
    """
    check_dtype(dtype, ("float32", "bfloat16", "fp8"))
    check_sizes(seq_len=seq_len, batch=batch)
    n, compute = batch * seq_len, _compute(dtype)
    row = row_bytes(config, _cache_dtype(cache_dtype, compute))
    distinct = _distinct(config, n, experts)
    step = _Step(config=config, n=n, compute=compute, fp8=dtype == "fp8", experts=distinct)
    heads = batch if last_logits else n

    def amounts() -> Amounts:
        for part in main_parts(config):
            yield part.module, step.weights(part)
            if part.name == "head":
                yield "activations", heads * config.dim * SIZES[compute]
                yield "logits", heads * config.vocab_size * SIZES[compute]
            else:
                yield "activations", step.activations(part)
            if part.per_pair:
                yield ATTENDED, n * _fused(config) * SIZES[compute]
        yield WRITE, config.n_layers * n * row

    return Traffic.of((name, amount / n) for name, amount in amounts())


def training_bytes_per_token(
    config: ModelConfig,
    *,
    seq_len: int,
    batch_size: int = 1,
    dtype: Dtype = "bfloat16",
    optimizer: Optimizer = "adamw",
    moments: Dtype = "float32",
    experts: float | None = None,
) -> Traffic:
    """Bytes a token moves in a training step over batch_size sequences of seq_len tokens, optimizer included.

    At the level of matrices, the least. Forward and the gradient of the input each read a weight; the weight's own
    gradient is written in FP32, once. Forward reads x and writes y, the two gradients read dy twice and x, and write
    dx: three times what a forward moves. Fused attention reads q, k and v and writes its result, then reads all four
    and the result's gradient and writes three. With config.precision "fp8" the products of attention and feed-forwards
    read FP8, codes and scales, and write dtype.
    The optimizer reads and writes the FP32 parameters and its state, and reads the gradient; Muon's own products are
    left out, and so are copies of FP32 parameters in dtype, which an implementation may make once a step.

    Args:
        dtype: of activations, and of weights where products read them.
        experts: distinct routed experts that all tokens of a step choose in a layer; left out: expected_experts.
            Untouched ones have a gradient of zeros, which is written too.

    Raises: ValueError for sizes that activation_bytes refuses, and more or fewer experts than can be.
    """
    check_dtype(dtype, ("float32", "bfloat16"))
    check_sizes(seq_len=seq_len, batch_size=batch_size)
    check_depths(config, seq_len, training=True)
    size, fp8 = SIZES[dtype], config.precision == "fp8"
    n = batch_size * seq_len
    distinct = _distinct(config, n, experts)

    def of(part: Part, tokens: int) -> Amounts:
        visited = min(distinct, float(tokens * config.n_activated_experts))
        step = _Step(config=config, n=tokens, compute=dtype, fp8=fp8, experts=visited)
        yield part.module, (2 if part.visits else 1) * step.weights(part)
        yield "weight gradients", 4 * part.parameters
        if fp8 and part.form == "fp8":
            into, out = (tokens * width for width in part.widths)
            yield "activations", 2 * (into + out) * (1 + 4 / BLOCK) + (into + out) * size
        else:
            yield "activations", 3 * step.activations(part)
        if part.per_pair:
            yield ATTENDED, tokens * (3 * _fused(config) + config.n_heads * config.v_head_dim) * size

    def amounts() -> Amounts:
        for part in main_parts(config):
            yield from of(part, n)
        for depth in range(config.n_mtp_layers):
            for part in mtp_parts(config, depth):
                yield from of(part, batch_size * (seq_len - depth - 1))
        yield "optimizer", 3 * 4 * parameters(config).total
        yield "optimizer", 2 * optimizer_bytes(config, optimizer, moments).total

    return Traffic.of((name, amount / n) for name, amount in amounts())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What the products of n tokens read and write, once each."""

    config: ModelConfig
    n: int
    compute: Dtype
    fp8: bool
    """Whether matrices of attention and feed-forwards are FP8."""
    experts: float
    """Distinct routed experts."""
    as_run: bool = False

    def weights(self, part: Part) -> float:
        """Bytes read of a part's weights, with scales and routing biases."""
        if part.name == "embed":
            return self.n * self.config.dim * self.size(part)
        share = self.experts / part.shape[0] if len(part.shape) == 3 else 1
        numbers = share * math.prod(part.shape) if part.shape else 0
        if not self._codes(part):
            return numbers * self.size(part) + 4 * part.buffers
        again = 2 * SIZES[self.compute] if self.as_run else 0  # dequantised: written and read
        return numbers * (1 + again) + share * 4 * part.scales

    def activations(self, part: Part, rows: int | None = None) -> float:
        """Bytes that its products read of their inputs and write of their results; `rows` in place of n."""
        size = 4 if part.form == "fp32" else SIZES[self.compute]
        return (self.n if rows is None else rows) * sum(part.widths) * size

    def size(self, part: Part) -> int:
        """Bytes of a weight."""
        if part.form == "fp32":
            return 4
        return 1 if self._codes(part) else SIZES[self.compute]

    def _codes(self, part: Part) -> bool:
        return self.fp8 and part.form == "fp8"


@dataclass(frozen=True, kw_only=True, slots=True)
class _CachedAttention:
    """What a layer's attention moves when n sequences decode one token each, its own matrices apart."""

    config: ModelConfig
    context: int
    n: int
    compute: Dtype
    cache: CacheDtype
    as_run: bool

    @property
    def rows(self) -> int:
        return self.n * (rows_read(self.config, self.context) if self.as_run else self.context)

    def absorbed(self) -> Amounts:
        """Every head reads the row as its key, and the latent in it as its value."""
        c = self.config
        width = row_width(c)
        yield from self._reads(width + c.kv_lora_rank)
        yield ATTENDED, self.n * c.n_heads * (width + c.kv_lora_rank) * self._size
        yield from self._logits()

    def expanded(self) -> Amounts:
        """MLA makes keys and values of all rows; a twin has them."""
        c, size = self.config, self._size
        d, v, h = key_width(c), c.v_head_dim, c.n_heads
        yield ATTENDED, self.n * h * (d + v) * size
        yield from self._logits()
        if c.attention != "mla":
            yield from self._reads(row_width(c), laid_out=row_width(c) if self.n > 1 and c.kv_heads > 1 else 0)
            return
        apart = self.as_run and self.n > 1
        # a batch's latents lie apart, unless the whole room is read or they were converted
        strided = apart and self.cache == self.compute and rows_read(c, self.context) < c.max_seq_len
        yield from self._reads(row_width(c), laid_out=c.kv_lora_rank if strided else 0)
        made = h * (c.qk_nope_head_dim + v)
        if not self.as_run:
            yield EXPANDED, 2 * self.rows * made * size
            return
        joined = h * (c.qk_nope_head_dim + d)  # keys are joined with the rotary key: read, written
        heads_apart = 2 * h * (d + v) if apart and h > 1 else 0
        yield EXPANDED, self.rows * (made + joined + heads_apart + h * (d + v)) * size

    def _reads(self, numbers: int, laid_out: int = 0) -> Amounts:
        """Of the cache. `numbers` of a row are read by those who compute with it; as run `laid_out` of them after they
        were copied to where they lie close together."""
        c, size, stored = self.config, self._size, row_bytes(self.config, self.cache)
        yield WRITE, self.n * stored
        if not self.as_run:
            yield READ, self.rows * stored
            return
        copied = 2 * laid_out * size
        if self.cache == self.compute:
            yield READ, self.rows * numbers * size
            yield COPIES, self.rows * copied
            return
        yield READ, self.rows * stored
        width = row_width(c)
        if self.cache == "fp8":
            # taken apart; codes and scales made numbers; joined
            apart = stored + (stored - 2 * c.qk_rope_head_dim) + c.kv_lora_rank * size
            copied += apart + (c.qk_rope_head_dim * (2 + size) if size > 2 else 0) + width * size
        yield COPIES, self.rows * (copied + (width + numbers) * size)

    def _logits(self) -> Amounts:
        """In the compute dtype, then FP32: scaled, masked where rows beyond the context are read, and softmax's."""
        if not self.as_run:
            return
        c = self.config
        masked = rows_read(c, self.context) > self.context
        # of several groups of several heads the mask has to be told apart first: one more copy
        grouped = masked and c.attention != "mla" and 1 < c.kv_heads < c.n_heads
        through_fp32 = 2 * (4 + self._size) if self._size < 4 else 0
        each = 2 * self._size + through_fp32 + 8 * (2 + masked + grouped)
        yield ATTENTION_LOGITS, self.rows * self.config.n_heads * each

    @property
    def _size(self) -> int:
        return SIZES[self.compute]


def _fused(c: ModelConfig) -> int:
    """Numbers a token that attention to fresh keys reads and writes: queries, keys, values, sums."""
    kv_heads = c.n_heads if c.attention == "mla" else c.kv_heads
    d, v = key_width(c), c.v_head_dim
    return c.n_heads * (d + v) + kv_heads * (d + v)


def _compute(dtype: WeightDtype) -> Dtype:
    return "bfloat16" if dtype == "fp8" else dtype


def _cache_dtype(cache_dtype: CacheDtype | None, compute: Dtype) -> CacheDtype:
    return compute if cache_dtype is None else cache_dtype


def _distinct(c: ModelConfig, tokens: int, experts: float | None) -> float:
    """The number of distinct experts that was given, if it can be, or the expected."""
    if experts is None:
        return expected_experts(c, tokens)
    most = min(c.n_routed_experts, tokens * c.n_activated_experts)
    if not c.n_activated_experts <= experts <= most:
        raise ValueError(
            f"experts={experts} distinct ones for {tokens} tokens that choose {c.n_activated_experts} of "
            f"{c.n_routed_experts}; use {c.n_activated_experts} to {most}, or leave it out"
        )
    return experts
