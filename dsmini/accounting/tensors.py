"""The one list that all counts are sums over: every tensor of a model, and what a token does with it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeVar

from dsmini.config import ModelConfig

MTP = "mtp "
"""Begins the names of what belongs to multi-token prediction blocks."""
OVER = "attention over the context"
"""Attention's products that grow with the context: queries with keys, weights with values."""

Dtype = Literal["float32", "bfloat16"]
"""Of numbers that are computed with."""
SIZES = {"float32": 4, "bfloat16": 2}
BLOCK = 128
"""Rows and columns of a block of FP8 weights, and numbers of a tile of FP8 activations."""

N = TypeVar("N", int, float)


class Part(NamedTuple):
    """A parameter, or products that have none."""

    module: str
    name: str
    """The parameter's in the model, without the path to it."""
    shape: tuple[int, ...] = ()
    """[o, i] of a matrix, [e, o, i] of stacked experts, [m] of a norm; () for products without parameters."""
    visits: int = 0
    """Products of a token with matrices [o, i] of this shape."""
    form: Literal["fp8", "plain", "fp32"] = "plain"
    """fp8: a matrix of attention or a feed-forward, which may be FP8; plain: follows the model's dtype in any case;
    fp32: a norm or gate, which stays FP32."""
    owned: bool = True
    """False: another part's parameter, used once more."""
    per_pair: int = 0
    """Multiply-adds of a query with one key and its value."""
    buffers: int = 0

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) if self.shape and self.owned else 0

    @property
    def per_token(self) -> int:
        """Multiply-adds of a token, which is also the number of parameters it is multiplied with."""
        return self.visits * math.prod(self.shape[-2:])

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in and numbers out of all a token's products."""
        return (self.visits * self.shape[-1], self.visits * self.shape[-2]) if self.visits else (0, 0)

    @property
    def scales(self) -> int:
        """Of 128x128 blocks, ragged ones at the edges: 576 rows have five."""
        o, i = self.shape[-2:]
        return math.prod(self.shape[:-2]) * -(-o // BLOCK) * -(-i // BLOCK)


def parts(c: ModelConfig) -> Iterator[Part]:
    """All of Transformer(c), in order."""
    yield from main_parts(c)
    for depth in range(c.n_mtp_layers):
        yield from mtp_parts(c, depth)


def main_parts(c: ModelConfig) -> Iterator[Part]:
    """All but multi-token prediction."""
    yield Part("embedding", "embed", (c.vocab_size, c.dim))
    if c.embed_norm:
        yield _norm("embed_norm", c.dim)
    for layer in range(c.n_layers):
        yield from block_parts(c, layer)
    yield _norm("norm", c.dim)
    yield Part("head", "head", (c.vocab_size, c.dim), 1)


def mtp_parts(c: ModelConfig, depth: int) -> Iterator[Part]:
    """A multi-token prediction block, the first with depth 0; embedding and head are the main model's."""
    for norm in ("enorm", "hnorm", "norm"):
        yield _norm(norm, c.dim)._replace(module=MTP + "norms")
    yield Part(MTP + "projection", "eh_proj", (c.dim, 2 * c.dim), 1)
    for part in block_parts(c, c.n_layers + depth):
        yield part._replace(module=MTP + part.module)
    yield Part(MTP + "head", "head", (c.vocab_size, c.dim), 1, owned=False)


def block_parts(c: ModelConfig, layer: int) -> Iterator[Part]:
    """A block: attention, and a feed-forward or experts."""
    yield _norm("attn_norm", c.dim)
    yield from _attention(c)
    yield _norm("ffn_norm", c.dim)
    if not c.is_moe(layer):
        yield from _swiglu("dense feed-forward", c.dim, c.inter_dim)
        return
    biases = c.n_routed_experts if c.topk_method == "noaux_tc" else 0
    yield Part("gates", "gate", (c.n_routed_experts, c.dim), 1, "fp32", buffers=biases)
    for part in _swiglu("routed experts", c.dim, c.moe_inter_dim):
        yield part._replace(shape=(c.n_routed_experts, *part.shape), visits=c.n_activated_experts)
    if c.n_shared_experts:
        yield from _swiglu("shared experts", c.dim, c.n_shared_experts * c.moe_inter_dim)


def key_width(c: ModelConfig) -> int:
    """Of a head's query and key, in MLA expanded."""
    return c.qk_head_dim if c.attention == "mla" else c.qk_nope_head_dim


def _attention(c: ModelConfig) -> Iterator[Part]:
    m, h, d, v = c.dim, c.n_heads, key_width(c), c.v_head_dim
    if c.attention == "mla":
        if c.q_lora_rank is None:
            yield _attention_matrix("wq", h * d, m)
        else:
            yield _attention_matrix("wq_a", c.q_lora_rank, m)
            yield _norm("q_norm", c.q_lora_rank)
            yield _attention_matrix("wq_b", h * d, c.q_lora_rank)
        yield _attention_matrix("wkv_a", c.kv_lora_rank + c.qk_rope_head_dim, m)
        yield _norm("kv_norm", c.kv_lora_rank)
        yield _attention_matrix("wkv_b", h * (c.qk_nope_head_dim + v), c.kv_lora_rank)
    else:
        yield _attention_matrix("wq", h * d, m)
        yield _attention_matrix("wk", c.kv_heads * d, m)
        yield _attention_matrix("wv", c.kv_heads * v, m)
    if c.qk_norm:
        yield _norm("q_head_norm", d)
        yield _norm("k_head_norm", d)
    yield Part(OVER, "", per_pair=h * (d + v))
    yield _attention_matrix("wo", m, h * v)


def _attention_matrix(name: str, o: int, i: int) -> Part:
    return Part("attention", name, (o, i), 1, "fp8")


def _swiglu(module: str, m: int, f: int) -> Iterator[Part]:
    yield Part(module, "w1", (f, m), 1, "fp8")
    yield Part(module, "w2", (m, f), 1, "fp8")
    yield Part(module, "w3", (f, m), 1, "fp8")


def _norm(name: str, width: int) -> Part:
    return Part("norms", name, (width,), form="fp32")


def sums(some: Iterable[Part], value: Callable[[Part], N]) -> dict[str, N]:
    """The sum of `value` for each module that has any, in order of first appearance."""
    return collect((part.module, value(part)) for part in some)


def collect(amounts: Iterable[tuple[str, N]]) -> dict[str, N]:
    """The sum of the amounts of each name that has any, in order of first appearance."""
    out: dict[str, N] = {}
    for name, amount in amounts:
        if amount:
            out[name] = out[name] + amount if name in out else amount
    return out
