"""Bytes that a token must move between memory and what computes: a lower bound, and where memory binds, the time.

Counted at the level of matrices: every product reads its operands once and writes its result once. Norms, rotary
embedding, SwiGLU, residuals, softmax and the gate's choice are left out, as if they rode on the products. Attention too
is one operation that reads queries, keys and values and writes its sums, as a fused kernel does. Whatever an
implementation moves beyond that, such as copies and rows that no token needs, dsmini.measure.counting measures.
Measured over this bound is what a kernel can still win.

Worked example, DeepSeek-V3 in FP8 that decodes a token of one sequence at a context of 4096:

    routed experts    58 * 8 * 3 * 7168 * 2048 codes and their scales    20.44 GB
    attention         4 matrices in FP8, wkv_b's halves in BF16          12.44 GB
    other weights     shared experts, head, dense layers, gates           6.03 GB
    cache read        4096 * 70,272                                       0.29 GB
    activations       inputs and results of all products                  0.08 GB
    total                                                                39.27 GB

256 sequences share the weights: 2.99 GB a token, of which 2.55 GB are routed experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dsmini.accounting.flops import by_depth, is_absorbed
from dsmini.accounting.memory import (
    CacheDtype,
    Optimizer,
    kv_bytes_per_token,
    optimizer_bytes,
    row_bytes,
    row_width,
    rows_read,
)
from dsmini.accounting.tensors import (
    BLOCK,
    ENGRAM_TABLES,
    SCORES,
    SIZES,
    Bytes,
    Dtype,
    TensorUse,
    WeightDtype,
    check_context,
    check_dtype,
    check_sizes,
    check_training,
    collect,
    engram_width,
    key_heads,
    key_width,
    main_tensors,
    parameters,
    tensors,
    value_width,
)
from dsmini.config import ModelConfig
from dsmini.config.fields import require

Amounts = Iterator[tuple[str, float]]
READ, WRITE, EXPANDED, ATTENDED = "cache read", "cache write", "expanded keys and values", "attention operands"
NO_WEIGHTS = {READ, WRITE, EXPANDED, ATTENDED, "activations", "logits", "weight gradients", "optimizer"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic(Bytes):
    """Bytes moved a token, by part: a module's name stands for its weights, read once a step, whatever the batch."""

    @property
    def weights(self) -> float:
        """Bytes of the parts that are weights."""
        return sum(amount for name, amount in self.by_part.items() if name not in NO_WEIGHTS)


def decode_bytes_per_token(
    config: ModelConfig,
    *,
    context: int,
    batch: int = 1,
    dtype: WeightDtype = "bfloat16",
    cache_dtype: CacheDtype | None = None,
    experts: float | None = None,
) -> Traffic:
    """Return the bytes a token must move when each of `batch` sequences of `context` tokens decodes one more.

    The context includes the new token. The batch shares the weights, of the routed experts those that some sequence
    chose. Every sequence reads its own cache: context rows a layer. Multi-token prediction does not run.
    The absorbed form reads wkv_b as the two halves it prepared once, in the compute dtype also where the weights are
    FP8. The expanded form, that of qk_norm, reads wkv_b, writes the keys and values of the whole context and reads them
    again.

    Args:
        dtype: of the weights; the compute dtype is the same, or BF16 for "fp8".
        cache_dtype: left out: the compute dtype.
        experts: distinct routed experts that a layer's step reads; left out: expected_experts, those of a mean step.

    Raises: ValueError for a context outside 1 to max_seq_len, a batch below 1, and more or fewer experts than can be.
    """
    check_context(config, context)
    check_sizes(batch=batch)
    c, products = config, _products(config, batch, dtype, experts)
    size, absorbed = products.size, is_absorbed(c)
    of_cache = cache_dtype or products.compute
    window = c.n_layers * row_bytes(c, of_cache) if c.compress_ratios else 0  # besides the entries

    def amounts() -> Amounts:
        for use in main_tensors(c):
            if use.name == "wkv_b" and absorbed:  # two halves: of every head's query into the latent, and of its sum
                yield use.module, use.parameters * size
                width = c.qk_nope_head_dim + 2 * c.kv_lora_rank + c.v_head_dim
                yield "activations", batch * use.times * c.n_heads * width * size
            elif use.name == "wkv_b":  # which reads the cache, and writes keys and values
                yield use.module, products.weights(use)
            else:
                yield from products.of(use, batch)
            if use.kind == SCORES:
                yield ATTENDED, batch * use.times * use.per_pair * size
        yield WRITE, batch * (window + kv_bytes_per_token(c, of_cache))
        yield READ, batch * rows_read(c, context, of_cache)
        # absorbed, every head reads the row as its key, and the latent in it as its value
        widths = row_width(c) + c.kv_lora_rank if absorbed else key_width(c) + value_width(c)
        yield ATTENDED, c.n_layers * batch * c.n_heads * widths * size
        if c.is_mla and not absorbed:
            made = c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
            yield EXPANDED, c.n_layers * 2 * batch * context * made * size

    return _per_token(amounts(), batch)


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
    """Return the bytes a token must move when `batch` sequences of seq_len tokens go into an empty cache at once.

    MLA is expanded, its attention fused, nothing is dequantised in memory.

    Args:
        dtype, cache_dtype, experts: as in decode_bytes_per_token; experts for all batch * seq_len tokens together.
        last_logits: the head reads the last token of each sequence only, as generation does.

    Raises: ValueError for sizes below 1, and more or fewer experts than can be.
    """
    check_sizes(seq_len=seq_len, batch=batch)
    n = batch * seq_len
    products = _products(config, n, dtype, experts)

    def amounts() -> Amounts:
        for use in main_tensors(config):
            yield from products.of(use, batch if last_logits else n)
            if use.per_pair:
                yield ATTENDED, n * use.times * _fused(config, use) * products.size
        yield WRITE, n * kv_bytes_per_token(config, cache_dtype or products.compute)

    return _per_token(amounts(), n)


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
    """Return the bytes a token must move in a training step over batch_size sequences of seq_len tokens.

    Forward and the gradient of the input each read a weight; the weight's own gradient is written in FP32, once.
    Forward reads x and writes y, the two gradients read dy twice and x, and write dx: three times what a forward moves.
    Fused attention reads q, k and v and writes its result, then reads all four and the result's gradient and writes
    three. With config.precision "fp8" the products of attention and feed-forwards read FP8, codes and scales, and
    write dtype.
    The optimizer reads and writes the FP32 parameters and its state, and reads the gradient; Muon's own products are
    left out, and so are copies of FP32 parameters in dtype, which an implementation may make once a step.

    Args:
        dtype: of activations, and of weights where products read them.
        experts: distinct routed experts that all tokens of a step choose in a layer; left out: expected_experts.
            Untouched ones have a gradient of zeros, which is written too.

    Raises: ValueError for sizes that activation_bytes refuses, and more or fewer experts than can be.
    """
    check_training(config, batch_size, seq_len, dtype)
    size, fp8, n = SIZES[dtype], config.precision == "fp8", batch_size * seq_len
    distinct = distinct_experts(config, n, experts)

    def of(use: TensorUse, tokens: int) -> Amounts:
        visited = min(distinct, float(tokens * config.n_activated_experts))
        products = _Products(config=config, n=tokens, compute=dtype, fp8=fp8, experts=visited)
        yield use.module, (2 if use.visits else 1) * products.weights(use)
        yield "weight gradients", 4 * use.parameters
        moved = products.activations(use)
        # codes and their scales are read twice, and results are written in dtype
        yield "activations", moved * (2 * (1 + 4 / BLOCK) / size + 1 if fp8 and use.form == "fp8" else 3)
        if use.per_pair:
            times = 1 if use.kind == SCORES else 3  # backward writes no result, and reads its gradient
            yield ATTENDED, times * tokens * use.times * _fused(config, use) * size

    def amounts() -> Amounts:
        for use in tensors(config):
            for each, positions in by_depth(use, seq_len):
                yield from of(each, batch_size * positions)
        yield "optimizer", 3 * 4 * parameters(config).total
        yield "optimizer", 2 * optimizer_bytes(config, optimizer, moments).total

    return _per_token(amounts(), n)


def _per_token(amounts: Amounts, tokens: int) -> Traffic:
    return Traffic.of((name, amount / tokens) for name, amount in collect(amounts).items())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Products:
    """Bytes that the products of n tokens read and write, once each."""

    config: ModelConfig
    n: int
    compute: Dtype
    """Dtype of activations, and of weights that are not FP8."""
    fp8: bool
    """Matrices of attention and feed-forwards are FP8."""
    experts: float
    """Number of distinct routed experts in a layer."""

    @property
    def size(self) -> int:
        """Bytes of a number in the compute dtype."""
        return SIZES[self.compute]

    def weights(self, use: TensorUse) -> float:
        """Return the bytes read of a weight, with scales and routing biases."""
        if use.name == "embed":
            return self.n * self.config.dim * self.size
        if use.kind == ENGRAM_TABLES:
            return self.n * engram_width(self.config) * self.size
        if use.name == "tid2eid":  # of a hash layer's table a token reads a row of some bytes, which is left out
            return 0
        read = self.experts if use.kind == "routed experts" else 1
        return use.times * read * use.bytes("fp8" if self.fp8 else self.compute)

    def activations(self, use: TensorUse) -> float:
        """Return the bytes that its products read of their inputs and write of their results."""
        return self.n * sum(use.widths) * (4 if use.form == "fp32" else self.size)

    def of(self, use: TensorUse, rows: int) -> Amounts:
        """Yield what a forward moves of a tensor; the head for the rows that it is asked for."""
        yield use.module, self.weights(use)
        if use.name != "head":
            yield "activations", self.activations(use)
        else:
            yield "activations", rows * self.config.dim * self.size
            yield "logits", rows * self.config.vocab_size * self.size


def _products(config: ModelConfig, n: int, dtype: WeightDtype, experts: float | None) -> _Products:
    """Return the products of n tokens with weights of a dtype; FP8's are computed in BF16."""
    check_dtype(dtype, ("float32", "bfloat16", "fp8"))
    compute: Dtype = "float32" if dtype == "float32" else "bfloat16"
    distinct = distinct_experts(config, n, experts)
    return _Products(config=config, n=n, compute=compute, fp8=dtype == "fp8", experts=distinct)


def _fused(c: ModelConfig, use: TensorUse) -> int:
    """Return the numbers a token that attention to fresh keys reads and writes: queries, keys, values, sums.

    The indexer reads queries and its one key; topk_indices are left out, as the mask is.
    """
    if use.kind == SCORES:
        return use.per_pair + (c.index_head_dim or 0)
    if use.name == "entries":  # V4 attends to them with the window's keys
        return 0
    return (c.n_heads + key_heads(c)) * (key_width(c) + value_width(c))


def expected_experts(config: ModelConfig, tokens: int) -> float:
    """Return how many of a layer's routed experts this many tokens choose together: e (1 - (1 - k/e)^tokens).

    Derivation: with uniform routing, all experts alike and tokens independent, a token misses a given expert with
    probability 1 - k/e, whatever groups it is limited to; all tokens miss it with the power; the expectation is the sum
    over experts. Real tokens of one text are alike and choose fewer. DeepSeek-V3: one token reads 8 experts of a layer,
    32 tokens 163, 256 tokens all 256 but for a tenth of one.

    Raises: ValueError for fewer than 0 tokens.
    """
    require(tokens >= 0, f"tokens={tokens} is negative; use 0 or more")
    e, k = config.n_routed_experts, config.n_activated_experts
    return e * (1 - (1 - k / e) ** tokens)


def distinct_experts(c: ModelConfig, tokens: int, experts: float | None) -> float:
    """Return the number of distinct experts that was given, if it can be, or the expected one."""
    if experts is None:
        return expected_experts(c, tokens)
    e, k = c.n_routed_experts, c.n_activated_experts
    most = min(e, tokens * k)
    fix = f"use {k} to {most}, or leave it out"
    require(k <= experts <= most, f"experts={experts} distinct ones for {tokens} tokens that choose {k} of {e}; {fix}")
    return experts
