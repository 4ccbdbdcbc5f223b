"""Speed is next to the roofs, bytes and FLOPs are next to their lower bounds.

Bytes count each input and output of every operation once, in the whole model. Their lower bound follows from the
config: the weights that a token uses, the cache, and operands and results of the products. The ratio of the two shows
what kernels can still save.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import get_args

from benchmarks import models
from benchmarks.models import recipe
from benchmarks.question import (
    Case,
    Figure,
    Question,
    Setting,
    cases_over,
    check_bandwidth,
    drawing,
    figure,
    left_out,
    pick,
)
from dsmini import ModelConfig, TrainConfig, accounting
from dsmini.machine import DTYPES
from dsmini.measure.counting import Count, count, counted_twice
from dsmini.measure.memory import peak_since_reset, reset_peak
from dsmini.measure.roofs import why_unusable
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepDtype, StepShape, Work

DRAWN = 8
"""Number of decoding steps, each of other tokens, whose bytes and experts are averaged."""
LEAST = "whole model; predicted: lower bound, operands and results of each product once; measured: of all operations"
LEAST_FLOPS = "whole model; predicted: lower bound, the products of the formula (causal, without padding)"
COLD = "measured: bytes from memory, not from a cache; predicted: the roof"


def measure(work: Work, setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    """Yield speed, bytes and FLOPs of a step, with their bounds, roofs and predictions, and its memory.

    Args:
        tokens: number of tokens of a sequence; in decoding, of those in the cache.

    Raises: ValueError for a bandwidth far above the roof.
    """
    dtype, each = setting.dtype_name, batch if work == "decode" else batch * tokens
    adamw = TrainConfig(optimizer="adamw")
    config = models.decoded(setting.quick)
    if work == "training":
        config = dataclasses.replace(models.TRAINED, max_seq_len=1024)
        flops = accounting.step_flops(config, batch_size=batch, seq_len=tokens).total / each
        traffic = accounting.training_bytes_per_token
        least = partial(traffic, config, batch_size=batch, seq_len=tokens, dtype=dtype)
    elif work == "prefill":
        whole = accounting.step_flops(config, batch_size=batch, seq_len=tokens, training=False, last_logits=True)
        flops = whole.total / each
        least = partial(accounting.prefill_bytes_per_token, config, seq_len=tokens, batch=batch, dtype=dtype)
    else:
        flops = accounting.decode_flops_per_token(config, context=tokens + 1).total
        least = partial(accounting.decode_bytes_per_token, config, context=tokens + 1, batch=batch, dtype=dtype)
    shape = StepShape(work=work, config=config, dtype=dtype, batch=batch, tokens=tokens, train=adamw)
    step = shape.make(setting.device)
    reset_peak(setting.device)
    step()
    experts: list[float] = []

    def counted_step() -> None:
        experts.extend(float((routing.counts > 0).sum()) for routing in step())

    counts = [count(counted_step, setting.roofs.cache_bytes) for _ in range(DRAWN if work == "decode" else 1)]
    seconds = in_turns({"step": step}, setting.device, **setting.turns).seconds["step"]
    # bytes and FLOPs of a token with their lower bounds, and the rates with the roofs
    cold, peak = sum(op.cold for op in counts[0].operations), setting.roofs.peak[dtype]
    case = {"batch": batch, "context" if work == "decode" else "tokens": tokens}
    memory = check_bandwidth(f"a step of {case}", statistics.median(cold / one for one in seconds), setting)
    moved, found = statistics.fmean(one.bytes for one in counts) / each, counts[0].flops
    least_bytes = least(experts=statistics.fmean(experts)).total
    expected = {name: each / one for name, one in setting.predicted({"step": shape}).items()}.get("step")
    yield figure("tokens_per_s", case, [each / one for one in seconds], predicted=expected)
    yield figure("bytes_per_token", case, moved, predicted=least_bytes, bound=True, note=LEAST)
    yield figure("flops_per_token", case, found / each, predicted=flops, bound=True, note=LEAST_FLOPS)
    yield figure("bandwidth", case, [cold / one for one in seconds], predicted=memory, bound=True, note=COLD)
    rates = [found / one for one in seconds]
    yield figure("flop_rate", case, rates, predicted=peak, bound=True, note="predicted: the roof")
    whole = "whole process, torch and other libraries included" if setting.device.type == "cpu" else ""
    yield figure("peak_memory", case, float(peak_since_reset(setting.device)), note=whole)


def answer(figures: list[Figure], what: str) -> str:
    """Return the speed at both ends, and what bounds it."""
    speed = [f for f in pick(figures, "tokens_per_s") if f.measured]
    if not speed:
        return ""
    told = [f"{f.measured:,.1f} tokens/s with {what.format(**f.case)}" for f in speed[:1] + speed[1:][-1:]]
    first, more = speed[0], list[str]()
    for metric, words in (
        ("bandwidth", "at {:.0%} of what memory allows"),
        ("flop_rate", "at {:.0%} of the matrix peak"),
        ("tokens_per_s", "{:.2f} times the predicted speed"),
        ("bytes_per_token", "{:.2f} times the least possible bytes moved"),
    ):
        more += [words.format(f.ratio) for f in pick(figures, metric, **first.case) if f.ratio]
    return f"{'; '.join(told)}. The first is {', '.join(more)}."


Points = list[tuple[int, int]]


def question(
    work: Work, title: str, about: str, quick: Points, full: Points, seconds: tuple[float, float], what: str
) -> Question:
    """Return the question of one kind of step.

    Args:
        quick, full: batches, and tokens of a sequence or in the cache.
        seconds: estimates of a case, quick and full.
        what: words of the answer.
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
        answer=partial(answer, what=what),
        plots=(drawing("tokens_per_s", "Tokens a second", x=key, by="batch"),),
    )


DECODE = question(
    "decode",
    "How fast is decoding, and how many bytes does a token move?",
    "Single tokens are decoded from a cache of random rows.",
    [(1, 128), (1, 1024), (4, 128)],
    [(1, 128), (1, 2048), (1, 8192), (4, 2048), (16, 2048)],
    (3.0, 18.0),
    "batch {batch} at context {context:,}",
)
PREFILL = question(
    "prefill",
    "How fast does a model read a prompt?",
    "The whole prompt goes through the model in one call; the head takes its last token.",
    [(1, 128), (1, 512)],
    [(1, 128), (1, 512), (1, 2048), (4, 512)],
    (3.0, 20.0),
    "a prompt of {tokens:,} in batches of {batch}",
)
TRAIN = question(
    "training",
    "How fast does a model train, compared with the roofs of this machine?",
    "A step is forward, backward, clipping and AdamW of 7.6M parameters on random tokens.",
    [(4, 256)],
    [(4, 256), (16, 256), (4, 1024)],
    (6.0, 30.0),
    "sequences of {tokens:,} in batches of {batch}",
)

# --- forecasts of other steps, in each dtype

SECONDS = 1.5
"""Time to fill with steps of a shape."""
DTYPE_NAMES: tuple[StepDtype, ...] = get_args(StepDtype)


def held_out(quick: bool) -> dict[str, StepShape]:
    """Return the six steps by name, in FP32. No part of the prices was fitted to them."""
    toy, mha, trained = recipe("toy"), recipe("toy-mha"), dataclasses.replace(models.TRAINED, n_layers=2)
    adamw, served = TrainConfig(optimizer="adamw"), models.QUICK
    many = dataclasses.replace(trained, n_routed_experts=48, moe_inter_dim=48, n_activated_experts=8)
    rows: list[tuple[str, Work, ModelConfig, int, int, TrainConfig]] = [
        ("toy with MHA", "training", mha.model, 6, 192, mha.train),
        ("48 experts", "training", many, 4, 160 if quick else 224, adamw),
        ("toy", "prefill", toy.model, 5, 200, adamw),
        ("served", "prefill", served, 2, 384, adamw),
        ("served", "decode", served, 1, 1600, adamw),
        ("served, 3 sequences", "decode", served, 3, 700, adamw),
    ]
    found: dict[str, StepShape] = {}
    for name, work, config, batch, tokens, train in rows:
        roomy = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, tokens + 1))
        how = {"dtype": "float32", "batch": batch, "tokens": tokens, "train": train}
        found[f"{work} {name}"] = StepShape(work=work, config=roomy, **how)
    return found


def forecast_cases(setting: Setting) -> list[Case]:
    return [
        Case(
            key=f"step={name} batch={shape.batch} tokens={shape.tokens}",
            seconds=25.0,
            run=partial(forecast, setting, name, shape),
        )
        for name, shape in held_out(setting.quick).items()
    ]


def usable(setting: Setting) -> list[StepDtype]:
    """Return the dtypes that are not hopelessly slow here. FP8 multiplies in BF16."""
    slow = {name for name, dtype in DTYPES.items() if why_unusable(dtype, setting.roofs.peak)}
    return [d for d in DTYPE_NAMES if ("bfloat16" if d == "fp8" else d) not in slow]


def forecast(setting: Setting, name: str, shape: StepShape) -> Iterator[Figure]:
    """Forecast steps in each dtype, then run them: two of training, two of reading a prompt, two of decoding.

    A forecast runs nothing of the model: the operations are counted dry, and each is timed alone. FP8 is simulated in
    training; in serving, matrices are E4M3 codes, products BF16. Memory is that of all tensors at the peak of a step.
    """
    if (prices := setting.prices) is None:
        yield left_out("seconds", {"step": name}, "operations are timed on a CPU only")
        return
    for dtype in usable(setting):
        here = dataclasses.replace(shape, dtype=dtype)
        expected = prices.forecast(here)
        case = {"step": name, "work": shape.work, "batch": shape.batch, "tokens": shape.tokens, "dtype": dtype}
        step = here.make(setting.device)
        turns = in_turns({"step": step}, setting.device, seconds=SECONDS, least=3, on_turn=setting.deadline)
        yield figure("seconds", case, turns.estimate("step"), predicted=expected.seconds)
        del step
        there = counted_twice(lambda here=here: here.make(setting.device), Count())
        yield figure("tensor_memory", case, float(there.peak), predicted=float(expected.peak))


def errors(figures: Sequence[Figure], metric: str) -> list[float]:
    """Return the errors of the predictions, as shares of what was measured."""
    return [abs(f.predicted / f.measured - 1) for f in pick(figures, metric) if f.predicted is not None and f.measured]


def forecast_answer(figures: list[Figure]) -> str:
    seconds, tensors = (errors(figures, metric) for metric in ("seconds", "tensor_memory"))
    if not seconds:
        return ""
    text = f"{len(seconds)} steps, forecast before they ran: error of the time {statistics.median(seconds):.0%} in the "
    text += f"median, {max(seconds):.0%} at worst"
    text += f"; of the memory of tensors at most {max(tensors):.1%}" if tensors else ""
    return f"{text}."


PLAN = Question(
    name="plan",
    title="How far is a plan of this machine from what it then does?",
    about=forecast.__doc__,
    cases=forecast_cases,
    answer=forecast_answer,
    plots=(drawing("seconds", "Time of a step", "{step}", by="dtype"),),
    on_request=True,
)
