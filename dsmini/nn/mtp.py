"""Multi-token prediction: after the next token, the one after that, from the same trunk.

The block of depth k (1, 2, ...) joins what depth k-1 knows at position i with the embedding of token i+k, and
predicts token i+k+1. Embedding and output head are the main model's. Position i never sees the token it predicts:
given its own target's embedding, a block would learn to copy.

A model with several residual streams gives all of them, as its last block left them, to the first depth. Each is normed
and projected by itself, and the embedding is added to each. A depth ends with a sum of its streams of its own.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config
from dsmini.nn.attention import Context
from dsmini.nn.block import Aux, Block, run_block
from dsmini.nn.cache import CachePositions, MTPCache
from dsmini.nn.layers import Linear, RMSNorm
from dsmini.nn.residual import head_of


class MTP(nn.Module):
    """One depth of multi-token prediction: eh_proj(concat(enorm(embedding), hnorm(hidden))), then a whole block.

    The embedding comes first in the concatenation, as the released weights need it and the reverse of equation 21. A
    model of several residual streams has a StreamMTP.

    Args:
        depth: 0 for the first MTP block; it is block n_layers + depth of the model.
        make_block: as in Transformer.

    Source: DeepSeek-V3 report, section 2.2, equations 21 to 23.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        /,
        depth: int = 0,
        *,
        make_block: Callable[..., nn.Module] = Block,
        **arguments: Any,
    ) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        self.enorm: RMSNorm = RMSNorm(c.dim, c.norm_eps)
        self.hnorm: RMSNorm = RMSNorm(c.dim, c.norm_eps)
        self.add_projections(c)
        self.block: nn.Module = make_block(c, layer=c.n_layers + depth)
        self.hc_head: Any = head_of(c)
        self.norm: RMSNorm = RMSNorm(c.dim, c.norm_eps)

    def add_projections(self, c: ModelConfig) -> None:
        """Make the layers that join a hidden state and an embedding."""
        self.eh_proj: Linear = Linear(2 * c.dim, c.dim, init_std=c.init_std)

    def forward(
        self,
        hidden: Float[Tensor, "b s *streams m"],
        embedding: Float[Tensor, "b s m"],
        context: Context | None = None,
    ) -> tuple[Float[Tensor, "b s *streams m"], Float[Tensor, "b s m"], Aux]:
        """Return the block's output before and after `norm`, and what it found.

        Args:
            hidden: hidden states of the depth before.
            embedding: embeddings of the tokens that the depth before predicts.
        """
        x, aux = run_block(self.block, self.join(hidden, embedding), context)
        return x, self.norm(self.hc_head.collapse(x)), aux

    def join(
        self, hidden: Float[Tensor, "b s *streams m"], embedding: Float[Tensor, "b s m"]
    ) -> Float[Tensor, "b s *streams m"]:
        """Return the block's input."""
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), -1))


class StreamMTP(MTP):
    """One depth of a model of several residual streams: each gets e_proj(enorm(embedding)) + h_proj(hnorm(stream)).

    Source: DeepSeek-V4's inference code.
    """

    def add_projections(self, c: ModelConfig) -> None:
        self.e_proj: Linear = Linear(c.dim, c.dim, init_std=c.init_std)
        self.h_proj: Linear = Linear(c.dim, c.dim, init_std=c.init_std)

    def join(self, hidden: Float[Tensor, "b s n m"], embedding: Float[Tensor, "b s m"]) -> Float[Tensor, "b s n m"]:
        return self.e_proj(self.enorm(embedding)).unsqueeze(-2) + self.h_proj(self.hnorm(hidden))


class MTPChain(nn.ModuleList):
    """The MTP blocks of all depths, each of which reads the hidden states of the depth before."""

    def __init__(self, config: ModelConfig, make_block: Callable[..., nn.Module] = Block) -> None:
        depth = StreamMTP if config.hc_mult > 1 else MTP
        super().__init__(depth(config, depth=k, make_block=make_block) for k in range(config.n_mtp_layers))
        self.pre_norm: bool = config.mtp_input == "pre_norm" or config.hc_mult > 1
        """True if a depth reads what the last block gave, False if it reads the normed states."""

    def given(
        self, x: Float[Tensor, "b s *streams m"], normed: Float[Tensor, "b s m"]
    ) -> Float[Tensor, "b s *streams m"]:
        """Return what the next depth reads of the states before and after a norm."""
        return x if self.pre_norm else normed

    def __getitem__(self, index: Any) -> Any:
        """Return a block, or a plain ModuleList of several: a chain is made from a config."""
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        hidden: Float[Tensor, "b s *streams m"],
        embed: Callable[[Tensor], Tensor],
        documents: Int[Tensor, "b s"] | None = None,
        recompute: bool = False,
        stage: Any = None,
    ) -> tuple[list[Tensor], list[Aux]]:
        """Return the normed hidden states of each depth k = 1, 2, ..., [b, s - k, m], and what each block found.

        Args:
            hidden: the main model's hidden states, States.given.
            embed: makes embeddings of token ids.
            documents, recompute: as in Transformer.losses.
            stage: as in Context.
        """
        all_normed: list[Tensor] = []
        found: list[Aux] = []
        for k, block in enumerate(cast(list[MTP], list(self)), 1):
            if tokens.shape[1] <= k:
                raise ValueError(f"a sequence of {tokens.shape[1]} tokens is too short for MTP depth {k}; want {k + 1}")
            # 1. join what depth k - 1 knows at position i with the embedding of token i + k: both [b, s - k, m]
            embedding = embed(tokens[:, k:])
            n = embedding.shape[1]
            hidden = hidden[:, :n]
            context = Context(
                positions=torch.arange(n, device=tokens.device)[None],
                tokens=tokens[:, k:],
                documents=None if documents is None else documents[:, :n],
                stage=stage,
            )
            # 2. run the block: [b, s - k, m]
            inputs = (hidden, embedding, context)
            x, normed, aux = ops.recomputed(block, *inputs) if recompute else block(*inputs)
            # 3. the head reads the normed states; the next depth those before or after the norm
            hidden = self.given(x, normed)
            all_normed.append(normed)
            found.append(aux)
        return all_normed, found

    def decode(
        self,
        embedding: Float[Tensor, "b s m"],
        before: Float[Tensor, "b s *streams m"],
        cache: MTPCache,
        lengths: Int[Tensor, " b"] | None = None,
        run: Callable[..., tuple[Tensor, Tensor]] | None = None,
        tokens: Int[Tensor, "b s"] | None = None,
    ) -> list[Float[Tensor, "b s m"]]:
        """Append tokens to the cache, and return each depth's normed states: after each token, of the next.

        Args:
            embedding: of the new tokens, which the main model has seen or is about to see.
            before: the main model's hidden state at the position before each new token.
            lengths: number of new tokens of each row, padded on the right; None: all columns are tokens.
            run: does what decode_depth does, in its place.
            tokens: ids of the new tokens, for a layer that looks something up by them.
        """
        at, depths, all_normed = cache.place(embedding.shape[1], lengths), len(cache.stores), []
        for k in range(depths):
            normed, given = (run or self.decode_depth)(k, embedding, before, cache, at, tokens)
            all_normed.append(normed)
            if k + 1 < depths:
                before = cache.shift(k + 1, given, lengths)
        cache.lengths = at.lengths
        return all_normed

    def decode_depth(
        self,
        k: int,
        embedding: Float[Tensor, "b s m"],
        before: Float[Tensor, "b s *streams m"],
        cache: MTPCache,
        at: CachePositions,
        tokens: Int[Tensor, "b s"] | None = None,
    ) -> tuple[Float[Tensor, "b s m"], Float[Tensor, "b s *streams m"]]:
        """Run block k (0, 1, ...) on new tokens; return its normed states, and what the next depth reads of them."""
        block, at = cast(MTP, self[k]), at.moved_back(k + 1)
        context = Context(positions=at.positions, tokens=tokens, cache=cache.views(at)[k])
        x, normed, _ = block(before, embedding, context)
        return normed, self.given(x, normed)
