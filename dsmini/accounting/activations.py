"""Bytes of activations that training saves for backward: a lower bound, exact but for attention's implementation.

Followed through the layers tensor by tensor, as autograd saves them when each layer runs as it is written: every
storage once, however many operations saved it. For each of n tokens, in numbers of e bytes,

    norm               its input, and the inverse of its root mean square in FP32
    product            its input, once for all products that read it
    attention          queries, keys, values, its result, and one FP32 number for each query and head: what a fused
                       kernel (flash attention) needs to make the softmax again
    SwiGLU             both results of the products, silu of one, and their product
    gate               scores, their order, the chosen weights
    indexer            an FP32 copy of the hidden state, for the weights of heads; in FP32 the input of the key's norm,
                       with its mean and deviation; the gradients of its loss, which are made in forward
    routed experts     a row for each visit: its input and its result; with kernels only both results of the products

In FP8 the inputs of products are codes and scales, and SwiGLU is made again from its two inputs.

In backward nothing is computed again; with `full` recomputation whole blocks are; with `selective`, as in DeepSeek-V3,
norms, MLA's up-projections and SwiGLU's product. Then attention's result is saved once, and results of experts are not
saved, because the gradient of an expert's weight is also the product of SwiGLU's result with its gradient [assumed].

What an implementation saves beyond that is measured, not predicted: softmax weights where logits are explicit, keys and
values padded to one width or repeated for grouped heads, padded rows of experts.

Worked example, DeepSeek-V3 at 4096 tokens in BF16: fused attention saves 128 * ((2 * 192 + 2 * 128) * 2 + 4) = 164,352
bytes a token and layer, which is 673 MB a layer; explicit weights would be 128 * 4096 * 2 = 1,048,576 more.

Source: DeepSeek-V3 report, sections 3.3.3 and 3.2.3; FlashAttention (arXiv 2205.14135), section 3.1.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsmini.accounting.tensors import (
    BLOCK,
    INDEXER,
    MTP,
    OVER,
    SIZES,
    Bytes,
    Dtype,
    Stage,
    blocks,
    ceiling,
    check_depths,
    check_dtype,
    check_sizes,
    key_width,
    largest,
    total,
)
from dsmini.config import ModelConfig

Amounts = Iterator[tuple[str, Any]]
Recompute = Literal["none", "selective", "full"]
Part = Literal["embedding", "dense", "moe", "head", "state", "mtp"]
STATE = "residual stream and norms"


def activation_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    recompute: bool = False,
    kernels: bool = False,
    dsa_stage: Stage = "sparse",
) -> Bytes:
    """Return the bytes of activations that Transformer.losses saves for backward, multi-token prediction's included.

    With config.precision "fp8" the inputs of the products in attention and feed-forwards are FP8 codes and scales
    (E5M6 for the one after attention), as is SwiGLU's; attention's inside, the norms and the gates are as before.

    Not in it: copies of weights in the compute dtype and the head's gradient, which are training_bytes's; what exists
    only for a moment, such as an operation's result next to its inputs.

    Lower bound. With fused attention, keys as wide as values and a head of keys for each head of queries, what is
    really saved is the same within 0.1 %, tested; a few numbers a sequence and an expert are left out.

    Args:
        dtype: of activations.
        recompute: only the blocks' inputs are saved, and, when backward is in it, the activations of one block, the
            largest.
        kernels: routed experts are trained by a CPU's kernels, which save less than plain PyTorch
            (functional/trained_experts.py); they do not serve simulated FP8.
        dsa_stage: the stage in which indexers learn. In the warm-up nothing else saves anything.

    Raises: ValueError for sizes below 1, and sequences too short for the depths of multi-token prediction.
    """
    check_dtype(dtype, ("float32", "bfloat16"))
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    check_depths(config, seq_len)
    saved = Saved(
        c=config,
        size=SIZES[dtype],
        fp8=config.precision == "fp8",
        recompute="full" if recompute else "none",
        kernels=kernels and config.precision == "native",
    )
    amounts = _warmup(saved, seq_len) if dsa_stage == "warmup" else _amounts(saved, seq_len)
    tables = (("rotary tables", rotary_table(config, s)) for s in _tables(config, seq_len, dsa_stage))
    return Bytes.of([*((name, batch_size * amount) for name, amount in amounts), *tables])


def _amounts(saved: "Saved", seq_len: int) -> Amounts:
    """Yield the bytes of one sequence by name."""
    for prefix, part, tokens in passes(saved.c, seq_len):
        for name, amount in saved.part(part):
            yield (name if name in UNMARKED else prefix + name), tokens * amount
    if saved.recompute == "full":
        yield "one block, made again", seq_len * saved.largest_block()


UNMARKED = ("gates", "inputs of blocks")
"""Parts of recomputed blocks that multi-token prediction adds to those of the main model."""


def passes(c: ModelConfig, seq_len: Any) -> Iterator[tuple[str, Part, Any]]:
    """Yield the parts that the tokens of a sequence pass: the prefix of the names, the part, and the tokens.

    Depth k of multi-token prediction has seq_len - k positions. The state that a depth gives to the next is saved too.
    """
    dense, moe, mtp_dense, _ = blocks(c)
    yield "", "embedding", seq_len
    yield "", "dense", dense * seq_len
    yield "", "moe", moe * seq_len
    yield "", "head", seq_len
    states = c.mtp_input == "post_norm"
    if c.n_mtp_layers and states:
        yield MTP, "state", seq_len
    for depth in range(c.n_mtp_layers):
        positions = seq_len - (depth + 1)
        yield MTP, "mtp", positions
        yield MTP, "moe" if depth >= mtp_dense else "dense", positions
        if states and depth + 1 < c.n_mtp_layers:
            yield MTP, "state", positions


def _tables(c: ModelConfig, seq_len: int, stage: Stage) -> list[int]:
    """Return the lengths of the rotary tables."""
    lengths = [seq_len, *(seq_len - depth - 1 for depth in range(c.n_mtp_layers))]
    return list(dict.fromkeys(lengths)) if stage == "warmup" else lengths


def rotary_table(c: ModelConfig, positions: Any) -> Any:
    """Return the bytes of cosines and sines in FP32, one of each a pair."""
    return positions * (4 * (c.qk_rope_head_dim if c.is_mla else c.qk_nope_head_dim))


def _warmup(saved: "Saved", seq_len: int) -> Amounts:
    """Yield what the indexers save, and their inputs; with recomputation inputs of blocks, and one indexer."""
    c = saved.c
    again = saved.recompute == "full"
    depths = [(MTP, seq_len - depth - 1) for depth in range(c.n_mtp_layers)]
    if again:
        for tokens in (c.n_layers * seq_len, *(t for _, t in depths)):
            yield "inputs of blocks", tokens * saved.row(c.dim)
    for tokens in [seq_len] if again else [c.n_layers * seq_len, *(t for _, t in depths)]:
        for name, amount in saved.indexer():
            yield name, tokens * amount
        if not saved.fp8:
            yield "attention", tokens * saved.row(c.dim + (c.q_lora_rank or 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Bytes that a token saves in each part of a model."""

    c: ModelConfig
    size: int
    """Bytes of a number between products."""
    fp8: bool
    """Inputs of the products in attention and feed-forwards are FP8."""
    recompute: Recompute = "none"
    kernels: bool = False
    """Routed experts are trained by a CPU's kernels."""

    def part(self, part: Part) -> Amounts:
        """Yield what a token saves in a part: of a model's ends, a block, or multi-token prediction's ends."""
        c = self.c
        if part == "embedding":
            yield "tokens", 8
            if c.embed_norm:
                yield STATE, self.normed(c.dim)
        elif part == "head":
            yield STATE, self.normed(c.dim)
            yield "losses", self.row(c.dim)
        elif part == "state":
            yield STATE, self.row(c.dim)
        elif part == "mtp":
            yield from self.mtp()
        elif self.recompute == "full":
            yield "inputs of blocks", self.row(c.dim)
            if part == "moe":
                yield "gates", self.scores()
        else:
            yield STATE, 2 * self.normed(c.dim)
            yield from self.attention()
            yield from self.moe() if part == "moe" else self.dense()

    def mtp(self) -> Amounts:
        """Yield a depth's own norms, projection and loss."""
        c = self.c
        if self.recompute == "none":
            yield STATE, self.normed(c.dim) + 4  # enorm, and the inverse of hnorm
            yield "projection", 2 * self.row(c.dim)
        elif self.recompute == "selective":
            yield "projection", 3 * self.row(c.dim)
        if c.embed_norm:
            yield STATE, self.normed(c.dim)
        yield STATE, self.normed(c.dim)
        yield "losses", self.row(c.dim)

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
        if c.attention == "dsa":
            yield from self.indexer()

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

    def moe(self) -> Amounts:
        """Yield the gate, the routed experts at perfect balance, and the shared ones."""
        c, none = self.c, self.recompute == "none"
        yield "gates", self.gate()
        if none and (self.size < 4 or self.fp8):  # the gate reads FP32: a copy, unless experts read FP32 too
            yield "gates", 4 * c.dim
        if self.kernels:
            yield "routed experts", c.n_activated_experts * (2 * self.row(c.moe_inter_dim))
        else:
            # their inputs and results, which token a row is of, and where a visit's row is
            result = self.row(c.dim) if none else 0
            visit = self.read(c.dim) + result + 8 + 8 + self.swiglu(c.moe_inter_dim)
            yield "routed experts", c.n_activated_experts * visit
        if none and (c.n_shared_experts or self.kernels or (self.size == 4 and not self.fp8)):
            yield "shared experts" if c.n_shared_experts else "gates", self.read(c.dim)
        if c.n_shared_experts:
            yield "shared experts", self.swiglu(c.n_shared_experts * c.moe_inter_dim)

    def gate(self) -> Any:
        """Return bytes of scores, of their order, of which the choice is a part, and of the weights.

        Normalised weights are saved twice, divided and undivided, with their sum.
        """
        k = self.c.n_activated_experts
        return self.scores() + 8 * self.c.n_routed_experts + (8 * k + 4 if self.c.norm_topk_prob else 4 * k)

    def scores(self) -> Any:
        """Return bytes of the scores, and of their sum, which the balance loss divides by."""
        return 4 * self.c.n_routed_experts + 4

    def swiglu(self, f: Any) -> Any:
        """Return w1's and w3's results, silu and the product; in FP8 the results as codes, the rest is made again."""
        if self.fp8:
            return 2 * self.read(f)
        return (4 if self.recompute == "none" else 2) * self.row(f)

    def row(self, width: Any) -> Any:
        """Return the bytes of a row between products."""
        return width * self.size

    def read(self, width: Any) -> Any:
        """Return the bytes that are saved of one row that a product reads."""
        return width + 4 * ceiling(width, BLOCK) if self.fp8 else self.row(width)

    def normed(self, width: Any) -> Any:
        """Return the bytes of a norm's input, and of the inverse of its root mean square unless it is made again."""
        return self.row(width) if self.recompute == "selective" else self.row(width) + 4

    def norm_result(self, width: Any) -> Any:
        """Return the bytes of a norm's result, which a product reads; none if it is made again."""
        return self.read(width) if self.recompute == "none" else 0

    def largest_block(self) -> Any:
        """Return the bytes of a token of the block whose activations are made again in backward, the largest."""
        whole, c = replace(self, recompute="none"), self.c
        kinds: list[Part] = [
            *(["dense"] if c.n_dense_layers else []),
            *(["moe"] if c.n_dense_layers < c.n_layers else []),
        ]
        return functools.reduce(largest, (total(amount for _, amount in whole.part(kind)) for kind in kinds))
