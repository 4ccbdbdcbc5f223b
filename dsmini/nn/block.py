"""A transformer block: attention, then a feed-forward or its mixture of experts, each normed first and added back."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config
from dsmini.config.fields import derives
from dsmini.nn.attention import Attention, Context
from dsmini.nn.cache import CacheDtype
from dsmini.nn.compressed_attention import CompressedAttention
from dsmini.nn.dsa import DSA, IndexerLoss
from dsmini.nn.engram import Engram
from dsmini.nn.gate import HashGate, Routing
from dsmini.nn.layers import RMSNorm, in_precision
from dsmini.nn.mla import MLA
from dsmini.nn.moe import FeedForward, MoE
from dsmini.nn.residual import residual_of


class Aux(NamedTuple):
    """A block's findings besides its output. They travel in the result: no layer stores anything of a forward."""

    routing: Routing | None = None
    """The decision of a MoE layer's gate."""
    indexer_loss: IndexerLoss | None = None
    """The loss of DSA's indexer while it learns."""


class Block(nn.Module):
    """Block number `layer` of a model: attention as config.attention says, experts from layer n_dense_layers on.

    With hc_mult of more than 1 it reads and writes that many residual streams, [b, s, n, m], by hyper-connections. A
    block alone also takes x [b, s, m], of which it makes equal streams.

    Args:
        attention_class: another attention, built from a config and called as MLA is; to decode it also has MLA's
            new_cache. `functools.partial(MLA, mask=...)` is MLA with another mask. A CompressedAttention also gets the
            layer's compress_ratio, and a DSA the number `layer`.
        moe_class: another mixture of experts, such as `functools.partial(MoE, gate_class=...)`. In a hash layer it gets
            HashGate as gate_class, whatever the partial says.

    Another residual rule is a subclass with another `forward`, which reads and writes as this one does, calls `attend`
    and `feed_forward`, and returns the pair of x and Aux. Transformer(make_block=...) builds a model of it.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        /,
        layer: int = 0,
        *,
        attention_class: Callable[..., nn.Module] | None = None,
        moe_class: Callable[..., nn.Module] = MoE,
        **arguments: Any,
    ) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        classes: dict[str, type[nn.Module]] = {"mla": MLA, "dsa": DSA, "compressed": CompressedAttention}
        attention = attention_class or classes.get(c.attention, Attention)
        place = {"compress_ratio": c.compress_ratio(layer)} if derives(attention, CompressedAttention) else {}
        place |= {"layer": layer} if derives(attention, DSA) else {}
        self.engram: Engram | None = Engram(c, layer=layer) if layer in (c.engram_layer_ids or ()) else None
        self.attn_norm: RMSNorm = RMSNorm(c.dim, c.norm_eps)
        self.attn: nn.Module = attention(c, **place)
        self.ffn_norm: RMSNorm = RMSNorm(c.dim, c.norm_eps)
        by_table = {"gate_class": partial(HashGate, layer=layer)} if c.is_hashed(layer) else {}
        self.ffn: nn.Module = moe_class(c, **by_table) if c.is_moe(layer) else in_precision(c, FeedForward)(c)
        self.hc_attn: Any = residual_of(c, 2 * layer)
        self.hc_ffn: Any = residual_of(c, 2 * layer + 1)

    def forward(
        self, x: Float[Tensor, "b s *streams m"], context: Context | None = None
    ) -> tuple[Float[Tensor, "b s *all m"], Aux]:
        """Return the block's output, and what it found on the way."""
        x = self.hc_attn.expand(x)
        if self.engram is not None:
            x, context = self.engram(x, context)
        read, mix = self.hc_attn.read(x)
        y, indexer_loss = self.attend(self.attn_norm(read), context)
        x = self.hc_attn.write(x, y, mix)
        read, mix = self.hc_ffn.read(x)
        y, routing = self.feed_forward(self.ffn_norm(read), context)
        return self.hc_ffn.write(x, y, mix), Aux(routing, indexer_loss)

    def attend(
        self, x: Float[Tensor, "b s *none m"], context: Context | None = None
    ) -> tuple[Float[Tensor, "b s m"], IndexerLoss | None]:
        """Return the attention's output, and the loss of its indexer if that learns.

        Raises: ValueError for several residual streams.
        """
        if x.dim() == 4:
            raise ValueError(
                f"attend got {list(x.shape)}, residual streams; want [b, s, m], what one sublayer reads of them: "
                "x, mix = self.hc_attn.read(streams), and later self.hc_attn.write(streams, y, mix)"
            )
        y = self.attn(x, context)
        return y if isinstance(y, tuple) else (y, None)

    def feed_forward(
        self, x: Float[Tensor, "b s m"], context: Context | None = None
    ) -> tuple[Float[Tensor, "b s m"], Routing | None]:
        """Return the feed-forward's output, and the decision of its gate if it has one."""
        y = self.ffn(x, context)
        return y if isinstance(y, tuple) else (y, None)

    def new_cache(self, batch_size: int, max_seq_len: int, dtype: CacheDtype, device: torch.device) -> Any:
        """Return the empty cache of the attention, which may be inside a wrapper, and of Engram where there is one.

        Raises: ValueError for an attention that makes none.
        """
        for module in self.attn.modules():
            make: Any = getattr(module, "new_cache", None)
            if make is not None:
                store = make(batch_size, max_seq_len, dtype, device)
                engram = self.engram
                return store if engram is None else engram.new_cache(store, batch_size, max_seq_len, dtype, device)
        raise ValueError(
            f"{type(self.attn).__name__} makes no cache; give it new_cache(batch_size, max_seq_len, dtype, device), "
            "which returns a dsmini.nn.LayerCache for the rows that it appends"
        )


def run_block(block: nn.Module, x: Tensor, context: Context | None, recompute: bool = False) -> tuple[Tensor, Aux]:
    """Return block(x, context), whose backward computes it again with `recompute`.

    Raises: ValueError for a block that returns anything but a pair of x, in its shape, and Aux.
    """
    result = ops.recomputed(block, x, context) if recompute else block(x, context)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Aux):
        raise ValueError(
            f"{type(block).__name__}.forward returned a {type(result).__name__}; a block returns the pair (x, "
            "Aux(routing, indexer_loss)): what Block.feed_forward and Block.attend return besides their outputs"
        )
    if result[0].shape != x.shape:
        raise ValueError(
            f"{type(block).__name__}.forward returned hidden states {list(result[0].shape)} for {list(x.shape)}; "
            "return the same shape: all residual streams of a model that has several"
        )
    return result
