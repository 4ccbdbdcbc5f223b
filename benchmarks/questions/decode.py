"""How fast is decoding, and how many bytes does a token move?

Single tokens are decoded from a cache of random rows. Bytes count each input and output of every operation once, in the
whole model. Their lower bound follows from the config: the weights that a token uses, the cache, and operands and
results of the products. The ratio of the two shows what kernels can still save.
"""

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.case import Case, Figure, Plot, Setting, cases_over, pick
from benchmarks.steps import distinct_experts, over_bound, step_figures
from dsmini import accounting
from dsmini.inference.fused.decoder import Decoder
from dsmini.measure.counting import count
from dsmini.measure.memory import reset_peak
from dsmini.measure.timing import times
from dsmini.measure.workloads import ROOM, dtype_name, random_cache, random_model, random_tokens
from dsmini.nn.transformer import States
from dsmini.report.charts import lines

NAME = "decode"
STEPS = 8
"""Number of steps whose bytes and experts are averaged."""


def cases(setting: Setting) -> list[Case]:
    points = [(1, 128), (1, 2048), (1, 8192), (4, 2048), (16, 2048)]
    points = [(1, 128), (1, 1024), (4, 128)] if setting.quick else points
    seconds = 3.0 if setting.quick else 12.0
    return cases_over("batch={} context={}", points, seconds, partial(measure, setting))


@torch.no_grad()
def measure(setting: Setting, batch: int, context: int) -> Iterator[Figure]:
    model = random_model(shapes.decoded(setting.quick), setting.device, setting.dtype)
    cache = random_cache(model, batch, context, ROOM)
    decoder = Decoder(model)

    def step(tokens: Tensor | None) -> States:
        cache.truncate(context)
        given = random_tokens(model.config, batch, 1, setting.device) if tokens is None else tokens
        states = decoder.states(given, cache)
        model.head(states.normed)
        return states

    drawn = [random_tokens(model.config, batch, 1, setting.device) for _ in range(STEPS)]
    reset_peak()
    step(None)
    counted = count(partial(step, drawn[0]), setting.roofs.cache_bytes)
    taken = times(partial(step, None), setting.device, 1.5 if setting.quick else 6.0)
    moved, experts = [], []
    for tokens in drawn:
        moved.append(count(partial(step, tokens)).bytes / batch)
        experts.append(distinct_experts(step(tokens).routing) or 0.0)
    new = {"context": context + 1, "batch": batch, "dtype": dtype_name(setting.dtype)}
    least = accounting.decode_bytes_per_token(model.config, **new, experts=statistics.fmean(experts) or None)
    flops = accounting.decode_flops_per_token(model.config, context=context + 1)
    bounds = {"bytes_bound": least.total, "flops_bound": flops.total, "bytes_measured": statistics.fmean(moved)}
    case = {"batch": batch, "context": context}
    yield from step_figures(NAME, case, counted, taken, batch, setting, **bounds)


def finding(figures: list[Figure]) -> str:
    speed = sorted(pick(figures, "tokens_per_s", batch=1), key=lambda f: f.case["context"])
    if not speed:
        return ""
    first, last = speed[0], speed[-1]
    text = f"{first.measured:,.1f} tokens/s at context {first.case['context']:,}"
    if last is not first:
        text += f", {last.measured:,.1f} at {last.case['context']:,}"
    shares = [f.ratio for f in pick(figures, "bandwidth", **first.case) if f.ratio]
    text += "".join(f"; the first at {share:.0%} of this memory's bandwidth" for share in shares)
    return text + over_bound(figures, first.case) + "."


def plots(figures: list[Figure]) -> list[Plot]:
    return lines(figures, "tokens_per_s", x="context", by="batch", title="Decoded tokens a second")
