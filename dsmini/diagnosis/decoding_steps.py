"""Decoding steps, each the same work: one token for every sequence after the same number of cached tokens.

    cached tokens         0 1 2 ... context-1 | new token        the new token's row is written, and attends to all
    after the step        0 1 2 ... context-1 |                  the cache is cut back to where it was

A step is what generation does: embed the last token, run the blocks with the cache, make logits, take the likeliest
token. A point says where steps decode; a maker makes steps of a model at a point; a variant is a changed model with its
maker. The same variants make the steps that are timed and those that are priced before, which compute nothing
(measure/dry.py). A variant shares every module with its model but those that differ, so that it takes little memory,
and the model stays as it is.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dsmini.accounting import mha_twin
from dsmini.diagnosis.training import dense_baseline, uniformly
from dsmini.inference.fused import Decoder
from dsmini.inference.sampling import Sampling, likeliest
from dsmini.inference.speculative import Drafter, agreed
from dsmini.measure.workloads import ROOM, StepDtype, random_cache, random_tokens
from dsmini.nn import Block, Cache, MoE, Rope, Transformer
from dsmini.nn.attention import Attention
from dsmini.nn.cache import Form
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.mtp import MTPChain

TURN = 0.02
"""Least seconds of the steps that are timed together: a single one of a small model is shorter than a clock's noise."""
MOST_STEPS = 256
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Place where steps decode."""

    batch: int
    """Number of sequences."""
    context: int
    """Number of cached tokens of each sequence."""
    tokens: Int[Tensor, "b 1"] | None = None
    """Last token of each sequence; None: random ones."""
    rows: Cache | None = None
    """Cache whose rows are copied where they fit; None: random rows."""


Run = Callable[[], object]
"""Takes one decoding step."""
Maker = Callable[[Transformer, Point], Run]


def steps_at(form: Form | None) -> Maker:
    """Return the maker of steps: by the modules in a form of MLA, or as generation takes them, for None."""
    return lambda model, point: steps_with(model, filled_cache(model, point), tokens_of(model, point), form)


def steps_with(model: Transformer, cache: Cache, tokens: Int[Tensor, "b 1"], form: Form | None = None) -> Run:
    """Return steps with this cache: as generation takes them, by kernels where they serve and MLA absorbed.

    Args:
        form: form of MLA of steps by the modules themselves, which have both; None: as generation takes them.
    """
    states_of, context = Decoder(model).states if form is None else model.states, cache.lengths.clone()
    cache.form = form or cache.form

    @torch.no_grad()
    def step() -> object:
        states = states_of(tokens, cache)
        cache.truncate(context)
        return likeliest(model.head(states.normed))

    return step


def guessing_steps(model: Transformer, point: Point) -> Run:
    """Return steps in which multi-token prediction guesses and the model checks; each is back at the point."""
    decoder, tokens = Decoder(model), tokens_of(model, point)
    room = min(ROOM, model.config.max_seq_len - point.context)
    cache = model.new_cache(point.batch, point.context + room, mtp=True)
    mtp = cache.mtp
    assert mtp is not None, "the cache was made with mtp=True"
    for store in [*cache.stores, *mtp.stores]:
        store.data[:, : point.context].normal_(generator=torch.Generator(store.data.device).manual_seed(0))
    lengths = torch.full((point.batch,), point.context)
    live, hidden = [True] * point.batch, [torch.randn_like(each) for each in mtp.last]

    @torch.no_grad()
    def step() -> object:
        cache.lengths, mtp.lengths, mtp.last = lengths.clone(), lengths.clone(), list(hidden)
        guesses, _ = Drafter(decoder, cache, Sampling()).guess(tokens, live, None)
        states = decoder.states(torch.cat((tokens, guesses), 1), cache)
        best = likeliest(model.head(states.normed))
        return [agreed(*row) for row in zip(guesses.tolist(), best.tolist(), strict=True)]

    return step


def filled_cache(model: Transformer, point: Point) -> Cache:
    """Return a cache of a model with the point's rows, or random ones, and room for new tokens."""
    room = min(ROOM, model.config.max_seq_len - point.context)
    cache = random_cache(model, point.batch, point.context, room)
    if point.rows is not None:
        pairs = [*zip(cache.stores, point.rows.stores, strict=True)]
        pairs += zip(cache.index_stores, point.rows.index_stores, strict=False)  # a baseline has no indexers
        for store, given in pairs:
            if store.data.shape[2] == given.data.shape[2] and given.data.shape[1] >= point.context:
                store.data[:, : point.context] = given.data[:, : point.context].to(store.data.dtype)
    return cache


def tokens_of(model: Transformer, point: Point) -> Int[Tensor, "b 1"]:
    """Return the last token of each sequence."""
    return random_tokens(model.config, point.batch, 1, model.device) if point.tokens is None else point.tokens


def timed(run: Run) -> Callable[[], float]:
    """Return what takes steps, as many as a turn needs, and returns the mean seconds of one."""
    run()
    start = time.perf_counter()
    run()
    steps = max(1, min(MOST_STEPS, round(TURN / max(1e-6, time.perf_counter() - start))))

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            run()
        return (time.perf_counter() - start) / steps

    return turn


# --- variants of a model


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Steps of a changed model. The same variant is the same object, so that what is known of it is stored by it."""

    change: Callable[[Transformer], Transformer] = lambda model: model
    make: Maker = field(default=steps_at(None))
    context: int | None = None
    """Number of cached tokens instead of the point's."""
    dtype: StepDtype | None = None
    """Dtype in which it holds its weights; None: the model's."""
    keeps_attention: bool = False
    """Attention is that of plain steps, as long as the cache has the same dtype."""
    rates_of: Literal["decode", "prefill"] = "decode"
    """Work whose rates price it: what runs by modules is priced as in prefill."""

    def at(self, point: Point) -> Point:
        """Return the point where its steps decode."""
        return point if self.context is None else replace(point, context=self.context)

    def steps(self, model: Transformer, point: Point) -> Run:
        """Return its steps of this model."""
        return self.make(self.change(model), self.at(point))


def shallow(module: M) -> M:
    """Return a copy that shares parameters and inner modules, of which each may be replaced."""
    made = copy.copy(module)
    for part in ("_modules", "_parameters", "_buffers"):
        made.__dict__[part] = dict(module.__dict__[part])
    return made


def with_blocks(model: Transformer, change: Callable[[Block], None]) -> Transformer:
    """Return a variant of which `change` gets a copy of each block, to put other modules into."""
    variant, blocks = shallow(model), [shallow(block) for block in model.layers if isinstance(block, Block)]
    for block in blocks:
        change(block)
    variant.layers = nn.ModuleList(blocks)
    return variant


def with_mha(model: Transformer) -> Transformer:
    """Return a variant with multi-head attention of as many heads and the same widths, and random weights in it."""
    config, like = mha_twin(model.config), model.embed.weight

    def change(block: Block) -> None:
        block.attn = Attention(config).to(like.device, like.dtype)

    variant = with_blocks(model, change)
    variant.config, variant.rope = config, Rope.from_config(config)
    return variant


def with_dense(model: Transformer) -> Transformer:
    """Return a variant with a dense feed-forward for each mixture of experts, with as many active parameters."""
    like = model.embed.weight

    def change(block: Block) -> None:
        if isinstance(block.ffn, MoE):
            block.ffn = dense_baseline(model.config).to(like.device, like.dtype)

    return with_blocks(model, change)


def with_uniform_routing(model: Transformer) -> Transformer:
    """Return a variant whose tokens go to all experts in turn."""

    def change(block: Block) -> None:
        if isinstance(block.ffn, MoE):
            block.ffn = shallow(block.ffn)
            gate = block.ffn.gate = shallow(block.ffn.gate)
            gate.forward = partial(uniformly, gate, gate.forward)

    return with_blocks(model, change)


def with_weights_in(dtype: torch.dtype, model: Transformer) -> Transformer:
    """Return a variant whose matrices are held, and multiplied, in a dtype; without multi-token prediction."""
    variant = shallow(model)
    for name in ("embed", "layers", "norm", "head"):
        setattr(variant, name, copy.deepcopy(getattr(model, name)).to(dtype))
    variant.mtp = MTPChain(replace(model.config, n_mtp_layers=0), Block)
    variant.compute_dtype = dtype
    return variant


def with_fp8_weights(model: Transformer) -> Transformer:
    """Return a variant whose matrices in the blocks are held as E4M3 codes with scales, and the rest in BF16."""
    return hold_all_fp8(with_weights_in(torch.bfloat16, model))


PLAIN = Variant()
FREE_CACHE = Variant(context=1)
ABSORBED = Variant(make=steps_at("absorbed"), rates_of="prefill")
EXPANDED = Variant(make=steps_at("expanded"), rates_of="prefill")
ROUTED = Variant(make=steps_at("auto"), rates_of="prefill")
UNIFORM = Variant(change=with_uniform_routing, make=ROUTED.make, rates_of="prefill")
MHA = Variant(change=with_mha)
DENSE = Variant(change=with_dense, keeps_attention=True)
DRAFTS = Variant(make=guessing_steps)
WEIGHTS = {
    "bfloat16": Variant(change=partial(with_weights_in, torch.bfloat16), dtype="bfloat16", keeps_attention=True),
    "fp8": Variant(change=with_fp8_weights, dtype="fp8", keeps_attention=True),
}
"""Variants by the dtype in which weights are held."""
