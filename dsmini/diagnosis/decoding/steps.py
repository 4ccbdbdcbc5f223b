"""Decoding steps, each the same work: one token for every sequence after the same number of cached tokens.

    cached tokens         0 1 2 ... context-1 | new token        the new token's row is written, and attends to all
    after the step        0 1 2 ... context-1 |                  the cache is cut back to where it was

A step is what generation does: embed the last token, run the blocks with the cache, make logits, take the likeliest
token. A point says where steps decode; a maker makes steps of a model at a point. The same makers make the steps that
are timed and those that are priced before, which compute nothing (measure/dry.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from dsmini.diagnosis.evidence.evidence import patched
from dsmini.inference.fused.decoder import Decoder
from dsmini.inference.sampling import likeliest
from dsmini.measure.workloads import ROOM, random_cache, random_tokens
from dsmini.nn import Cache, Transformer
from dsmini.nn.cache import Form, LayerCache

TURN = 0.02
"""Least seconds of the steps that are timed together: a single one of a small model is shorter than a clock's noise."""
MOST_STEPS = 256


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

    def at(self, context: int) -> "Point":
        """Return the same with another number of cached tokens."""
        return replace(self, context=context)


Run = Callable[[], object]
"""Takes one decoding step."""
Maker = Callable[[Transformer, Point], Run]


def kernel_steps(model: Transformer, point: Point) -> Run:
    """Return steps as generation takes them: by kernels where they serve, MLA absorbed."""
    return steps_with(model, filled_cache(model, point), tokens_of(model, point))


def steps_with(model: Transformer, cache: Cache, tokens: Int[Tensor, "b 1"]) -> Run:
    """Return steps as generation takes them, with this cache."""
    decoder, context = Decoder(model), cache.lengths.clone()

    @torch.no_grad()
    def step() -> object:
        states = decoder.states(tokens, cache)
        cache.truncate(context)
        return likeliest(model.head(states.normed))

    return step


def module_steps(form: Form) -> Maker:
    """Return the maker of steps by the modules themselves, which have both forms of MLA."""

    def make(model: Transformer, point: Point) -> Run:
        cache, tokens = filled_cache(model, point), tokens_of(model, point)
        context = cache.lengths.clone()

        @torch.no_grad()
        def step() -> object:
            with patched(cache, "form", form):
                states = model.states(tokens, cache)
            cache.truncate(context)
            return likeliest(model.head(states.normed))

        return step

    return make


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


def fill(stores: Sequence[LayerCache], context: int) -> None:
    """Write random rows for the first tokens of a cache."""
    for store in stores:
        generator = torch.Generator(store.data.device).manual_seed(0)
        store.data[:, :context].normal_(generator=generator)


def tokens_of(model: Transformer, point: Point) -> Int[Tensor, "b 1"]:
    """Return the last token of each sequence."""
    return random_tokens(model.config, point.batch, 1, model.device) if point.tokens is None else point.tokens


def steps_in_turn(run: Run) -> int:
    """Return the number of steps to time together."""
    run()
    start = time.perf_counter()
    run()
    return max(1, min(MOST_STEPS, round(TURN / max(1e-6, time.perf_counter() - start))))


def seconds_of(run: Run, steps: int) -> float:
    """Return the mean seconds of this many steps one after another."""
    start = time.perf_counter()
    for _ in range(steps):
        run()
    return (time.perf_counter() - start) / steps
