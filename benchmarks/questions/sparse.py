"""Sparse attention next to dense, in decoding and in reading prompts.

The same weights run with dense MLA and with an indexer, in turns. The indexer has V3.2's proportions: half the heads of
MLA, a quarter of the latent's width, a seventeenth of the operations of dense attention to a cached token. Decoding
reads one token of one sequence after a cache of random rows, with all layers. A prompt is read by two layers, in parts
as dsmini.generate reads it. Dense MLA also reads it in one call, and the faster way is compared. Weights and rows are
random, so picks are spread over the context.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import models
from benchmarks.models import decoding
from benchmarks.question import (
    Case,
    Figure,
    Question,
    Setting,
    cases_over,
    compared,
    drawing,
    pick,
    race,
    seconds_of_products,
)
from dsmini import ModelConfig, Transformer, accounting
from dsmini.inference.generation import prefill
from dsmini.measure.turns import Run
from dsmini.measure.workloads import ROOM, StepShape, prefill_step, random_model, random_tokens
from dsmini.nn import Cache

TOPK, QUICK_TOPK = 2048, 256
PROMPT_LAYERS = 2


def cases(setting: Setting) -> list[Case]:
    contexts = [128, 512, 2048] if setting.quick else [1024, 2048, 4096, 8192, 16384, 32768]
    prompts = [512] if setting.quick else [2048, 4096, 8192, 16384]
    work = {n: accounting.flops_per_token(base(setting, PROMPT_LAYERS), n, causal=False).total * n for n in prompts}
    expected = {n: seconds_of_products(30 * flops, setting.dtype, setting) for n, flops in work.items()}
    seconds, reading = 4.0 if setting.quick else 20.0, partial(prompt_speed, setting)
    return [
        *cases_over("decode context={}", ((n,) for n in contexts), seconds, partial(decode_speed, setting)),
        # two rounds to warm up and to count, then six of three ways; attention is far below the peak rate
        *(Case(key=f"prompt={n}", seconds=2.0 + expected[n], run=partial(reading, n)) for n in prompts),
    ]


def base(setting: Setting, layers: int | None = None) -> ModelConfig:
    """Return the dense config, with room for tokens after the longest context."""
    config = models.decoded(setting.quick)
    return dataclasses.replace(config, n_layers=layers or config.n_layers, max_seq_len=config.max_seq_len + ROOM)


def sparse_and_dense(config: ModelConfig, setting: Setting) -> dict[str, Transformer]:
    """Return a sparse model, and a dense one with the same weights."""
    dense = random_model(config, setting.device, setting.dtype)
    indexed = models.sparse(config, QUICK_TOPK if setting.quick else TOPK)
    sparse = random_model(indexed, setting.device, setting.dtype)
    sparse.load_state_dict(dense.state_dict(), strict=False, assign=True)
    return {"sparse": sparse, "dense": dense}


@torch.no_grad()
def decode_speed(setting: Setting, context: int) -> Iterator[Figure]:
    """Yield the time of a decoded token, sparse and dense."""
    runs, predicted = decoding(sparse_and_dense(base(setting), setting), setting, 1, context)
    yield from race(setting, {"context": context}, runs, predicted=predicted)


@torch.no_grad()
def prompt_speed(setting: Setting, tokens: int) -> Iterator[Figure]:
    """Yield the time of a prompt, sparse and dense in parts, and dense in one call."""
    both = sparse_and_dense(base(setting, PROMPT_LAYERS), setting)
    prompt = random_tokens(base(setting), 1, tokens, setting.device)[0].tolist()

    def read(model: Transformer, cache: Cache) -> None:
        cache.truncate(0)
        prefill(model, cache, [prompt])

    runs: dict[str, Run] = {name: partial(read, model, model.new_cache(1, tokens)) for name, model in both.items()}
    runs["dense in one call"] = prefill_step(both["dense"], 1, tokens)

    def dry(config: ModelConfig) -> Run:
        model = random_model(config, setting.device, setting.dtype)
        return partial(read, model, model.new_cache(1, tokens))

    shape: dict[str, Any] = {"work": "prefill", "dtype": setting.dtype_name, "batch": 1, "tokens": tokens}
    shapes = {name: StepShape(config=model.config, **shape) for name, model in both.items()}
    predicted = setting.predicted(shapes, dry) | setting.predicted({"dense in one call": shapes["dense"]})
    yield from race(setting, {"prompt": tokens}, runs, predicted=predicted, count=6, least=6)


def answer(figures: list[Figure]) -> str:
    told = []
    for key, what in (("context", "a decoded token"), ("prompt", "a prompt")):
        ratios = [f for f in pick(figures, "times_as_long") if key in f.case and f.measured]
        # dense attention reads a prompt in the faster of its two ways
        best: dict[float, Figure] = {}
        for f in sorted(ratios, key=lambda f: (f.case[key], -(f.measured or 0.0))):
            best[float(f.case[key])] = f
        gains = list(best.values())
        if gains:
            told.append(
                f"time of {what} with all keys, next to that with a few: {compared(gains, key, '{} tokens in')}"
            )
        if len(gains) > 1:
            measured, expected = (break_even(gains, key, part) for part in ("measured", "predicted"))
            told.append(f"it pays from {measured} on (predicted: {expected})")
    return f"Sparse attention: {'; '.join(told)}." if told else ""


def break_even(gains: list[Figure], key: str, part: str) -> str:
    """Return the number of tokens where the gain passes 1, between the cases on a logarithmic scale."""
    points = [(float(f.case[key]), value) for f in gains if (value := getattr(f, part))]
    for (low, before), (high, after) in itertools.pairwise(points):
        if before < 1 <= after:
            share = math.log(1 / before) / math.log(after / before)
            return f"{low * (high / low) ** share:,.0f} tokens"
    return "every length" if all(gain >= 1 for _, gain in points) else "no length"


QUESTION = Question(
    name="sparse",
    title="From which context on does DeepSeek Sparse Attention pay, and how much?",
    about=__doc__,
    cases=cases,
    answer=answer,
    plots=(
        drawing("seconds", "Time of a decoded token", x="context", by="model"),
        drawing("seconds", "Time of a prompt", x="prompt", by="model"),
    ),
    on_request=True,
)
