"""Every tensor of a model, and what one token does with it: the one list that all counts are sums over.

DeepSeek-V3's query compression in a layer is

    TensorUse("attention", "wq_a", shape=(1536, 7168), visits=1, form="fp8")

that is 1536 * 7168 = 11,010,048 parameters. A token is multiplied with the matrix once, so the multiply-adds of a token
are the same number. In FP8 the matrix has 12 * 56 = 672 scales, one for each block of 128x128.
A stack of experts, w1 of shape (256, 2048, 7168), has 3,758,096,384 parameters; a token visits 8 of the 256 matrices,
which is 117,440,512 multiply-adds.

Source: the shapes of the released checkpoints; DeepSeek-V3 report, section 4.2.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from dsmini.accounting.table import N, collect
from dsmini.config import ModelConfig

MTP = "mtp "
"""Prefix of the names of what belongs to multi-token prediction blocks."""
OVER = "attention over the context"
"""Attention's products that grow with the context: queries with keys, weights with values."""
INDEXER, SCORES = "indexer", "scores of the indexer"
"""DSA's indexer, and its products of queries with keys, which grow with the context too."""

Dtype = Literal["float32", "bfloat16"]
"""Dtype of numbers that are computed with."""
Stage = Literal["warmup", "sparse"]
"""Stage in which indexers learn: as train.dsa_stage. In the warm-up nothing else does."""
SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""
BLOCK = 128
"""Rows and columns of a block of FP8 weights, and numbers of a tile of FP8 activations (report, section 3.3.2)."""


class TensorUse(NamedTuple):
    """A parameter and its use by a token; or products that have no parameter, as attention's over the context."""

    module: str
    """Kind of module, such as "routed experts"."""
    name: str
    """Name of the parameter in the model, without the path to it."""
    shape: tuple[int, ...] = ()
    """[o, i] of a matrix, [e, o, i] of stacked experts, [m] of a norm; () for products without a parameter."""
    visits: int = 0
    """Products of a token with matrices [o, i] of this shape."""
    form: Literal["fp8", "plain", "fp32"] = "plain"
    """fp8: a matrix of attention or a feed-forward, which may be FP8. plain: follows the model's dtype in any case.
    fp32: a norm or gate, which stays FP32."""
    owned: bool = True
    """False: a parameter that is listed elsewhere and used once more."""
    per_pair: int = 0
    """Multiply-adds of a query with one key and its value, all heads."""
    most_keys: int | None = None
    """Number of keys above which a query chooses among them; None: it meets all."""
    buffers: int = 0
    """Routing biases, which are state but no parameters."""

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) if self.shape and self.owned else 0

    @property
    def per_token(self) -> int:
        """Multiply-adds of a token, which is also the number of parameters it is multiplied with."""
        return self.visits * math.prod(self.shape[-2:])

    def learns(self, stage: Stage) -> bool:
        """Return whether training changes it in a stage."""
        return stage == "sparse" or self.module.removeprefix(MTP) == INDEXER or self.name.startswith("k_norm.")

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in and numbers out of all products of a token."""
        return (self.visits * self.shape[-1], self.visits * self.shape[-2]) if self.visits else (0, 0)

    @property
    def scales(self) -> int:
        """Number of 128x128 blocks, ragged ones at the edges included: 576 rows have five."""
        o, i = self.shape[-2:]
        return math.prod(self.shape[:-2]) * -(-o // BLOCK) * -(-i // BLOCK)


def tensors(c: ModelConfig) -> Iterator[TensorUse]:
    """Yield all tensors of Transformer(c), in order."""
    yield from main_tensors(c)
    for depth in range(c.n_mtp_layers):
        yield from mtp_tensors(c, depth)


def main_tensors(c: ModelConfig) -> Iterator[TensorUse]:
    """Yield all tensors but those of multi-token prediction."""
    yield TensorUse("embedding", "embed", (c.vocab_size, c.dim))
    if c.embed_norm:
        yield _norm("embed_norm", c.dim)
    for layer in range(c.n_layers):
        yield from block_tensors(c, layer)
    yield _norm("norm", c.dim)
    yield TensorUse("head", "head", (c.vocab_size, c.dim), 1)


def mtp_tensors(c: ModelConfig, depth: int) -> Iterator[TensorUse]:
    """Yield a multi-token prediction block, the first with depth 0; embedding and head are the main model's."""
    for norm in ("enorm", "hnorm", "norm"):
        yield _norm(norm, c.dim)._replace(module=MTP + "norms")
    yield TensorUse(MTP + "projection", "eh_proj", (c.dim, 2 * c.dim), 1)
    for use in block_tensors(c, c.n_layers + depth):
        yield use._replace(module=MTP + use.module)
    yield TensorUse(MTP + "head", "head", (c.vocab_size, c.dim), 1, owned=False)


def block_tensors(c: ModelConfig, layer: int) -> Iterator[TensorUse]:
    """Yield a block: attention, and a feed-forward or experts."""
    yield _norm("attn_norm", c.dim)
    yield from _attention(c)
    yield _norm("ffn_norm", c.dim)
    if not c.is_moe(layer):
        yield from _swiglu("dense feed-forward", c.dim, c.inter_dim)
        return
    biases = c.n_routed_experts if c.topk_method == "noaux_tc" else 0
    yield TensorUse("gates", "gate", (c.n_routed_experts, c.dim), 1, "fp32", buffers=biases)
    for use in _swiglu("routed experts", c.dim, c.moe_inter_dim):
        yield use._replace(shape=(c.n_routed_experts, *use.shape), visits=c.n_activated_experts)
    if c.n_shared_experts:
        yield from _swiglu("shared experts", c.dim, c.n_shared_experts * c.moe_inter_dim)


def key_width(c: ModelConfig) -> int:
    """Return the width of a head's query and key, of MLA in its expanded form."""
    return c.qk_head_dim if c.is_mla else c.qk_nope_head_dim


def _attention(c: ModelConfig) -> Iterator[TensorUse]:
    m, h, d, v = c.dim, c.n_heads, key_width(c), c.v_head_dim
    if c.is_mla:
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
    yield TensorUse(OVER, "", per_pair=h * (d + v), most_keys=c.index_topk)
    yield _attention_matrix("wo", m, h * v)
    if c.index_n_heads is not None and c.index_head_dim is not None:
        yield from _indexer(c.index_n_heads, c.index_head_dim, m, m if c.q_lora_rank is None else c.q_lora_rank)


def _indexer(h: int, d: int, m: int, width: int) -> Iterator[TensorUse]:
    """Yield an indexer: 13,959,424 parameters in a layer of V3.2, its norm's 256 among them."""
    yield TensorUse(INDEXER, "wq_b", (h * d, width), 1, "fp8")
    yield TensorUse(INDEXER, "wk", (d, m), 1, "fp8")
    yield from (_norm(name, d) for name in ("k_norm.weight", "k_norm.bias"))
    yield TensorUse(INDEXER, "weights_proj", (h, m), 1, "fp32")
    yield TensorUse(SCORES, "", per_pair=h * d)


def _attention_matrix(name: str, o: int, i: int) -> TensorUse:
    return TensorUse("attention", name, (o, i), 1, "fp8")


def _swiglu(module: str, m: int, f: int) -> Iterator[TensorUse]:
    yield TensorUse(module, "w1", (f, m), 1, "fp8")
    yield TensorUse(module, "w2", (m, f), 1, "fp8")
    yield TensorUse(module, "w3", (f, m), 1, "fp8")


def _norm(name: str, width: int) -> TensorUse:
    return TensorUse("norms", name, (width,), form="fp32")


def sums(uses: Iterable[TensorUse], value: Callable[[TensorUse], N]) -> dict[str, N]:
    """Return the sum of `value` for each module that has any, in order of first appearance."""
    return collect((use.module, value(use)) for use in uses)
