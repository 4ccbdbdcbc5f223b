"""Predictions, made before any step of the subject: the seconds of a plain decoding step, and of each alternative.

A model like the subject's decodes without computing anything (measure/dry.py), and the operations that would run are
priced by this machine's rates. Of short steps most is Python, which those rates hardly have: they are of larger models.
So a model with as many blocks and experts, but only WIDTH wide, is timed and priced too, in the same way:

    T = T(narrow), timed + price - price(narrow)

Worked example: a narrow model takes 0.45 ms, and 0.20 by its price. A price of 0.31 ms then predicts 0.56 ms.

Besides, two things are counted or measured on their own: the guesses that are accepted, and the rates of products and
memory on other numbers of threads.

    all_threads     products by the ratio of their rates or of bandwidths, all else as it is

A class of products waits for memory by its share of bytes that no cache holds. What is no product has a few thousand
numbers at most, too few for a second thread.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from dsmini.config import ModelConfig
from dsmini.diagnosis.decoding.alternatives import ALTERNATIVES, tokens_of
from dsmini.diagnosis.decoding.arm import PLAIN, Arm
from dsmini.diagnosis.decoding.steps import Point, seconds_of, steps_in_turn
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.interventions.machine import THREADS, cores
from dsmini.diagnosis.predictions import Prediction
from dsmini.machine import matmul_rate
from dsmini.measure.calibration import read_bandwidth
from dsmini.measure.counting import CountedOperation
from dsmini.measure.dry import Dry, dry_count
from dsmini.measure.forecast import Forecast
from dsmini.measure.rates import flops_rate
from dsmini.measure.step_rates import OTHERS, Rates, class_of
from dsmini.measure.workloads import StepDtype, StepShape
from dsmini.nn import Transformer

WIDTH = 16
"""Width of all that is narrow in a narrow model."""
TURNS, MOST_TURNS = 7, 60
"""Turns of a narrow model, of which the fastest counts: other programs only make it slower."""
DISTURBED = 3.0
"""Seconds of a narrow model over its price above which other programs must have disturbed it."""
LEAST = 0.05
"""Least share of its price that a step takes, whatever narrow models say."""
ATTENTION, KEYS = "kernel cached attention", 4096
"""Curve of the kernels' attention to a cache, and where it is read."""


class Prices:
    """Forecasts of a subject's steps."""

    def __init__(self, subject: DecodingSubject, rates: Rates) -> None:
        self.subject, self.rates = subject, rates
        self._beyond: dict[tuple[Arm, int], float] = {}

    def forecast(self, arm: Arm, point: Point | None = None) -> Forecast:
        """Return the forecast of an arm's step.

        Args:
            point: None: the subject's.
        """
        subject = self.subject
        point = Point(batch=subject.batch, context=subject.context) if point is None else point
        dry = self.counted(arm, point, subject.config)
        parts = self._priced(arm, dry)
        price = sum(parts.values())
        parts["calls"] += max(self._beyond_price(arm, point.batch), (LEAST - 1) * price)
        dtype = arm.dtype or subject.weight_dtype
        return Forecast(
            shape=StepShape(work="decode", config=subject.config, dtype=dtype, batch=point.batch, tokens=point.context),
            seconds=sum(parts.values()),
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

    def _priced(self, arm: Arm, dry: Dry) -> dict[str, float]:
        """Return the seconds of an arm's operations by class, and those of "calls"."""
        dtype = arm.dtype or self.subject.weight_dtype
        of_step = self.rates.steps[f"{arm.rates_of} {dtype}"]
        parts = of_step.seconds(dry.operations, dry.views, self.rates.roofs)
        for op in dry.operations:
            name = class_of(op)
            factor = of_step.factors.get(name, of_step.factors[OTHERS])
            parts[name] += factor * self._other_cache(op, self.subject.compute_dtype)
        return parts

    def _other_cache(self, op: CountedOperation, cache: StepDtype) -> float:
        """Return the seconds that a cache in another dtype than FP32 weights adds to a kernel's attention."""
        roofs, names = self.rates.roofs, [f"warm {ATTENTION} {dtype}" for dtype in ("float32", cache)]
        if not op.attention or op.dtype != torch.float32 or any(name not in roofs.curves for name in names):
            return 0.0
        own, weights = (flops_rate(roofs, ATTENTION, dtype, KEYS, op.cold_share) for dtype in (cache, "float32"))
        return op.attention / own - op.attention / weights

    def _beyond_price(self, arm: Arm, batch: int) -> float:
        """Return the seconds that an arm's step of a narrow model takes beyond its price; timed once for each batch."""
        if (arm, batch) not in self._beyond:
            config, point = narrow(self.subject.config), Point(batch=batch, context=1)
            price = sum(self._priced(arm, self.counted(arm, point, config)).values())
            run = arm.steps(like(self.subject, config).to(self.subject.device), point)
            steps = max(1, steps_in_turn(run) // TURNS)
            taken = min(seconds_of(run, steps) for _ in range(TURNS))
            for _ in range(MOST_TURNS):
                if taken <= DISTURBED * price:
                    break
                taken = min(taken, seconds_of(run, steps))
            self._beyond[arm, batch] = min(taken, DISTURBED * price) - price
        return self._beyond[arm, batch]


def like(subject: DecodingSubject, config: ModelConfig) -> Transformer:
    """Return a random model in the subject's dtypes; made dry, it takes no memory."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config, compute_dtype=subject.model.compute_dtype)
    return model.to(subject.model.embed.weight.dtype).eval()


def narrow(config: ModelConfig) -> ModelConfig:
    """Return a config with as many blocks, heads and experts, whose matrices are as small as can be."""
    widths = ("dim", "inter_dim", "moe_inter_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    small = {name: min(WIDTH, getattr(config, name)) for name in (*widths, "vocab_size")}
    rank = None if config.q_lora_rank is None else min(WIDTH, config.q_lora_rank)
    return dataclasses.replace(config, q_lora_rank=rank, **small)


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
    subject, before = prices.subject, torch.get_num_threads()
    dtype = torch.float32 if subject.compute_dtype == "float32" else torch.bfloat16
    measured: dict[int, tuple[float, float]] = {}
    try:
        for threads in {before, *counts}:
            torch.set_num_threads(threads)
            measured[threads] = matmul_rate(subject.device, dtype, 0.3), read_bandwidth(subject.device, 1 << 27, 2)
    finally:
        torch.set_num_threads(before)
    point = Point(batch=subject.batch, context=subject.context)
    cold = cold_shares(prices.counted(PLAIN, point, subject.config))
    return [scaled(now.by_class, cold, measured[before], measured[threads]) for threads in counts]


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
