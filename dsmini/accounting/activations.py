"""Bytes that training keeps for backward, and all that it holds.

Followed through the layers tensor by tensor, as autograd saves them in eager mode on a CPU: each storage once, however
many operations saved it. With torch.compile or another device other tensors are kept.
"""

from collections.abc import Iterator

from dsmini.accounting.flops import EXPLICIT, check_depths, check_sizes, expert_rows, explicit_pairs
from dsmini.accounting.memory import Optimizer, check_dtype, gradient_bytes, optimizer_bytes, weight_bytes
from dsmini.accounting.table import Bytes
from dsmini.accounting.tensors import BLOCK, MTP, OVER, SIZES, Dtype, key_width, parts
from dsmini.config import ModelConfig

Amounts = Iterator[tuple[str, int]]
STATE = "residual stream and norms"


def activation_bytes(
    config: ModelConfig, *, batch_size: int, seq_len: int, dtype: Dtype = "bfloat16", recompute: bool = False
) -> Bytes:
    """Bytes of activations that Transformer.losses keeps for backward, multi-token prediction's included.

    With config.precision "fp8" the inputs of the products in attention and feed-forwards are FP8 codes and scales
    (E5M6 for the one after attention), as is SwiGLU's; attention's inside, the norms and the gates are as before.

    Not in it: copies of weights in the compute dtype and the head's gradient, which are training_bytes's; what exists
    only for a moment, such as an operation's result beside its inputs.

    How exact: within 0.1 % of the storages that are kept, measured by tests/accounting. What is left out
    is a few numbers a sequence and an expert.

    Args:
        dtype: of activations.
        recompute: only the blocks' inputs are kept, and one block's activations, the largest's, when backward is in it.

    Raises: ValueError for sizes below 1, and sequences too short for the depths of multi-token prediction.
    """
    check_dtype(dtype, ("float32", "bfloat16"))
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    check_depths(config, seq_len, training=True)
    kept = _Kept(config, batch_size, dtype)
    return Bytes.of(kept.recomputed(seq_len) if recompute else kept.whole(seq_len))


def training_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    optimizer: Optimizer = "adamw",
    moments: Dtype = "float32",
    recompute: bool = False,
) -> Bytes:
    """Bytes that are held at the end of a forward in training: FP32 parameters and gradients, the optimizer's state,
    and all that is kept for backward: activations, the copies of weights that autograd keeps, and the head's gradient,
    which the chunked cross-entropy makes in the forward.

    The peak of a step is higher by the operation at work, such as an optimizer's temporary tensors.

    Args:
        batch_size: sequences that go through the model at a time: with gradient accumulation a part of the step's.
        dtype, recompute: as in activation_bytes.
        optimizer, moments: as in optimizer_bytes.
    """
    activations = activation_bytes(config, batch_size=batch_size, seq_len=seq_len, dtype=dtype, recompute=recompute)
    return Bytes.of(
        [
            ("parameters", weight_bytes(config, "float32").total),
            ("gradients", gradient_bytes(config).total),
            ("optimizer", optimizer_bytes(config, optimizer, moments).total),
            ("activations", activations.total),
            ("weights kept for backward", _weights_kept(config, dtype)),
            ("the head's gradient", 4 * (1 + config.n_mtp_layers) * config.vocab_size * config.dim),
        ]
    )


def _weights_kept(c: ModelConfig, dtype: Dtype) -> int:
    """Of matrices in another dtype than the FP32 they are held in, and of experts' w1 and w3, joined."""

    def amount(name: str, module: str, numbers: int, scales: int, in_block: bool) -> int:
        if in_block and c.precision == "fp8":
            return numbers + 4 * scales
        joined = module.endswith("routed experts") and name != "w2"
        return numbers * SIZES[dtype] if joined or dtype != "float32" else 0

    return sum(
        amount(part.name, part.module, part.parameters, part.scales, part.form == "fp8")
        for part in parts(c)
        if part.form == "fp8" or part.name == "eh_proj"
    )


class _Kept:
    """Counts for one config, batch and dtype; sequence lengths differ between depths of multi-token prediction."""

    def __init__(self, config: ModelConfig, batch_size: int, dtype: Dtype) -> None:
        self.c, self.b, self.dtype = config, batch_size, dtype
        self.e, self.fp8 = SIZES[dtype], config.precision == "fp8"

    def whole(self, s: int) -> Amounts:
        """All that a forward keeps."""
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
        """Inputs of blocks, what lies outside of them, and the largest block."""
        c = self.c
        yield from self.ends(s)
        yield "inputs of blocks", c.n_layers * self.b * s * c.dim * self.e
        for depth in range(c.n_mtp_layers):
            t = s - depth - 1
            yield MTP + "inputs of blocks", self.b * t * c.dim * self.e  # the embedding; the state is kept anyway
            yield from self.mtp_ends(depth, t)
        for layer in range(c.n_layers + c.n_mtp_layers):
            t = s - max(0, layer + 1 - c.n_layers)
            if c.is_moe(layer):
                yield "gates", self.scores(self.b * t)
        yield (
            "one block, made again",
            max(sum(amount for _, amount in self.block(layer, s)) for layer in {0, c.n_layers - 1}),
        )

    def ends(self, s: int) -> Amounts:
        """Before and behind the blocks."""
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
        """A depth's final norm, loss, and what it gives to the next."""
        c, n = self.c, self.b * t
        yield "rotary tables", self.table(t)
        if c.embed_norm:
            yield MTP + STATE, self.normed(n, c.dim)
        yield MTP + STATE, self.normed(n, c.dim)
        yield MTP + "losses", n * c.dim * self.e
        if depth + 1 < c.n_mtp_layers and c.mtp_input == "post_norm":
            yield MTP + STATE, n * c.dim * self.e

    def block(self, layer: int, s: int) -> Amounts:
        """Of a block, from the input of its first norm to the products of its last."""
        c, n = self.c, self.b * s
        yield STATE, 2 * self.normed(n, c.dim)
        yield from self.attention(s)
        if not c.is_moe(layer):
            yield from self.swiglu("dense feed-forward", n, c.inter_dim)
            yield "dense feed-forward", n * self.read(c.dim)
            return
        # logits are made of an FP32 copy
        yield "gates", (n * c.dim * 4 if self.e < 4 else 0) + self.gate(n)
        rows = expert_rows(c, n, self.dtype)
        yield "routed experts", rows * (self.read(c.dim) + c.dim * self.e + 8) + 8 * n * c.n_activated_experts
        yield from self.swiglu("routed experts", rows, c.moe_inter_dim)
        if c.n_shared_experts or (self.e == 4 and not self.fp8):
            yield "shared experts" if c.n_shared_experts else "gates", n * self.read(c.dim)
        if self.e == 4 and self.fp8:
            yield "gates", n * c.dim * 4
        if c.n_shared_experts:
            yield from self.swiglu("shared experts", n, c.n_shared_experts * c.moe_inter_dim)

    def attention(self, s: int) -> Amounts:
        """Inputs of the products, then what lies between them."""
        c, n = self.c, self.b * s
        yield "attention", n * self.read(c.dim)
        if c.attention == "mla":
            if c.q_lora_rank is not None:
                yield STATE, self.normed(n, c.q_lora_rank)
                yield "attention", n * self.read(c.q_lora_rank)
            yield STATE, self.normed(n, c.kv_lora_rank) + n * c.qk_rope_head_dim * self.e
            yield "attention", n * self.read(c.kv_lora_rank)
        if c.qk_norm:
            yield STATE, n * (c.n_heads + c.kv_heads) * (key_width(c) * self.e + 4)
        yield OVER, self.over(s)
        out = c.n_heads * c.v_head_dim
        if self.fp8:
            yield "attention", n * (12 * -(-out // 8) + 4 * -(-out // BLOCK))
        elif s <= EXPLICIT[self.dtype] or key_width(c) != c.v_head_dim:  # else flash attention's own output is read
            yield "attention", n * out * self.e

    def over(self, s: int) -> int:
        """Queries, keys, values and weights; for these flash attention keeps its result and a number a query."""
        c, n = self.c, self.b * s
        d, v, h = key_width(c), c.v_head_dim, c.n_heads
        flash = s > EXPLICIT[self.dtype]
        wide = max(d, v) if flash else v
        # values are a part of wkv_b's result, and keep all of it alive, unless they had to be copied
        values = v + c.qk_nope_head_dim if c.attention == "mla" and wide == v and (flash or self.b == 1) else wide
        keys = max(d, v) if flash else d
        if flash:
            return n * h * ((2 * keys + values + wide) * self.e + 4)
        return (n * h * (2 * keys + values) + self.b * h * explicit_pairs(s)) * self.e

    def swiglu(self, module: str, n: int, f: int) -> Amounts:
        """w1's and w3's results, silu and the product; in FP8 the results as codes, the rest is made again."""
        yield module, n * (2 * self.read(f) if self.fp8 else 4 * f * self.e)

    def gate(self, n: int) -> int:
        """Scores; the order they were sorted in, of which the choice is a part; the weights, undivided too, and their
        sum."""
        c = self.c
        weights = 8 * c.n_activated_experts + 4 if c.norm_topk_prob else 4 * c.n_activated_experts
        return self.scores(n) + n * (8 * c.n_routed_experts + weights)

    def scores(self, n: int) -> int:
        """And their sum, which the balance loss divides by."""
        return n * (4 * self.c.n_routed_experts + 4)

    def read(self, width: int) -> int:
        """Bytes that are kept of a product's input of so many numbers."""
        return width + 4 * -(-width // BLOCK) if self.fp8 else width * self.e

    def normed(self, n: int, width: int) -> int:
        """A norm's input and the inverse of its root mean square."""
        return n * (width * self.e + 4)

    def table(self, s: int) -> int:
        """Cosines and sines in FP32, for each pair."""
        return 4 * s * (self.c.qk_rope_head_dim if self.c.attention == "mla" else self.c.qk_nope_head_dim)
