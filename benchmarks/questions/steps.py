"""Speed is next to the roofs, bytes and FLOPs are next to their lower bounds.

Bytes count each input and output of every operation once, in the whole model. Their lower bound follows from the
config: the weights that a token uses, the cache, and operands and results of the products. The ratio of the two shows
what kernels can still save.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import models
from benchmarks.question import Case, Figure, Question, Setting, cases_over, check_bandwidth, figure, pick
from dsmini import TrainConfig, accounting
from dsmini.inference.fused.decoder import Decoder
from dsmini.measure import prediction
from dsmini.measure.counting import Count, count
from dsmini.measure.memory import peak_since_reset, reset_peak
from dsmini.measure.turns import Estimate, in_turns
from dsmini.measure.workloads import (
    ROOM,
    Step,
    prefill_step,
    random_cache,
    random_model,
    random_tokens,
    training_step,
)
from dsmini.nn import Routing
from dsmini.report import Value
from dsmini.report.charts import lines

DRAWN = 8
"""Number of decoding steps, each of other tokens, whose bytes and experts are averaged."""
LEAST = "whole model; predicted: lower bound, operands and results of each product once; measured: of all operations"
LEAST_FLOPS = "whole model; predicted: lower bound, the products of the formula (causal, without padding)"
COLD = "measured: bytes from memory, not from a cache; predicted: the roof"
ADAMW = TrainConfig(optimizer="adamw")


def decode(setting: Setting, batch: int, context: int) -> Iterator[Figure]:
    model = random_model(models.decoded(setting.quick), setting.device, setting.dtype)
    cache, decoder = random_cache(model, batch, context, ROOM), Decoder(model)

    @torch.no_grad()
    def step() -> list[Routing]:
        """Decode other tokens each time, which choose other experts."""
        cache.truncate(context)
        states = decoder.states(random_tokens(model.config, batch, 1, setting.device), cache)
        model.head(states.normed)
        return states.routing

    new = {"context": context + 1, "batch": batch, "dtype": setting.dtype_name}
    least = partial(accounting.decode_bytes_per_token, model.config, **new)
    flops = accounting.decode_flops_per_token(model.config, context=context + 1).total
    yield from measured({"batch": batch, "context": context}, step, setting, batch, flops, least, DRAWN)


def prefill(setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    model = random_model(models.decoded(setting.quick), setting.device, setting.dtype)
    config, step = model.config, prefill_step(model, batch, tokens)
    flops = accounting.step_flops(config, batch_size=batch, seq_len=tokens, training=False, last_logits=True).total
    size = {"seq_len": tokens, "batch": batch, "dtype": setting.dtype_name}
    least = partial(accounting.prefill_bytes_per_token, config, **size)
    n = batch * tokens
    yield from measured({"batch": batch, "tokens": tokens}, step, setting, n, flops / n, least)


def train(setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    config = dataclasses.replace(models.TRAINED, max_seq_len=1024)
    flops = accounting.step_flops(config, batch_size=batch, seq_len=tokens).total
    size = {"seq_len": tokens, "batch_size": batch, "dtype": setting.dtype_name}
    least = partial(accounting.training_bytes_per_token, config, **size)
    step, n = training_step(config, ADAMW, setting.dtype, batch, tokens, setting.device), batch * tokens
    yield from measured({"batch": batch, "tokens": tokens}, step, setting, n, flops / n, least)


def measured(
    case: Mapping[str, Value],
    step: Step,
    setting: Setting,
    tokens: int,
    least_flops: float,
    least_bytes: Callable[..., Any],
    drawn: int = 1,
) -> Iterator[Figure]:
    """Measure a step that returns its routing, and yield its figures.

    Args:
        tokens: number of tokens in a step.
        least_flops: FLOPs of a token by the formula.
        least_bytes: function from the number of distinct experts to the traffic of a token.
        drawn: number of counted steps whose bytes and experts are averaged.
    """
    reset_peak()
    step()
    experts: list[float] = []

    def counted_step() -> None:
        experts.extend(float((routing.counts > 0).sum()) for routing in step())

    counts = [count(counted_step, setting.roofs.cache_bytes) for _ in range(drawn)]
    seconds = in_turns({"step": step}, setting.device, **setting.turns).estimate("step")
    bound = least_bytes(experts=statistics.fmean(experts) if experts else None).total
    moved = statistics.fmean(each.bytes for each in counts) / tokens
    yield from step_figures(case, counts[0], seconds, setting, tokens, least_flops, bound, moved)


def step_figures(
    case: Mapping[str, Value],
    counted: Count,
    seconds: Estimate,
    setting: Setting,
    tokens: int,
    least_flops: float,
    least_bytes: float,
    moved: float,
) -> Iterator[Figure]:
    """Yield the figures of a step: speed, bytes and FLOPs with their lower bounds, and the roofs.

    Raises: ValueError for a bandwidth far above the roof.
    """

    def rate(amount: float) -> Estimate:
        ends = {"low": amount / seconds.high, "high": amount / seconds.low if seconds.is_clear else float("inf")}
        return Estimate(value=amount / seconds.value, turns=seconds.turns, **ends)

    cold = sum(op.cold for op in counted.operations)
    memory = check_bandwidth(f"a step of {dict(case)}", cold / seconds.value, setting)
    expected = tokens / prediction.seconds(counted, setting.roofs)
    peak = setting.roofs.peak[setting.dtype_name]
    yield figure("tokens_per_s", case, rate(tokens), predicted=expected)
    yield figure("bytes_per_token", case, moved, predicted=least_bytes, bound=True, note=LEAST)
    flops = counted.flops / tokens
    yield figure("flops_per_token", case, flops, predicted=least_flops, bound=True, note=LEAST_FLOPS)
    yield figure("bandwidth", case, rate(cold), predicted=memory, bound=True, note=COLD)
    yield figure("flop_rate", case, rate(counted.flops), predicted=peak, bound=True, note="predicted: the roof")
    whole = "whole process, torch and other libraries included" if setting.device.type == "cpu" else ""
    yield figure("peak_memory", case, float(peak_since_reset(setting.device)), note=whole)


def answer(figures: list[Figure], what: str) -> str:
    """Return the speed at both ends, and what bounds it."""
    speed = [f for f in pick(figures, "tokens_per_s") if f.measured]
    if not speed:
        return ""
    told = [f"{f.measured:,.1f} tokens/s with {what.format(**f.case)}" for f in speed[:1] + speed[1:][-1:]]
    first = speed[0].case
    for metric, words in (("bandwidth", "what memory allows"), ("flop_rate", "the matrix peak")):
        told += [f"at {f.ratio:.0%} of {words}" for f in pick(figures, metric, **first) if f.ratio]
    if speed[0].ratio:
        told.append(f"{speed[0].ratio:.2f} times the predicted speed")
    told += [f"bytes are {f.ratio:.2f} times the least" for f in pick(figures, "bytes_per_token", **first) if f.ratio]
    return f"{'; '.join(told[: len(speed[:2])])}. The first is {', '.join(told[len(speed[:2]) :])}." if told else ""


def _points(quick: list[tuple[int, int]], full: list[tuple[int, int]], setting: Setting) -> list[tuple[int, int]]:
    return quick if setting.quick else full


def decode_cases(setting: Setting) -> list[Case]:
    points = _points([(1, 128), (1, 1024), (4, 128)], [(1, 128), (1, 2048), (1, 8192), (4, 2048), (16, 2048)], setting)
    return cases_over("batch={} context={}", points, 3.0 if setting.quick else 18.0, partial(decode, setting))


def prefill_cases(setting: Setting) -> list[Case]:
    points = _points([(1, 128), (1, 512)], [(1, 128), (1, 512), (1, 2048), (4, 512)], setting)
    return cases_over("batch={} tokens={}", points, 3.0 if setting.quick else 20.0, partial(prefill, setting))


def train_cases(setting: Setting) -> list[Case]:
    points = _points([(4, 256)], [(4, 256), (16, 256), (4, 1024)], setting)
    return cases_over("batch={} tokens={}", points, 6.0 if setting.quick else 30.0, partial(train, setting))


DECODE = Question(
    name="decode",
    title="How fast is decoding, and how many bytes does a token move?",
    about=f"Single tokens are decoded from a cache of random rows. {__doc__}",
    cases=decode_cases,
    answer=partial(answer, what="batch {batch} at context {context:,}"),
    plots=(lambda figures: lines(figures, "tokens_per_s", x="context", by="batch", title="Decoded tokens a second"),),
)
PREFILL = Question(
    name="prefill",
    title="How fast does a model read a prompt?",
    about=f"The whole prompt goes through the model in one call; the head takes its last token. {__doc__}",
    cases=prefill_cases,
    answer=partial(answer, what="a prompt of {tokens:,} in batches of {batch}"),
    plots=(lambda figures: lines(figures, "tokens_per_s", x="tokens", by="batch", title="Prompt tokens a second"),),
)
TRAIN = Question(
    name="train",
    title="How fast does a model train, compared with the roofs of this machine?",
    about=f"A step is forward, backward, clipping and AdamW of 7.6M parameters on random tokens. {__doc__}",
    cases=train_cases,
    answer=partial(answer, what="sequences of {tokens:,} in batches of {batch}"),
    plots=(lambda figures: lines(figures, "tokens_per_s", x="tokens", by="batch", title="Training tokens a second"),),
)
