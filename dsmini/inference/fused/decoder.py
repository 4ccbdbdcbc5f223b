"""Decoding steps in few calls: one operation for all blocks, in place of the thirty of each block's modules.

A model is taken apart into its weights once for each generation (weights.py). If one of its layers is not plain, all
run as they are. A multi-token prediction block that is not plain runs as it is. Numbers between layers are FP32.
Weights and the cache stay as they are stored.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.inference.fused.operations import blocks_step, normed
from dsmini.inference.fused.weights import BlockWeights, extract_mtp_weights, extract_weights, supports_fused
from dsmini.nn import MTP, Cache, Routing, Transformer
from dsmini.nn.cache import CachePositions, LayerCacheView, MTPCache
from dsmini.nn.mtp import MTPChain
from dsmini.nn.rope import CosSin, Rope
from dsmini.nn.transformer import States

MOST_TOKENS = 32
"""Number of tokens in a step up to which the steps' kernels serve."""


class Decoder:
    """Runs a model on new tokens after a cache, in few calls where it can.

    The weights must stay where they are while it is used: make a new one after a load, a cast or a move.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        floats = (torch.float32, torch.bfloat16)
        dtype = model.compute_dtype or model.embed.weight.dtype
        fast = dtype in floats and model.device.type == "cpu" and ops.serving("cpu") == "cpu"
        self.blocks: list[BlockWeights | None] = [
            extract_weights(block, dtype) if fast else None for block in model.layers
        ]
        """The weights of each block, or None for one that runs as it is."""
        fast_chain = fast and type(model.mtp) is MTPChain
        self.mtp_blocks = [extract_mtp_weights(block, dtype) if fast_chain else None for block in model.mtp]
        """The same of the multi-token prediction blocks."""
        self._plain_norm = supports_fused(model.norm)
        self._angles = _Angles(model.rope)

    def logits(self, tokens: Int[Tensor, "b s"], cache: Cache) -> Float[Tensor, "b s v"]:
        """Append tokens to the cache and return the logits after each, as the model does."""
        with torch.no_grad():
            return self.model.head(self.states(tokens, cache).normed)

    def states(self, tokens: Int[Tensor, "b s"], cache: Cache, lengths: Int[Tensor, " b"] | None = None) -> States:
        """Do what Transformer.states does with a cache. normed and given are FP32 where all blocks are taken apart.

        Padding is computed too. What is written of it lies after the end of its row, and is overwritten later.
        """
        model, starts = self.model, cache.lengths
        if None in self.blocks or not _is_step(tokens, starts, cache.max_seq_len) or cache.form == "expanded":
            return model.states(tokens, cache, lengths)
        with torch.no_grad():
            # 1. token ids to hidden states: [b, s, m]
            x = model.embedded(tokens).float()
            # 2. positions, and the place in the cache
            at = cache.place(model.config, tokens, lengths)
            cos_sin = self._angles.at(at)
            # 3. the blocks, in one call
            x, routing = _run(x, [block for block in self.blocks if block], cache.views(at), cos_sin, starts)
            cache.lengths = at.lengths
            # 4. the final norm: [b, s, m]
            states = normed(x, model.norm) if self._plain_norm else model.norm(x)
            return States(states, x if model.config.mtp_input == "pre_norm" else states, routing, [])

    def mtp(
        self,
        embedding: Float[Tensor, "b s m"],
        before: Float[Tensor, "b s m"],
        cache: MTPCache,
        lengths: Int[Tensor, " b"] | None = None,
    ) -> list[Float[Tensor, "b s m"]]:
        """Do what MTPChain.decode does. States are FP32 of a block that is taken apart."""
        return self.model.mtp.decode(embedding, before, cache, lengths, run=self.mtp_depth)

    def mtp_depth(
        self,
        k: int,
        embedding: Float[Tensor, "b s m"],
        before: Float[Tensor, "b s m"],
        cache: MTPCache,
        at: CachePositions,
    ) -> tuple[Float[Tensor, "b s m"], Float[Tensor, "b s m"]]:
        """Do what MTPChain.decode_depth does, with padding as in `states`."""
        weights, depth, chain = self.mtp_blocks[k], k + 1, self.model.mtp
        module: MTP = chain[k]
        starts = (at.positions[:, 0] - depth).expand(len(embedding))
        short = cache.form == "expanded" or not _is_step(embedding, starts, cache.stores[k].data.shape[1])
        with torch.no_grad():
            if weights is None or short:
                return chain.decode_depth(k, embedding, before.to(embedding.dtype), cache, at)
            # 1. join what the depth before knows with the embedding: [b, s, m]
            x = module.eh_proj(normed(embedding.float(), module.enorm, before.float(), module.hnorm))
            # 2. the block and its norm
            at = at.before(depth)
            view = LayerCacheView(store=cache.stores[k], at=at, form=cache.form)
            x, _ = _run(x, [weights], [view], self._angles.at(at), starts)
            states = normed(x, module.norm)
            return states, x if chain.pre_norm else states


def _run(
    x: Float[Tensor, "b s m"],
    blocks: list[BlockWeights],
    caches: Sequence[LayerCacheView],
    cos_sin: CosSin,
    starts: Int[Tensor, " b"],
) -> tuple[Float[Tensor, "b s m"], list[Routing]]:
    """Run blocks that are taken apart. A counter of work sees each operation of theirs."""
    run = blocks_step.reference if ops.is_counting() else blocks_step
    x, *routing = run(x, blocks, caches, cos_sin, starts)
    return x, [Routing(*routing[i : i + 4]) for i in range(0, len(routing), 4)]


def _is_step(x: Tensor, starts: Int[Tensor, " b"], room: int) -> bool:
    """Return True for a few tokens [b, s] after others, if the padded rows fit into the cache."""
    b, s = x.shape[:2]
    if b * s > MOST_TOKENS:
        return False
    positions = starts.tolist()
    return any(positions) and min(positions) >= 0 and max(positions) + s <= room


class _Angles:
    """Cos and sin of positions 0, 1, ..., as far as they have been asked for."""

    def __init__(self, rope: Rope) -> None:
        self.rope, self.known = rope, 0

    def at(self, place: CachePositions) -> CosSin:
        """Return cos and sin of the angles of new tokens: [#b, s, pairs]."""
        positions, start = place.positions, place.start
        end = int(positions.max()) + 1 if start is None else start + positions.shape[1]
        if end > self.known:
            self.known = max(256, 2 * end)
            self.cos, self.sin = self.rope.cos_sin(torch.arange(self.known)[None])
        if start is None:
            return self.cos[0, positions], self.sin[0, positions]
        return self.cos[:, start:end], self.sin[:, start:end]
