"""Exact counts from a ModelConfig alone: parameters, floating-point operations, bytes of cache. No model is built.

All of them come from one list. `_parts` goes through the model and says of each part how many parameters it has, how
many multiply-adds a token causes there, and how many a pair of query and key; the rest is sums.
A FLOP is half a multiply-add. Figures quoted here are of DeepSeek-V3: its report (arXiv 2412.19437) and "Insights into
DeepSeek-V3" (arXiv 2505.09343).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dsmini.config import ModelConfig

_MTP = "mtp "


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """How many parameters a Transformer has, and how many of them a token meets in matrix products."""

    total: int
    """All parameters, those of the multi-token prediction blocks included."""
    mtp: int
    """Those of the multi-token prediction blocks. V3: 11.610B, printed as 11.5B (11.507B without "mtp projection")."""
    active: int
    """What a token is multiplied with in the main model: n_activated_experts of the routed experts, and the head, but
    not the embedding, of which it reads one row, nor norms. V3: 36.62B, printed as 37B; 37.55B with the embedding."""
    buffers: int
    """Routing biases, which are state but no parameters and in none of the other counts."""
    by_module: Mapping[str, int]
    """Parameters of each kind of module in the order of the model; they sum to total. In multi-token prediction
    blocks the names begin with "mtp "; the embedding and the head that these share are counted once, without it."""
    active_by_module: Mapping[str, int]
    """As `active`, for each kind of module, the multi-token prediction blocks and their use of the head included:
    V3's block is printed with 2.4B (2.44B with embedding and head and without "mtp projection")."""

    @property
    def main(self) -> int:
        """Parameters without multi-token prediction: V3 671,026,404,352."""
        return self.total - self.mtp


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Floating-point operations; a multiply-add is two."""

    total: int
    by_module: Mapping[str, int]
    """For each kind of module, named as in Parameters.by_module; attention's products that grow with the
    context apart."""


class _Part(NamedTuple):
    module: str
    parameters: int = 0
    per_token: int = 0
    """Multiply-adds of a token, which is also the number of parameters it is multiplied with."""
    per_pair: int = 0
    """Multiply-adds of a query with one key and its value."""
    buffers: int = 0


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of Transformer(config), exactly. V3 without MTP: 671,026,404,352, and 14,848 routing biases.

    Source: the shapes of the released checkpoints; DeepSeek-V3 report, section 4.2 (671B, 37B activated).
    """
    parts = list(_parts(config))
    by_module = _sums(parts, lambda part: part.parameters)
    active = _sums(parts, lambda part: part.per_token)
    return Parameters(
        total=sum(by_module.values()),
        mtp=sum(count for module, count in by_module.items() if module.startswith(_MTP)),
        active=sum(count for module, count in active.items() if not module.startswith(_MTP)),
        buffers=sum(part.buffers for part in parts),
        by_module=by_module,
        active_by_module=active,
    )


def flops_per_token(
    config: ModelConfig, seq_len: int, causal: bool = True, training: bool = False, mtp: bool | None = None
) -> Flops:
    """FLOPs a token, the mean over a sequence of seq_len tokens: 2 N + L H (d_qk + d_v) seq_len, training 3 times that.

    N is `parameters(config).active`, L the layers, H the heads, d_qk and d_v the widths of a head's key and value: 192
    and 128 in V3, since MLA is counted in its expanded form, that of training and prefill. Training is three times the
    forward because backward makes two products of each one, for the gradients of its two factors.
    V3 at 4096 tokens in training, without MTP: 250.4 GFLOP, printed as 250; V2: 155.3, printed as 155.

    Left out: norms, softmax, activations, rotary embedding, residuals, choosing experts, weighing and summing their
    outputs, losses, the optimizer, recomputation. The embedding is a lookup.

    Args:
        causal: count half of the square of queries and keys, as the published figures do; the diagonal, 1 / seq_len
            of it, is ignored. False: the whole square, which is what an implementation with a mask computes.
        training: forward and backward.
        mtp: with the multi-token prediction blocks; left out: as training does, since plain decoding does not run
            them. The published figures are without. Simplified: depth k is counted at all positions, of which it has
            seq_len - k.

    Source: "Insights into DeepSeek-V3", table 2. Raises: ValueError for a seq_len below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} is not positive; use 1 or more")
    mtp = training if mtp is None else mtp
    passes = 3 if training else 1

    def flops(part: _Part) -> int:
        return passes * (2 * part.per_token + (1 if causal else 2) * seq_len * part.per_pair)

    by_module = _sums((part for part in _parts(config) if mtp or not part.module.startswith(_MTP)), flops)
    return Flops(total=sum(by_module.values()), by_module=by_module)


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes of cache that a token occupies in all layers together, multi-token prediction's apart. V3 in BF16: 70,272.

    MLA keeps a latent and one rotary key, kv_lora_rank + qk_rope_head_dim numbers a layer; the twins keep a key and a
    value of each key-value head.

    Source: DeepSeek-V2 report, table 1; "Insights into DeepSeek-V3", table 1 (its KB are 1000 bytes).
    """
    if config.attention == "mla":
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        numbers = config.kv_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return numbers * config.n_layers * bytes_per_number


def mha_kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """kv_bytes_per_token of the mha_twin, also where qk_nope_head_dim is odd and there is no such twin to build."""
    return config.n_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.n_layers * bytes_per_number


def mha_twin(config: ModelConfig) -> ModelConfig:
    """The same model with multi-head attention of as many heads, keys qk_nope_head_dim and values v_head_dim wide.

    Against it V3's cache is 98.24 % smaller: 576 numbers a layer for 128 * (128 + 128) = 32768. That figure needs
    keys of 128; against MLA's own 192-wide expanded keys, 128 * (192 + 128) = 40960, the same cache saves 98.59 %.

    Raises: ValueError if qk_nope_head_dim is odd, since the twin rotates it.
    """
    return dataclasses.replace(config, attention="mha", n_kv_heads=None)


def _parts(c: ModelConfig) -> Iterator[_Part]:
    yield _Part("embedding", c.vocab_size * c.dim)
    yield _Part("norms", c.dim if c.embed_norm else 0)
    for layer in range(c.n_layers):
        yield from _block(c, layer)
    yield _Part("norms", c.dim)
    yield _matrices("head", c.vocab_size * c.dim)
    for depth in range(c.n_mtp_layers):
        yield _matrices(_MTP + "projection", 2 * c.dim * c.dim)
        for part in _block(c, c.n_layers + depth):
            yield part._replace(module=_MTP + part.module)
        yield _Part(_MTP + "norms", 3 * c.dim)
        yield _Part(_MTP + "head", per_token=c.vocab_size * c.dim)


def _block(c: ModelConfig, layer: int) -> Iterator[_Part]:
    yield from _attention(c)
    yield _Part("norms", 2 * c.dim)
    if not c.is_moe(layer):
        yield _matrices("dense feed-forward", 3 * c.dim * c.inter_dim)
        return
    gate, expert = c.n_routed_experts * c.dim, 3 * c.dim * c.moe_inter_dim
    biases = c.n_routed_experts if c.topk_method == "noaux_tc" else 0
    yield _Part("gates", gate, per_token=gate, buffers=biases)
    yield _Part("routed experts", c.n_routed_experts * expert, per_token=c.n_activated_experts * expert)
    yield _matrices("shared experts", c.n_shared_experts * expert)


def _attention(c: ModelConfig) -> Iterator[_Part]:
    m, h, d_v, q_rank, kv_rank = c.dim, c.n_heads, c.v_head_dim, c.q_lora_rank, c.kv_lora_rank
    if c.attention == "mla":
        d_qk = c.qk_head_dim
        queries = m * h * d_qk if q_rank is None else q_rank * (m + h * d_qk)
        keys_values = m * (kv_rank + c.qk_rope_head_dim) + kv_rank * h * (c.qk_nope_head_dim + d_v)
        yield _Part("norms", (q_rank or 0) + kv_rank)
    else:
        d_qk = c.qk_nope_head_dim
        queries, keys_values = m * h * d_qk, m * c.kv_heads * (d_qk + d_v)
    yield _Part("norms", 2 * d_qk if c.qk_norm else 0)
    yield _matrices("attention", queries + keys_values + h * d_v * m)
    yield _Part("attention over the context", per_pair=h * (d_qk + d_v))


def _matrices(module: str, count: int) -> _Part:
    """A part of which a token meets every parameter in a product, once."""
    return _Part(module, count, per_token=count)


def _sums(parts: Iterable[_Part], value: Callable[[_Part], int]) -> dict[str, int]:
    """The sum of `value` for each module that has any, in order of first appearance."""
    sums: dict[str, int] = {}
    for part in parts:
        if amount := value(part):
            sums[part.module] = sums.get(part.module, 0) + amount
    return sums
