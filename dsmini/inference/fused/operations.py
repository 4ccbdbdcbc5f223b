"""A decoding step as operations: all blocks in one call, or each half of a block, with its norm and residual.

The plain versions run the modules. The kernels take the weights beside them, and append to the caches as the modules
do. Numbers between operations are FP32; weights and caches stay as they are stored.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.inference.fused.weights import (
    AttentionWeights,
    BlockWeights,
    FeedForwardWeights,
    GroupedAttentionWeights,
    StepWeights,
)
from dsmini.nn import AttentionContext, RMSNorm
from dsmini.nn.cache import LayerCacheView
from dsmini.nn.rope import CosSin


@ops.operation("normed")
def normed(
    x: Float[Tensor, "*b m"], norm: RMSNorm, y: Float[Tensor, "*b m"] | None = None, y_norm: RMSNorm | None = None
) -> Float[Tensor, "*b n"]:
    """Return norm(x), or norm(x) and y_norm(y) side by side: the input of a multi-token prediction block.

    Source: DeepSeek-V3 report, section 2.2, equation 21.
    """
    return norm(x) if y is None or y_norm is None else torch.cat((norm(x), y_norm(y)), -1)


@ops.operation("attention_step")
def attention_step(
    x: Float[Tensor, "b s m"],
    weights: AttentionWeights,
    cache: LayerCacheView,
    cos_sin: CosSin,
    starts: Int[Tensor, " b"],
) -> Float[Tensor, "b s m"]:
    """Return x + MLA(norm(x)) for new tokens, absorbed, and append their rows to the cache.

    With an indexer a token attends to the keys that it chooses, where some token sees more than topk.

    Args:
        cache: the layer's part of the cache. All its new columns are tokens.
        starts: position of each sequence's first new token.

    Source: DeepSeek-V2 report, section 2.1.2; DeepSeek-V3.2 report, section 2.1.
    """
    return _attention(x, weights, replace(cache, form="absorbed"), cos_sin)


@ops.operation("grouped_attention_step")
def grouped_attention_step(
    x: Float[Tensor, "b s m"],
    weights: GroupedAttentionWeights,
    cache: LayerCacheView,
    cos_sin: CosSin,
    starts: Int[Tensor, " b"],
) -> Float[Tensor, "b s m"]:
    """Return x + Attention(norm(x)) for new tokens, and append their rows to the cache: MHA, GQA and MQA.

    Args:
        cache, starts: as in attention_step.
    """
    return _attention(x, weights, cache, cos_sin)


def _attention(x: Tensor, weights: StepWeights, cache: LayerCacheView, cos_sin: CosSin) -> Tensor:
    norm, attention = weights.modules
    return x + attention(norm(x), AttentionContext(cos_sin=cos_sin, cache=cache))


@ops.operation("feed_forward_step")
def feed_forward_step(x: Float[Tensor, "n m"], weights: FeedForwardWeights) -> tuple[Tensor, ...]:
    """Return x + FFN(norm(x)), and the routing: indices and weights [n, k], scores [n, e] and counts [e].

    Without a gate the four tensors of the routing are empty.
    """
    norm, feed_forward = weights.modules
    y = feed_forward(norm(x))
    if isinstance(y, Tensor):
        return x + y, x.new_empty(0, 0, dtype=torch.int64), x.new_empty(0, 0), x.new_empty(0, 0), x.new_empty(0)
    return x + y[0], *y[1]


@ops.operation("blocks_step")
def blocks_step(
    x: Float[Tensor, "b s m"],
    blocks: Sequence[BlockWeights],
    caches: Sequence[LayerCacheView],
    cos_sin: CosSin,
    starts: Int[Tensor, " b"],
) -> tuple[Tensor, ...]:
    """Return x after all blocks, then the four tensors of feed_forward_step's routing for each block with a gate.

    Args:
        caches: each layer's part of the cache.
        starts: as in attention_step.
    """
    routing: list[Tensor] = []
    for (attention, feed_forward), cache in zip(blocks, caches, strict=True):
        if isinstance(attention, AttentionWeights):
            y = attention_step(x, attention, cache, cos_sin, starts)
        else:
            y = grouped_attention_step(x, attention, cache, cos_sin, starts)
        z, *routing_of_block = feed_forward_step(y.flatten(0, 1), feed_forward)
        x = z.view(x.shape)
        routing += routing_of_block if feed_forward.gate is not None else []
    return (x, *routing)
