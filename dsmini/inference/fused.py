"""A decoding step in few calls of C++, in place of the thirty operations of each block: about 2.5 times as fast.

It knows the modules of nn/ by their attributes and writes their forward again, as one operation for each half of a
block. You can skip this file: without it, or where a layer is not plain, the modules themselves run.

A model is taken apart into its weights once for each generation: bare tensors, with their sizes and options.
Only a block whose modules are all dsmini's own is: with a subclass, a hook, a mask, normed heads, simulated FP8,
experts on other processes, FP4 outside of them, a wrapper such as LoRA, or keys that another layer chose it runs as a
module, and then all blocks do. A multi-token prediction block that is not plain runs as it is. The plain versions of
the operations run the modules.

Numbers between operations are FP32. Weights and the cache stay as they are stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.nn import (
    DSA,
    MLA,
    MTP,
    Attention,
    Block,
    Cache,
    CompressedAttention,
    Context,
    Experts,
    FeedForward,
    Gate,
    Indexer,
    Linear,
    MoE,
    QuantizedExperts,
    QuantizedLinear,
    RMSNorm,
    Routing,
    Transformer,
)
from dsmini.nn.cache import CachePositions, Form, LayerCacheView, MTPCache
from dsmini.nn.codec import BLOCK_FP8
from dsmini.nn.compressed_attention import Compressor, EntryIndexer
from dsmini.nn.fp8 import SCALES, FP8Weights
from dsmini.nn.gate import HashGate
from dsmini.nn.hyper_connections import HyperConnection, IdentityConnection
from dsmini.nn.layers import FP32Linear, LayerNorm, is_plain
from dsmini.nn.mtp import MTPChain
from dsmini.nn.residual import PlainResidual
from dsmini.nn.rope import CosSin, Rope
from dsmini.nn.transformer import States
from dsmini.numerics import FP4_BLOCK, WEIGHT_TILE, Weight

KNOWN = (
    *(Block, MTP, PlainResidual, RMSNorm, LayerNorm, Linear, FP32Linear, QuantizedLinear),
    *(MLA, DSA, Indexer, Attention, FeedForward, MoE, Gate, Experts, QuantizedExperts),
    *(CompressedAttention, Compressor, EntryIndexer, HashGate, HyperConnection, IdentityConnection),
)
"""Classes whose equations the kernels have."""
ROLES: dict[str, tuple[type, ...]] = {
    "attn_norm": (RMSNorm,),
    "attn": (MLA, DSA, Attention, CompressedAttention),
    "ffn_norm": (RMSNorm,),
    "ffn": (FeedForward, MoE),
    "hc_attn": (PlainResidual, HyperConnection, IdentityConnection),
    "hc_ffn": (PlainResidual, HyperConnection, IdentityConnection),
}
"""Classes of the children of a block."""
SCORE_FUNCS = ("sigmoid", "softmax", "sqrtsoftplus")
"""Score functions that the kernels have."""
CODES = frozenset({(WEIGHT_TILE, "e4m3", torch.float32)})
EXPERT_CODES = CODES | {((1, FP4_BLOCK), "e2m1", torch.float8_e8m0fnu)}
"""Codes that the kernels read, and those of experts: tile, format and dtype of scales."""
MOST_TOKENS, MOST_WIDTH, MOST_STREAMS = 32, 1024, 8
"""Number of tokens in a step, of numbers in a row of V4's attention, and of streams, up to which kernels serve."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepWeights:
    """One half of a block: its modules, which the plain version of a step runs, and their weights.

    It is x + layer(norm(x)), or reads from several residual streams and writes to them.

    A kernel reads sizes and options from the layer, which stay, and numbers from the weights.
    """

    norm: RMSNorm
    layer: Any
    """MLA, DSA, Attention or CompressedAttention; FeedForward or MoE."""
    residual: Any
    weights: dict[str, Weight]
    """Weights as products take them, by their names in the layer, such as "wq_a" and "indexer.k_norm.bias"; "norm" is
    that of the norm. They are detached: their memory stays, even if a module gets another."""
    dtype: torch.dtype
    """Dtype of products with codes: in BF16 a kernel may round the other operand to it, as the modules do."""
    tiles: ClassVar[tuple[int, int]] = BLOCK_FP8, FP4_BLOCK
    """Numbers that share a scale where V4 rounds rows to FP8, and its indexer's to FP4."""
    prepared: dict[int, Any] = field(default_factory=dict)
    """Weights as a kernel prepares them, by the address of the norm's."""

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors; those of a quantized weight are codes and scales."""
        return tuple(t for weight in self.weights.values() for t in ops.tensors_of(weight))


class BlockWeights(NamedTuple):
    """The two halves of a block."""

    attention: StepWeights
    feed_forward: StepWeights


def why_not_known(module: nn.Module, *classes: type[nn.Module]) -> str:
    """Return why a module may do something else than one of these classes says, without options; "" if it does not."""
    if type(module) not in classes:
        return f"it is a {type(module).__name__}"
    for path, part in module.named_modules():
        name = path or type(module).__name__
        if type(part) not in KNOWN:
            return f"{name} is a {type(part).__name__}"
        if not is_plain(part) or any(callable(value) and hasattr(type(part), key) for key, value in vars(part).items()):
            return f"{name} has a hook or a method of its own"
        if getattr(part, "precision", "native") != "native" or getattr(part, "fp8", False):
            return f"{name} simulates FP8"
        for option in ("mask", "q_head_norm", "exchange"):
            if getattr(part, option, None) is not None:
                return f"{name} has a {option}"
        if isinstance(part, DSA) and part.indexer is None:
            return f"{name} takes the keys that layer {part.source} chose"
        if isinstance(part, FP8Weights) and not held_as(part) <= (EXPERT_CODES if isinstance(part, Experts) else CODES):
            return f"{name} holds codes that are neither E4M3 with FP32 scales of 128x128 blocks nor, in experts, FP4"
        if isinstance(part, HyperConnection) and part.n > MOST_STREAMS:
            return f"{name} has {part.n} streams"
        if isinstance(part, CompressedAttention) and part.head_dim > MOST_WIDTH:
            return f"{name} has heads of {part.head_dim} numbers"
        if isinstance(part, MoE) and getattr(part.shared_experts, "limit", part.experts.limit) != part.experts.limit:
            return f"{name} has another limit of SwiGLU in its shared experts"
        if isinstance(part, Gate) and part.options["score_func"] not in SCORE_FUNCS:
            return f"{name} has score_func={part.options['score_func']!r}"
    return ""


def held_as(part: FP8Weights) -> set[tuple[Any, ...]]:
    """Return the tile, the format and the dtype of scales of each matrix that a module holds as codes."""
    return {(*of[1:], part.get_buffer(SCALES[name]).dtype) for name, of in part.layouts.items()}


def why_as_module(block: nn.Module) -> str:
    """Return why a block must run as it is, or "" if it can be taken apart."""
    if reason := why_not_known(block, Block):
        return reason
    wrong = (
        f"{name} is a {type(part).__name__}" for name, part in block.named_children() if type(part) not in ROLES[name]
    )
    streams = f"hc_attn is a {type(block.hc_attn).__name__} of other attention than V4's"
    one = type(block.hc_attn) is PlainResidual or type(block.attn) is CompressedAttention
    return next(wrong, "" if one else streams)


def extract_weights(block: nn.Module, dtype: torch.dtype) -> BlockWeights | None:
    """Take a block apart, with products in this dtype, or return None if some module of it must run as it is."""
    if why_as_module(block):
        return None
    assert isinstance(block, Block)
    attention = _half(block.attn_norm, block.attn, block.hc_attn, dtype)
    return BlockWeights(attention, _half(block.ffn_norm, block.ffn, block.hc_ffn, dtype))


def _half(norm: Any, layer: nn.Module, residual: Any, dtype: torch.dtype) -> StepWeights:
    weights: dict[str, Weight] = {"norm": norm.weight.detach()}
    for path, module in layer.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(path, recurse=False):
            weight = module.operand(name.rpartition(".")[2]) if isinstance(module, FP8Weights) else parameter
            weights[name.removesuffix(".weight")] = weight.detach() if isinstance(weight, Tensor) else weight
    for name, buffer in layer.gate.named_buffers() if isinstance(layer, MoE) else ():
        weights[f"gate.{name}"] = buffer.detach()
    for name, parameter in residual.named_parameters():
        weights[f"hc.{name}"] = parameter.detach()
    return StepWeights(norm=norm, layer=layer, residual=residual, weights=weights, dtype=dtype)


@ops.operation("normed")
def normed(x: Float[Tensor, "*b m"], norm: RMSNorm) -> Float[Tensor, "*b m"]:
    """Return norm(x) of the hidden states of a step."""
    return norm(x)


@ops.operation("attention_step")
def attention_step(
    x: Float[Tensor, "b s *streams m"],
    weights: StepWeights,
    cache: LayerCacheView,
    cos_sin: CosSin,
    starts: Int[Tensor, " b"],
) -> Float[Tensor, "b s *streams m"]:
    """Return x with attention(norm(x)) added to it, and append rows to the cache: MLA absorbed, MHA, GQA, MQA and V4's.

    With an indexer a token attends to the keys that it chooses, where some token sees more than topk.

    Args:
        cache: the layer's part of the cache. All its new columns are tokens, or padding that is not stored in V4's.
        cos_sin: of the new tokens; for V4's attention of all positions from 0 on, as entries are of earlier tokens.
        starts: position of each sequence's first new token.

    Source: DeepSeek-V2 report, section 2.1.2; DeepSeek-V3.2 report, section 2.1; DeepSeek-V4 report, section 2.3.
    """
    layer, positions, angles = weights.layer, cache.at.positions, dict[Rope, Any]()
    if isinstance(layer, MLA):
        cache = replace(cache, form="absorbed")
    if not isinstance(layer, CompressedAttention):  # which makes those that it wants
        angles = {layer.rope: (positions, cos_sin)}
    read, mix = weights.residual.read(x)
    y = layer(weights.norm(read), Context(positions=positions, cache=cache, angles=angles))
    return weights.residual.write(x, y, mix)


@ops.operation("feed_forward_step")
def feed_forward_step(
    x: Float[Tensor, "n *streams m"], weights: StepWeights, tokens: Int[Tensor, " n"] | None = None
) -> tuple[Tensor, ...]:
    """Return x with FFN(norm(x)) added, and the routing: indices and weights [n, k], scores [n, e] and counts [e].

    Without a gate the four tensors of the routing are empty.

    Args:
        tokens: ids, for a gate that looks experts up by them.
    """
    x = x.unsqueeze(0)
    read, mix = weights.residual.read(x)
    tokens = None if tokens is None else tokens.unsqueeze(0)
    y = weights.layer(
        weights.norm(read), Context(positions=torch.arange(x.shape[1], device=x.device)[None], tokens=tokens)
    )
    routing: tuple[Tensor, ...] = (
        x.new_empty(0, 0, dtype=torch.int64),
        x.new_empty(0, 0),
        x.new_empty(0, 0),
        x.new_empty(0),
    )
    if not isinstance(y, Tensor):
        y, routing = y
    return weights.residual.write(x, y, mix).squeeze(0), *routing


@ops.operation("blocks_step")
def blocks_step(
    x: Float[Tensor, "b s *streams m"],
    blocks: Sequence[BlockWeights],
    caches: Sequence[LayerCacheView],
    angles: Mapping[Rope, CosSin],
    starts: Int[Tensor, " b"],
    tokens: Int[Tensor, "b s"] | None = None,
) -> tuple[Tensor, ...]:
    """Return x after all blocks, then the four tensors of feed_forward_step's routing for each block with a gate.

    Args:
        caches: each layer's part of the cache.
        angles: cos_sin of attention_step, for each rotary embedding.
        starts, tokens: as in attention_step and feed_forward_step.
    """
    routing: list[Tensor] = []
    ids = None if tokens is None else tokens.flatten()
    for (attention, feed_forward), cache in zip(blocks, caches, strict=True):
        x = attention_step(x, attention, cache, angles[attention.layer.rope], starts)
        y, *routing_of_block = feed_forward_step(x.flatten(0, 1), feed_forward, ids)
        x = y.view(x.shape)
        routing += routing_of_block if isinstance(feed_forward.layer, MoE) else []
    return (x, *routing)


class Decoder:
    """Runs a model on new tokens after a cache, in few calls where it can.

    The weights must stay where they are while it is used: make a new one after a load, a cast or a move.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        dtype = self._dtype = model.compute_dtype or next(model.embed.parameters()).dtype
        fast = dtype in (torch.float32, torch.bfloat16) and ops.serves(
            "blocks_step", torch.empty(0, device=model.device)
        )
        self.blocks: list[BlockWeights | None] = [
            extract_weights(block, dtype) if fast else None for block in model.layers
        ]
        """The weights of each block, or None for one that runs as it is."""
        fast_chain = fast and type(model.mtp) is MTPChain
        self.mtp_blocks: list[BlockWeights | None] = [
            extract_weights(block.get_submodule("block"), dtype)
            if fast_chain and not why_not_known(block, MTP)
            else None
            for block in model.mtp
        ]
        """The same of the multi-token prediction blocks."""
        self._plain_norm, self._plain_head = not why_not_known(model.norm, RMSNorm), is_plain(model.head)
        reasons = (f"layers.{i}: {why}" for i, block in enumerate(model.layers) if (why := why_as_module(block)))
        self.why: str = next(reasons, "") if fast else "no kernels of decoding steps run here, or in this dtype"
        """The reason why the blocks run as modules, or "" where they are taken apart."""
        self._by_position = model.config.attention == "compressed"
        """True where attention wants cos and sin of all positions, not those of the new tokens."""
        ropes = {weights.attention.layer.rope for weights in [*self.blocks, *self.mtp_blocks] if weights}
        nothing = torch.arange(0, device=model.device)[None]
        self._cos_sin: dict[Rope, CosSin] = {rope: rope.cos_sin(nothing) for rope in ropes}
        """Cos and sin of positions 0, 1, ..., as far as they have been asked for, of each rotary embedding."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy or a pickle be a new one: what kernels prepared holds addresses of the weights of this model."""
        return type(self), (self.model,)

    def states(
        self,
        tokens: Int[Tensor, "b s"],
        cache: Cache,
        lengths: Int[Tensor, " b"] | None = None,
        chosen: list[Any] | None = None,
    ) -> States:
        """Do what Transformer.states does with a cache. normed and given are FP32 where all blocks are taken apart.

        Padding is computed too. Its entries lie after the end of their row, and are overwritten later.

        Args:
            chosen: as in Context. Kernels do not tell the keys that they choose, so modules run in their place.
        """
        model, starts = self.model, cache.lengths
        if chosen is not None and model.config.has_indexers:
            return model.states(tokens, cache, lengths, chosen=chosen)
        if None in self.blocks or not _is_step(tokens, starts, cache.max_seq_len) or not _absorbs(cache.form):
            return model.states(tokens, cache, lengths)
        with torch.no_grad():
            # 1. token ids to hidden states: [b, s, m]
            x = model.hc_head.expand(model.embedded(tokens)).float()
            # 2. positions, and the place in the cache
            at = cache.place_tokens(model.config, tokens, lengths)
            angles = self._angles(at)
            # 3. the blocks, in one call
            blocks = [block for block in self.blocks if block]
            x, routing = _run(x, blocks, cache.views(at), angles, starts, tokens)
            cache.lengths = at.lengths
            # 4. the final norm: [b, s, m]
            last = model.hc_head.collapse(x)
            states = normed(last, model.norm) if self._plain_norm else model.norm(last.to(self._dtype))
            return States(states, model.mtp.given(x, states), routing, [])

    def logits(self, states: Float[Tensor, "*b m"]) -> Float[Tensor, "*b v"]:
        """Return the head's logits. A head that is not dsmini's, such as LoRA's wrapper, gets the compute dtype."""
        return self.model.head(states if self._plain_head else states.to(self._dtype))

    def mtp(
        self,
        embedding: Float[Tensor, "b s m"],
        before: Float[Tensor, "b s m"],
        cache: MTPCache,
        lengths: Int[Tensor, " b"] | None = None,
        tokens: Int[Tensor, "b s"] | None = None,
    ) -> list[Float[Tensor, "b s m"]]:
        """Do what MTPChain.decode does. States are FP32 of a block that is taken apart."""
        return self.model.mtp.decode(embedding, before, cache, lengths, self.mtp_depth, tokens)

    def mtp_depth(
        self,
        k: int,
        embedding: Float[Tensor, "b s m"],
        before: Float[Tensor, "b s m"],
        cache: MTPCache,
        at: CachePositions,
        tokens: Int[Tensor, "b s"] | None = None,
    ) -> tuple[Float[Tensor, "b s m"], Float[Tensor, "b s m"]]:
        """Do what MTPChain.decode_depth does, with padding as in `states`."""
        weights, depth, chain = self.mtp_blocks[k], k + 1, self.model.mtp
        module: MTP = chain[k]
        starts = (at.positions[:, 0] - depth).expand(len(embedding))
        short = not _absorbs(cache.form) or not _is_step(embedding, starts, cache.max_seq_len)
        with torch.no_grad():
            if weights is None or short:
                return chain.decode_depth(k, embedding, before.to(embedding.dtype), cache, at, tokens)
            # 1. join what the depth before knows with the embedding: [b, s, m]
            joined = normed(embedding.float(), module.enorm), normed(before.float(), module.hnorm)
            x = module.eh_proj(torch.cat(joined, -1))
            # 2. the block and its norm
            at = at.moved_back(depth)
            x, _ = _run(x, [weights], [cache.views(at)[k]], self._angles(at), starts, tokens)
            states = normed(x, module.norm)
            return states, chain.given(x, states)

    def _angles(self, place: CachePositions) -> dict[Rope, CosSin]:
        """Return the cos and sin that a step wants: of new tokens [#b, s, pairs], or of all positions."""
        positions, start = place.positions, place.shared_start
        end = int(positions.max()) + 1 if start is None else start + positions.shape[1]
        for rope, (cos, _) in self._cos_sin.items():
            if end > cos.shape[1]:
                self._cos_sin[rope] = rope.cos_sin(torch.arange(max(256, 2 * end), device=positions.device)[None])
        if self._by_position:
            return self._cos_sin
        of = (0, positions) if start is None else (slice(None), slice(start, end))
        return {rope: (cos[of], sin[of]) for rope, (cos, sin) in self._cos_sin.items()}


def _run(
    x: Float[Tensor, "b s *streams m"],
    blocks: list[BlockWeights],
    caches: Sequence[LayerCacheView],
    angles: Mapping[Rope, CosSin],
    starts: Int[Tensor, " b"],
    tokens: Int[Tensor, "b s"] | None,
) -> tuple[Float[Tensor, "b s *streams m"], list[Routing]]:
    """Run blocks that are taken apart. A counter of work sees each operation of theirs."""
    run = blocks_step.reference if ops.is_counting() else blocks_step
    x, *routing = run(x, blocks, caches, angles, starts, tokens)
    return x, [Routing(*routing[i : i + 4]) for i in range(0, len(routing), 4)]


def _absorbs(form: Form) -> bool:
    """Return True where a cache may be attended to in the absorbed form, the one that kernels have."""
    return form in ("auto", "absorbed")


def _is_step(x: Tensor, starts: Int[Tensor, " b"], room: int) -> bool:
    """Return True for a few tokens [b, s] after others, if the padded rows fit into the cache."""
    b, s = x.shape[:2]
    if b * s > MOST_TOKENS:
        return False
    positions = starts.tolist()
    return any(positions) and min(positions) >= 0 and max(positions) + s <= room
