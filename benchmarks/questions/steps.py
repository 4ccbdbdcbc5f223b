"""Speed is next to the roofs, bytes and FLOPs are next to their lower bounds.

Bytes count each input and output of every operation once, in the whole model. Their lower bound follows from the
config: the weights that a token uses, the cache, and operands and results of the products. The ratio of the two shows
what kernels can still save.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import models
from benchmarks.question import Case, Figure, Question, Setting, cases_over, check_bandwidth, drawing, figure, pick
from dsmini import TrainConfig, accounting
from dsmini.inference.fused.decoder import Decoder
from dsmini.measure import prediction
from dsmini.measure.counting import Count, count
from dsmini.measure.memory import peak_since_reset, reset_peak
from dsmini.measure.turns import Estimate, in_turns
from dsmini.measure.workloads import (
    ROOM,
    Step,
    Work,
    prefill_step,
    random_cache,
    random_model,
    random_tokens,
    training_step,
)
from dsmini.nn import Routing
from dsmini.report import Value

DRAWN = 8
"""Number of decoding steps, each of other tokens, whose bytes and experts are averaged."""
LEAST = "whole model; predicted: lower bound, operands and results of each product once; measured: of all operations"
LEAST_FLOPS = "whole model; predicted: lower bound, the products of the formula (causal, without padding)"
COLD = "measured: bytes from memory, not from a cache; predicted: the roof"
ADAMW = TrainConfig(optimizer="adamw")


def measure(work: Work, setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    """Yield the figures of a step. tokens: those of a sequence; in decoding, those in the cache."""
    device, size = setting.device, dict[str, Any](batch_size=batch, seq_len=tokens)
    if work == "training":
        config = dataclasses.replace(models.TRAINED, max_seq_len=1024)
        step: Step = training_step(config, ADAMW, setting.dtype, batch, tokens, device)
        flops = accounting.step_flops(config, **size).total / (batch * tokens)
        least = partial(accounting.training_bytes_per_token, config, **size, dtype=setting.dtype_name)
        yield from measured({"batch": batch, "tokens": tokens}, step, setting, batch * tokens, flops, least)
        return
    model = random_model(models.decoded(setting.quick), device, setting.dtype)
    if work == "prefill":
        step = prefill_step(model, batch, tokens)
        flops = accounting.step_flops(model.config, **size, training=False, last_logits=True).total / (batch * tokens)
        known = {"seq_len": tokens, "batch": batch, "dtype": setting.dtype_name}
        least = partial(accounting.prefill_bytes_per_token, model.config, **known)
        yield from measured({"batch": batch, "tokens": tokens}, step, setting, batch * tokens, flops, least)
        return
    cache, decoder = random_cache(model, batch, tokens, ROOM), Decoder(model)

    @torch.no_grad()
    def decode() -> list[Routing]:
        """Decode other tokens each time, which choose other experts."""
        cache.truncate(tokens)
        states = decoder.states(random_tokens(model.config, batch, 1, device), cache)
        model.head(states.normed)
        return states.routing

    known = {"context": tokens + 1, "batch": batch, "dtype": setting.dtype_name}
    least = partial(accounting.decode_bytes_per_token, model.config, **known)
    flops = accounting.decode_flops_per_token(model.config, context=tokens + 1).total
    yield from measured({"batch": batch, "context": tokens}, decode, setting, batch, flops, least, DRAWN)


def measured(
    case: Mapping[str, Value],
    step: Step,
    setting: Setting,
    tokens: int,
    least_flops: float,
    least_bytes: Any,
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
    peak, flops = setting.roofs.peak[setting.dtype_name], counted.flops / tokens
    yield figure("tokens_per_s", case, rate(tokens), predicted=tokens / prediction.seconds(counted, setting.roofs))
    yield figure("bytes_per_token", case, moved, predicted=least_bytes, bound=True, note=LEAST)
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
    first, more = speed[0], list[str]()
    for metric, words in (("bandwidth", "what memory allows"), ("flop_rate", "the matrix peak")):
        more += [f"at {f.ratio:.0%} of {words}" for f in pick(figures, metric, **first.case) if f.ratio]
    if first.ratio:
        more.append(f"{first.ratio:.2f} times the predicted speed")
    least = pick(figures, "bytes_per_token", **first.case)
    more += [f"bytes are {f.ratio:.2f} times the least" for f in least if f.ratio]
    return f"{'; '.join(told)}. The first is {', '.join(more)}."


Points = list[tuple[int, int]]


def question(
    work: Work, title: str, about: str, quick: Points, full: Points, seconds: tuple[float, float], **words: str
) -> Question:
    """Return the question of one kind of step.

    Args:
        quick, full: batches, and tokens of a sequence or in the cache.
        seconds: estimates of a case, quick and full.
        words: `what` of the answer, and title of the `plot`.
    """
    key = "context" if work == "decode" else "tokens"

    def cases(setting: Setting) -> list[Case]:
        points, estimate = (quick, seconds[0]) if setting.quick else (full, seconds[1])
        return cases_over("batch={} " + key + "={}", points, estimate, partial(measure, work, setting))

    return Question(
        name=work.replace("training", "train"),
        title=title,
        about=f"{about} {__doc__}",
        cases=cases,
        answer=partial(answer, what=words["what"]),
        plots=(drawing("tokens_per_s", words["plot"], x=key, by="batch"),),
    )


DECODE = question(
    "decode",
    "How fast is decoding, and how many bytes does a token move?",
    "Single tokens are decoded from a cache of random rows.",
    [(1, 128), (1, 1024), (4, 128)],
    [(1, 128), (1, 2048), (1, 8192), (4, 2048), (16, 2048)],
    (3.0, 18.0),
    what="batch {batch} at context {context:,}",
    plot="Decoded tokens a second",
)
PREFILL = question(
    "prefill",
    "How fast does a model read a prompt?",
    "The whole prompt goes through the model in one call; the head takes its last token.",
    [(1, 128), (1, 512)],
    [(1, 128), (1, 512), (1, 2048), (4, 512)],
    (3.0, 20.0),
    what="a prompt of {tokens:,} in batches of {batch}",
    plot="Prompt tokens a second",
)
TRAIN = question(
    "training",
    "How fast does a model train, compared with the roofs of this machine?",
    "A step is forward, backward, clipping and AdamW of 7.6M parameters on random tokens.",
    [(4, 256)],
    [(4, 256), (16, 256), (4, 1024)],
    (6.0, 30.0),
    what="sequences of {tokens:,} in batches of {batch}",
    plot="Training tokens a second",
)
