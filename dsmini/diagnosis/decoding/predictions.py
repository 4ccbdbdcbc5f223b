"""Predictions, made before any step of the subject: the seconds of a plain decoding step, and of each alternative.

A model like the subject's decodes without computing anything (measure/dry.py), and the operations that would run are
priced by this machine's rates. Two parts are not in these rates: Python, which is most of a short step, and attention
with heads of other sizes. A model with as many blocks, experts and heads, but only WIDTH wide, tells both. It is timed
after `low` and after `high` cached tokens, a thousand at most, and priced in the same way:

    slope = (T(narrow, high) - T(narrow, low)) / (high - low)
    T(t)  = T(narrow, low) + price(low) - price(narrow, low) + slope (t - low)

Worked example: a narrow model takes 0.45 ms after 63 tokens, 0.20 by its price, and 0.57 ms after 1023: 0.125 us a
token. A price of 0.31 ms predicts 0.45 + 0.11 = 0.56 ms after 63 tokens, and 1.32 ms after 6143.

Besides, two things are counted or measured on their own: the guesses that are accepted, and the rates of products and
memory on other numbers of threads.

    all_threads     products by the ratio of their rates or of bandwidths, all else as it is

A class of products waits for memory by its share of bytes that no cache holds. What is no product has a few thousand
numbers at most, too few for a second thread.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from dsmini.config import ModelConfig
from dsmini.diagnosis.decoding.alternatives import ALTERNATIVES, tokens_of
from dsmini.diagnosis.decoding.arm import PLAIN, Arm, Narrow, same_point
from dsmini.diagnosis.decoding.steps import Point, Run, seconds_of, steps_in_turn
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.interventions.machine import THREADS, cores
from dsmini.diagnosis.predictions import Prediction
from dsmini.diagnosis.scaling import rates_by_threads
from dsmini.measure.dry import Dry, dry_count
from dsmini.measure.forecast import Forecast
from dsmini.measure.step_rates import Rates, class_of
from dsmini.measure.workloads import StepShape
from dsmini.nn import Transformer
from dsmini.nn.cache import KEY_STEP

WIDTH = 16
"""Width of all that is narrow in a narrow model."""
TURNS, MOST_TURNS = 6, 20
"""Turns of a narrow model, of which the fastest counts: other programs only make it slower."""
DISTURBED = 3.0
"""Seconds of a narrow model over its price above which other programs must have disturbed it."""
LEAST = 0.05
"""Least share of its price that a step takes, whatever narrow models say."""
LONGEST = 1024
"""Most tokens after which narrow models are timed, the new one included."""


class Prices:
    """Forecasts of a subject's steps."""

    def __init__(self, subject: DecodingSubject, rates: Rates) -> None:
        self.subject, self.rates = subject, rates
        self.low, self.high = ends_of(subject.config)

    def forecast(self, arm: Arm, point: Point | None = None) -> Forecast:
        """Return the forecast of an arm's step.

        Args:
            point: None: the subject's.
        """
        subject = self.subject
        point = Point(batch=subject.batch, context=subject.context) if point is None else point
        dry, after = self.counted(arm, point, subject.config), self._tokens(arm, point)
        parts, told = self._priced(arm, point, subject.config), self._told(arm, point)
        price = sum(parts.values())
        parts["calls"] += max(told.beyond, (LEAST - 1) * price)
        parts["cached tokens"] = told.slope * (after - self.low)
        dtype = arm.dtype or subject.weight_dtype
        return Forecast(
            shape=StepShape(work="decode", config=subject.config, dtype=dtype, batch=point.batch, tokens=point.context),
            seconds=max(LEAST * price, sum(parts.values())),
            by_class=dict(sorted(parts.items(), key=lambda part: -part[1])),
            calls=len(dry.operations) + dry.views,
            flops=dry.flops,
            bytes=dry.bytes,
            held=dry.left,
            peak=dry.peak,
            process=dry.peak + self.rates.process,
        )

    def counted(self, arm: Arm, point: Point, config: ModelConfig) -> Dry:
        """Return the operations of an arm's step, which does not run."""
        return dry_count(lambda: arm.steps(like(self.subject, config), point), self.rates.roofs.cache_bytes)

    def _tokens(self, arm: Arm, point: Point) -> int:
        """Return the cached tokens of an arm at a point."""
        return arm.point(point).context

    def _priced(self, arm: Arm, point: Point, config: ModelConfig) -> dict[str, float]:
        """Return the seconds of an arm's operations by class, and those of "calls", after few cached tokens."""
        dtype = arm.dtype or self.subject.weight_dtype
        here = dataclasses.replace(arm, point=same_point)
        dry = self.counted(here, point.at(self.low), config)
        return self.rates.steps[f"{arm.rates_of} {dtype}"].seconds(dry.operations, dry.views, self.rates.roofs)

    def _told(self, arm: Arm, point: Point) -> Narrow:
        """Return what an arm's step of a narrow model tells; it is timed once for each batch."""
        arm = dataclasses.replace(arm, point=same_point)
        key = arm, point.batch
        if key not in self.subject.narrow:
            config = narrow(self.subject.config)
            model, price = like(self.subject, config), sum(self._priced(arm, point, config).values())
            runs = [arm.steps(model, Point(batch=point.batch, context=context)) for context in (self.low, self.high)]
            low, high = fastest(runs, price)
            slope = max(0.0, high - low) / max(1, self.high - self.low)
            if arm.keeps_attention and (arm.dtype is None or self.subject.compute_dtype == "bfloat16"):
                slope = self._told(PLAIN, point).slope
            self.subject.narrow[key] = Narrow(beyond=low - price, slope=slope)
        return self.subject.narrow[key]


def ends_of(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers of cached tokens after which narrow models are timed, with room for a guess of each depth."""
    most = min(LONGEST, config.max_seq_len - config.n_mtp_layers)
    if most < 2 * KEY_STEP:
        return 1, max(1, most - 1)
    return KEY_STEP - 1, most // KEY_STEP * KEY_STEP - 1  # whole steps of rows need no mask


def fastest(runs: Sequence[Run], price: float) -> list[float]:
    """Return the seconds of steps that take turns, each in its fastest turn.

    Args:
        price: of the first; turns are taken until it is near, or for long enough.
    """
    counts = [steps_in_turn(run) for run in runs]
    taken = [math.inf] * len(runs)
    for turn in range(MOST_TURNS):
        if turn >= TURNS and taken[0] <= DISTURBED * price:
            break
        found = [seconds_of(run, steps) for run, steps in zip(runs, counts, strict=True)]
        taken = [min(pair) for pair in zip(taken, found, strict=True)]
    return taken


def like(subject: DecodingSubject, config: ModelConfig) -> Transformer:
    """Return a random model in the subject's dtypes; made dry, it takes no memory."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config, compute_dtype=subject.model.compute_dtype)
    return model.to(subject.device, subject.model.embed.weight.dtype).eval()


def narrow(config: ModelConfig) -> ModelConfig:
    """Return a config with the same blocks, experts and heads, whose matrices are as small as can be."""
    widths = ("dim", "inter_dim", "moe_inter_dim", "vocab_size")
    rank = None if config.q_lora_rank is None else min(WIDTH, config.q_lora_rank)
    return dataclasses.replace(config, q_lora_rank=rank, **{n: min(WIDTH, getattr(config, n)) for n in widths})


def predict(subject: DecodingSubject, names: Sequence[str], rates: Rates) -> Prediction:
    """Predict a subject's steps with each of the interventions named."""
    prices = Prices(subject, rates)
    plain = prices.forecast(PLAIN)
    free: dict[str, float] = {}
    for name in names:
        if name in ALTERNATIVES:
            tokens = tokens_of(subject, name)
            free[name] = ALTERNATIVES[name].seconds(plain.seconds, lambda arm: prices.forecast(arm).seconds, tokens)
    if THREADS.name in names:
        free[THREADS.name] = seconds_with_threads(prices, plain, [cores()])[0]
    return Prediction(plain=plain.seconds, free=free, forecast=plain)


def seconds_with_threads(prices: Prices, now: Forecast, counts: Sequence[int]) -> list[float]:
    """Return the predicted seconds of a plain step on each number of threads."""
    subject, used = prices.subject, torch.get_num_threads()
    dtype = torch.float32 if subject.compute_dtype == "float32" else torch.bfloat16
    measured = rates_by_threads(subject.device, dtype, sorted({used, *counts}))
    point = Point(batch=subject.batch, context=subject.context)
    cold = cold_shares(prices.counted(PLAIN, point, subject.config))
    return [scaled(now.by_class, cold, measured[used], measured[threads]) for threads in counts]


def cold_shares(dry: Dry) -> dict[str, float]:
    """Return the share of bytes that come from memory, by class of products."""
    moved: dict[str, list[int]] = {}
    for op in (op for op in dry.operations if op.flops):
        total = moved.setdefault(class_of(op), [0, 0])
        total[0] += op.cold
        total[1] += op.bytes
    return {name: cold / max(1, total) for name, (cold, total) in moved.items()}


def scaled(
    by_class: Mapping[str, float], cold: Mapping[str, float], now: tuple[float, float], then: tuple[float, float]
) -> float:
    """Return the seconds of a step when the rates of (products, memory) change; all but products stays."""

    def longer(name: str) -> float:
        share = cold[name]
        return (1 - share) * now[0] / then[0] + share * now[1] / then[1]

    return sum(seconds * (longer(name) if name in cold else 1.0) for name, seconds in by_class.items())
