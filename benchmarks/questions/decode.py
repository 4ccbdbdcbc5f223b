"""How fast is a token made, what moves for it, and what binds it?"""

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.question import Case, Figure, Plot, Question, Setting, pick
from benchmarks.steps import step_figures
from dsmini import ModelConfig, Transformer, accounting
from dsmini.measure.counting import count
from dsmini.measure.memory import reset_peak
from dsmini.measure.timing import times
from dsmini.measure.workloads import dtype_name, random_cache, random_model, random_tokens
from dsmini.nn import Cache
from dsmini.report.charts import lines

NAME = "decode"
STEPS = 8
"""Whose bytes and experts are averaged."""


def cases(setting: Setting) -> list[Case]:
    config = shapes.QUICK if setting.quick else shapes.BIG
    points = [(1, 128), (1, 2048), (1, 8192), (4, 2048), (16, 2048)]
    points = [(1, 128), (1, 1024), (4, 128)] if setting.quick else points
    seconds = 1.5 if setting.quick else 6.0
    return [
        Case(
            key=f"batch={batch} context={context}",
            seconds=2 * seconds,
            run=lambda b=batch, c=context: measure(config, setting, b, c, seconds),
        )
        for batch, context in points
    ]


@torch.no_grad()
def measure(config: ModelConfig, setting: Setting, batch: int, context: int, seconds: float) -> Iterator[Figure]:
    model = random_model(config, setting.device, setting.dtype)
    cache = random_cache(model, batch, context, 64)  # rows are read in multiples of 64
    same = random_tokens(config, batch, 1, setting.device)
    reset_peak()

    def step(tokens: Tensor | None = None) -> None:
        cache.truncate(context)
        model(random_tokens(config, batch, 1, setting.device) if tokens is None else tokens, cache)

    step()
    counted = count(lambda: step(same), setting.roofs.cache_bytes)
    moved, touched = routed(model, cache, batch, context, step)
    taken = times(step, setting.device, seconds)
    dtype = dtype_name(setting.dtype)

    def predicted(experts: float | None) -> float:
        return accounting.decode_bytes_per_token(
            config, context=context + 1, batch=batch, dtype=dtype, experts=experts, as_run=True
        ).total

    flops = accounting.decode_flops_per_token(config, context=context + 1, as_run=True)
    case = {"batch": batch, "context": context}
    yield from step_figures(
        NAME,
        case,
        counted,
        taken,
        batch,
        setting,
        bytes_measured=moved / batch,
        bytes_predicted=predicted(None),
        bytes_note="predicted: with as many experts as tokens visit that choose alike and independently",
        flops_predicted=flops.total,
    )
    yield Figure(
        question=NAME,
        case=case,
        metric="bytes_per_token_as_routed",
        unit="bytes",
        measured=moved / batch,
        predicted=predicted(touched),
        better="lower",
        note="predicted: with as many experts as these tokens visited",
    )


def routed(
    model: Transformer, cache: Cache, batch: int, context: int, step: Callable[[Tensor], None]
) -> tuple[float, float]:
    """Bytes that a step moves and distinct experts that it visits in a layer, on average over some steps' tokens."""
    moved, touched = [], []
    for _ in range(STEPS):
        tokens = random_tokens(model.config, batch, 1, cache.stores[0].data.device)
        moved.append(count(lambda tokens=tokens: step(tokens)).bytes)
        touched.append(visited(model, tokens, cache, context))
    return statistics.fmean(moved), statistics.fmean(touched)


@torch.no_grad()
def visited(model: Transformer, tokens: Tensor, cache: Cache, context: int) -> float:
    """Distinct experts that a step's tokens visit in a layer, on average over the layers."""
    cache.truncate(context)
    seen = [float((decided.counts > 0).sum()) for decided in model.advance(tokens, cache).routing]
    return statistics.fmean(seen) if seen else 0.0


def finding(figures: list[Figure]) -> str:
    speed = pick(figures, "tokens_per_s", batch=1)
    if not speed:
        return "Nothing was measured yet."
    first = min(speed, key=lambda f: f.case["context"])
    last = max(speed, key=lambda f: f.case["context"])
    moved = next((f for f in pick(figures, "bytes_per_token") if f.case == first.case), None)
    bandwidth = next((f for f in pick(figures, "bandwidth") if f.case == first.case), None)
    text = f"{first.measured:,.1f} tokens/s at context {first.case['context']:,}"
    if last is not first:
        text += f", {last.measured:,.1f} at {last.case['context']:,}"
    if moved and moved.measured and bandwidth and bandwidth.measured and bandwidth.predicted:
        share = bandwidth.measured / bandwidth.predicted
        text += f"; at context {first.case['context']:,} {moved.measured / 1e6:,.0f} MB move for each, "
        text += f"at {share:.0%} of what this memory can do"
    return text + "."


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="context", by="batch", title="Tokens made a second", unit="tokens/s")


QUESTION = Question(
    name=NAME,
    title="How fast is a token made, and what moves for it?",
    cases=cases,
    finding=finding,
    plots=plots,
    about="Single tokens are decoded from a cache of random rows. Bytes are those of every operation that ran, each "
    "input and output once; the prediction is the config's: weights that a token meets, the cache, little else.",
)
