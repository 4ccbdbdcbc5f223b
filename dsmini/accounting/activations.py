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

What an implementation saves beyond that is measured, not predicted: softmax weights where logits are explicit, keys and
values padded to one width or repeated for grouped heads, padded rows of experts.

Worked example, DeepSeek-V3 at 4096 tokens in BF16: fused attention saves 128 * ((2 * 192 + 2 * 128) * 2 + 4) = 164,352
bytes a token and layer, which is 673 MB a layer; explicit weights would be 128 * 4096 * 2 = 1,048,576 more.

Source: DeepSeek-V3 report, sections 3.3.3 and 3.2.3; FlashAttention (arXiv 2205.14135), section 3.1.
"""

from collections.abc import Iterator

from dsmini.accounting.checks import check_depths, check_dtype, check_sizes
from dsmini.accounting.table import Bytes
from dsmini.accounting.tensors import BLOCK, INDEXER, MTP, OVER, SIZES, Dtype, Stage, key_width
from dsmini.config import ModelConfig

Amounts = Iterator[tuple[str, int]]
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
    saved = _Saved(config, batch_size, dtype, kernels and config.precision == "native")
    if dsa_stage == "warmup":
        return Bytes.of(saved.warmup(seq_len, recompute))
    return Bytes.of(saved.recomputed(seq_len) if recompute else saved.whole(seq_len))


class _Saved:
    """Bytes for one config, batch and dtype; sequence lengths differ between depths of multi-token prediction."""

    def __init__(self, config: ModelConfig, batch_size: int, dtype: Dtype, kernels: bool) -> None:
        self.c, self.b, self.kernels = config, batch_size, kernels
        self.e, self.fp8 = SIZES[dtype], config.precision == "fp8"

    def whole(self, s: int) -> Amounts:
        """Yield all that a forward saves."""
        c = self.c
        yield from self.ends(s)
        for layer in range(c.n_layers):
            yield from self.block(layer, s)
        for depth in range(c.n_mtp_layers):
            t = s - depth - 1
            yield MTP + STATE, self.b * t * (c.dim * self.e + 4 + 4)  # enorm and the inverses of enorm and hnorm
            yield MTP + "projection", self.b * t * 2 * c.dim * self.e
            yield from self.mtp_ends(depth, t)
            for name, amount in self.block(c.n_layers + depth, t):
                yield MTP + name, amount

    def recomputed(self, s: int) -> Amounts:
        """Yield inputs of blocks, what lies outside of them, and the largest block."""
        c = self.c
        yield from self.ends(s)
        yield "inputs of blocks", c.n_layers * self.b * s * c.dim * self.e
        for depth in range(c.n_mtp_layers):
            t = s - depth - 1
            yield MTP + "inputs of blocks", self.b * t * c.dim * self.e  # the embedding; the state is saved anyway
            yield from self.mtp_ends(depth, t)
        for layer in range(c.n_layers + c.n_mtp_layers):
            t = s - max(0, layer + 1 - c.n_layers)
            if c.is_moe(layer):
                yield "gates", self.scores(self.b * t)
        yield (
            "one block, made again",
            max(sum(amount for _, amount in self.block(layer, s)) for layer in {0, c.n_layers - 1}),
        )

    def warmup(self, s: int, recompute: bool) -> Amounts:
        """Yield what the indexers save, and their inputs; with recomputation inputs of blocks, and one indexer."""
        c, lengths = self.c, [s] * self.c.n_layers + [s - depth - 1 for depth in range(self.c.n_mtp_layers)]
        for t in dict.fromkeys(lengths):
            yield "rotary tables", self.table(t)
        for t in lengths:
            if recompute:
                yield "inputs of blocks", self.b * t * c.dim * self.e
        for t in lengths[:1] if recompute else lengths:
            yield from self.indexer(self.b * t)
            if not self.fp8:
                yield "attention", self.b * t * (c.dim + (c.q_lora_rank or 0)) * self.e

    def ends(self, s: int) -> Amounts:
        """Yield what is saved before and after the blocks."""
        c, n = self.c, self.b * s
        yield "tokens", 8 * n
        yield "rotary tables", self.table(s)
        if c.embed_norm:
            yield STATE, self.normed(n, c.dim)
        yield STATE, self.normed(n, c.dim)
        yield "losses", n * c.dim * self.e
        if c.n_mtp_layers and c.mtp_input == "post_norm":
            yield MTP + STATE, n * c.dim * self.e

    def mtp_ends(self, depth: int, t: int) -> Amounts:
        """Yield a depth's final norm, loss, and what it gives to the next."""
        c, n = self.c, self.b * t
        yield "rotary tables", self.table(t)
        if c.embed_norm:
            yield MTP + STATE, self.normed(n, c.dim)
        yield MTP + STATE, self.normed(n, c.dim)
        yield MTP + "losses", n * c.dim * self.e
        if depth + 1 < c.n_mtp_layers and c.mtp_input == "post_norm":
            yield MTP + STATE, n * c.dim * self.e

    def block(self, layer: int, s: int) -> Amounts:
        """Yield a block, from the input of its first norm to the products of its last."""
        c, n = self.c, self.b * s
        yield STATE, 2 * self.normed(n, c.dim)
        yield from self.attention(n)
        if not c.is_moe(layer):
            yield from self.swiglu("dense feed-forward", n, c.inter_dim)
            yield "dense feed-forward", n * self.read(c.dim)
            return
        # the gate reads FP32: a copy unless x is FP32, in which case experts read the same x
        yield "gates", (n * c.dim * 4 if self.e < 4 else 0) + self.gate(n)
        rows = n * c.n_activated_experts
        if self.kernels:
            yield "routed experts", rows * 2 * c.moe_inter_dim * self.e
        else:
            # their inputs and results, which token a row is of, and where a visit's row is
            yield "routed experts", rows * (self.read(c.dim) + c.dim * self.e + 8 + 8)
            yield from self.swiglu("routed experts", rows, c.moe_inter_dim)
        reads_x = self.kernels or (self.e == 4 and not self.fp8)
        if c.n_shared_experts or reads_x:
            yield "shared experts" if c.n_shared_experts else "gates", n * self.read(c.dim)
        if self.e == 4 and self.fp8:
            yield "gates", n * c.dim * 4
        if c.n_shared_experts:
            yield from self.swiglu("shared experts", n, c.n_shared_experts * c.moe_inter_dim)

    def attention(self, n: int) -> Amounts:
        """Yield the inputs of the products, then what lies between them (report, section 2.1.1)."""
        c = self.c
        yield "attention", n * self.read(c.dim)
        if c.is_mla:
            if c.q_lora_rank is not None:
                yield STATE, self.normed(n, c.q_lora_rank)
                yield "attention", n * self.read(c.q_lora_rank)
            yield STATE, self.normed(n, c.kv_lora_rank) + n * c.qk_rope_head_dim * self.e
            yield "attention", n * self.read(c.kv_lora_rank)
        d, v, h = key_width(c), c.v_head_dim, c.n_heads
        if c.qk_norm:
            yield STATE, n * (h + c.kv_heads) * (d * self.e + 4)
        # fused: queries and result, keys and values, and a number a query for the softmax
        yield OVER, n * ((h + c.kv_heads) * (d + v) * self.e + h * 4)
        if self.fp8:  # wo reads the result in E5M6, 12 bits a number (report, section 3.3.3)
            yield "attention", n * (12 * -(-h * v // 8) + 4 * -(-h * v // BLOCK))
        if c.attention == "dsa":
            yield from self.indexer(n)

    def indexer(self, n: int) -> Amounts:
        """Yield an indexer's own; it reads what attention reads, in FP8 as codes of its own."""
        c, h, d = self.c, self.c.index_n_heads or 0, self.c.index_head_dim or 0
        if self.e < 4 or self.fp8:
            yield INDEXER, n * 4 * c.dim
        if self.fp8:
            yield INDEXER, n * (self.read(c.dim) + self.read(c.q_lora_rank or c.dim))
        yield INDEXER, n * (4 * d + 8)
        yield INDEXER, n * ((h + 1) * d * self.e + 4 * h)

    def swiglu(self, module: str, n: int, f: int) -> Amounts:
        """Yield w1's and w3's results, silu and the product; in FP8 the results as codes, the rest is made again."""
        yield module, n * (2 * self.read(f) if self.fp8 else 4 * f * self.e)

    def gate(self, n: int) -> int:
        """Return bytes of scores, of their order, of which the choice is a part, and of the weights.

        Normalised weights are saved twice, divided and undivided, with their sum.
        """
        weights = 8 * self.c.n_activated_experts + 4 if self.c.norm_topk_prob else 4 * self.c.n_activated_experts
        return self.scores(n) + n * (8 * self.c.n_routed_experts + weights)

    def scores(self, n: int) -> int:
        """Return bytes of the scores, and of their sum, which the balance loss divides by."""
        return n * (4 * self.c.n_routed_experts + 4)

    def read(self, width: int) -> int:
        """Return the bytes that are saved of one row that a product reads."""
        return width + 4 * -(-width // BLOCK) if self.fp8 else width * self.e

    def normed(self, n: int, width: int) -> int:
        """Return the bytes of a norm's input and the inverse of its root mean square."""
        return n * (width * self.e + 4)

    def table(self, s: int) -> int:
        """Return the bytes of cosines and sines in FP32, one of each a pair."""
        return 4 * s * (self.c.qk_rope_head_dim if self.c.is_mla else self.c.qk_nope_head_dim)
