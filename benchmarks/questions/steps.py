"""Speed is next to the roofs, bytes and FLOPs are next to their lower bounds.

Bytes count each input and output of every operation once, in the whole model. Their lower bound follows from the
config: the weights that a token uses, the cache, and operands and results of the products. The ratio of the two shows
what kernels can still save.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from benchmarks import models
from benchmarks.question import Case, Figure, Question, Setting, cases_over, check_bandwidth, drawing, figure, pick
from dsmini import TrainConfig, accounting
from dsmini.measure.counting import Count, count
from dsmini.measure.memory import peak_since_reset, reset_peak
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepShape, Work
from dsmini.report import Value

DRAWN = 8
"""Number of decoding steps, each of other tokens, whose bytes and experts are averaged."""
LEAST = "whole model; predicted: lower bound, operands and results of each product once; measured: of all operations"
LEAST_FLOPS = "whole model; predicted: lower bound, the products of the formula (causal, without padding)"
COLD = "measured: bytes from memory, not from a cache; predicted: the roof"


def measure(work: Work, setting: Setting, batch: int, tokens: int) -> Iterator[Figure]:
    """Yield the figures of a step. tokens: those of a sequence; in decoding, those in the cache."""
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
    moved = statistics.fmean(one.bytes for one in counts) / each
    bounds = flops, least(experts=statistics.fmean(experts)).total
    expected = setting.predicted({"step": shape}).get("step")
    case = {"batch": batch, "context" if work == "decode" else "tokens": tokens}
    yield from step_figures(case, counts[0], seconds, expected, setting, each, moved, *bounds)


def step_figures(
    case: Mapping[str, Value],
    counted: Count,
    seconds: Sequence[float],
    expected: float | None,
    setting: Setting,
    tokens: int,
    moved: float,
    least_flops: float,
    least_bytes: float,
) -> Iterator[Figure]:
    """Yield the figures of a step: speed, bytes and FLOPs of a token with their lower bounds, and the roofs.

    Args:
        seconds: of each turn.
        expected: predicted seconds.
        tokens: number of tokens in a step.
        moved: bytes of a token.

    Raises: ValueError for a bandwidth far above the roof.
    """

    def rate(amount: float) -> list[float]:
        return [amount / each for each in seconds]

    cold = sum(op.cold for op in counted.operations)
    memory = check_bandwidth(f"a step of {dict(case)}", statistics.median(rate(cold)), setting)
    peak, flops = setting.roofs.peak[setting.dtype_name], counted.flops / tokens
    yield figure("tokens_per_s", case, rate(tokens), predicted=None if expected is None else tokens / expected)
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
