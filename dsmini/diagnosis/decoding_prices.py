"""Predictions of decoding, made before any step of the subject: the seconds of a plain step, and of each variant.

A model like the subject's decodes without computing anything (measure/dry.py), and the operations that would run are
priced by this machine's rates. Two parts are not in these rates: Python, which is most of a short step, and attention
with heads of other sizes. A model with as many blocks, experts and heads, but only WIDTH wide, tells both. It is timed
after `low` and after `high` cached tokens, a thousand at most, and priced in the same way:

    slope = (T(narrow, high) - T(narrow, low)) / (high - low)
    T(t)  = T(narrow, low) + price(low) - price(narrow, low) + slope (t - low)

Worked example: a narrow model takes 0.45 ms after 63 tokens, 0.20 by its price, and 0.57 ms after 1023: 0.125 us a
token. A price of 0.31 ms predicts 0.45 + 0.11 = 0.56 ms after 63 tokens, and 1.32 ms after 6143.

Other numbers of threads change products by the ratio of their rates or of bandwidths. A class of products waits for
memory by its share of bytes that no cache holds. What is no product has a few thousand numbers at most, too few for a
second thread.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dsmini.config import ModelConfig
from dsmini.diagnosis.decoding_steps import PLAIN, Point, Variant, timed
from dsmini.diagnosis.prices import rates_by_threads, scaled
from dsmini.measure.dry import Dry, dry_count
from dsmini.measure.forecast import Forecast
from dsmini.measure.step_rates import Rates, class_of
from dsmini.measure.workloads import StepShape
from dsmini.nn import Transformer
from dsmini.nn.cache import KEY_STEP

if TYPE_CHECKING:
    from dsmini.diagnosis.decoding import DecodingSubject

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


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """A variant's step of a narrow model, which predictions rest on."""

    beyond: float
    """Seconds beyond its price, after few cached tokens."""
    slope: float
    """Seconds of one more cached token of each sequence."""


class DecodingPrices:
    """Forecasts of a subject's steps."""

    def __init__(self, subject: "DecodingSubject", rates: Rates) -> None:
        self.subject, self.rates = subject, rates
        self.low, self.high = ends_of(subject.config)
        self.narrow: dict[tuple[Variant, int], Narrow] = {}
        """Times and prices of narrow models, by variant and batch."""
        self.known: dict[tuple[Variant, int, int], Forecast] = {}
        """Forecasts by variant, batch and context."""

    def seconds(self, variant: Variant = PLAIN, batch: int | None = None, context: int | None = None) -> float:
        """Return the forecast seconds of a step; None: at the subject's batch and context."""
        return self.forecast(variant, batch, context).seconds

    def forecast(self, variant: Variant = PLAIN, batch: int | None = None, context: int | None = None) -> Forecast:
        """Return the forecast of a variant's step; None: at the subject's batch and context."""
        subject = self.subject
        point = Point(batch=batch or subject.batch, context=context or subject.context)
        key = variant, point.batch, point.context
        if key not in self.known:
            self.known[key] = self._forecast(variant, point)
        return self.known[key]

    def _forecast(self, variant: Variant, point: Point) -> Forecast:
        config, dtype = self.subject.config, variant.dtype or self.subject.weight_dtype
        dry, parts, told = (
            self.counted(variant, point, config),
            self._priced(variant, point, config),
            self._told(variant, point),
        )
        price = sum(parts.values())
        parts["calls"] += max(told.beyond, (LEAST - 1) * price)
        parts["cached tokens"] = told.slope * (variant.at(point).context - self.low)
        return Forecast(
            shape=StepShape(work="decode", config=config, dtype=dtype, batch=point.batch, tokens=point.context),
            seconds=max(LEAST * price, sum(parts.values())),
            by_class=dict(sorted(parts.items(), key=lambda part: -part[1])),
            calls=len(dry.operations) + dry.views,
            flops=dry.flops,
            bytes=dry.bytes,
            held=dry.left,
            peak=dry.peak,
            process=dry.peak + self.rates.process,
        )

    def counted(self, variant: Variant, point: Point, config: ModelConfig) -> Dry:
        """Return the operations of a variant's step, which does not run."""
        return dry_count(lambda: variant.steps(like(self.subject, config), point), self.rates.roofs.cache_bytes)

    def _priced(self, variant: Variant, point: Point, config: ModelConfig) -> dict[str, float]:
        """Return the seconds of a variant's operations by class, and those of "calls", after few cached tokens."""
        dtype = variant.dtype or self.subject.weight_dtype
        dry = self.counted(replace(variant, context=self.low), point, config)
        return self.rates.steps[f"{variant.rates_of} {dtype}"].seconds(dry.operations, dry.views, self.rates.roofs)

    def _told(self, variant: Variant, point: Point) -> Narrow:
        """Return what a variant's step of a narrow model tells; it is timed once for each batch."""
        variant = replace(variant, context=None)
        key = variant, point.batch
        if key not in self.narrow:
            config = narrow(self.subject.config)
            model, price = like(self.subject, config), sum(self._priced(variant, point, config).values())
            low, high = self._fastest(variant, model, point.batch, price)
            slope = max(0.0, high - low) / max(1, self.high - self.low)
            if variant.keeps_attention and (variant.dtype is None or self.subject.compute_dtype == "bfloat16"):
                slope = self._told(PLAIN, point).slope
            self.narrow[key] = Narrow(beyond=low - price, slope=slope)
        return self.narrow[key]

    def _fastest(self, variant: Variant, model: Transformer, batch: int, price: float) -> list[float]:
        """Return the seconds of steps after few and many tokens, which take turns, each in its fastest turn.

        Args:
            price: of the first; turns are taken until it is near, or for long enough.
        """
        runs = [timed(variant.steps(model, Point(batch=batch, context=n))) for n in (self.low, self.high)]
        taken = [run() for run in runs]
        for turn in range(1, MOST_TURNS):
            if turn >= TURNS and taken[0] <= DISTURBED * price:
                break
            taken = [min(before, run()) for before, run in zip(taken, runs, strict=True)]
        return taken

    def threads(self, number: int) -> float:
        """Return the predicted seconds of a plain step on a number of threads."""
        subject, used = self.subject, torch.get_num_threads()
        measured = rates_by_threads(subject.device, subject.compute_dtype, sorted({used, number}))
        dry = self.counted(PLAIN, Point(batch=subject.batch, context=subject.context), subject.config)
        return scaled(self.forecast().by_class, cold_shares(dry), measured[used], measured[number])


def ends_of(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers of cached tokens after which narrow models are timed, with room for a guess of each depth."""
    most = min(LONGEST, config.max_seq_len - config.n_mtp_layers)
    if most < 2 * KEY_STEP:
        return 1, max(1, most - 1)
    return KEY_STEP - 1, most // KEY_STEP * KEY_STEP - 1  # whole steps of rows need no mask


def like(subject: "DecodingSubject", config: ModelConfig) -> Transformer:
    """Return a random model in the subject's dtypes; made dry, it takes no memory."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config, compute_dtype=subject.model.compute_dtype)
    return model.to(subject.device, subject.model.embed.weight.dtype).eval()


def narrow(config: ModelConfig) -> ModelConfig:
    """Return a config with the same blocks, experts and heads, whose matrices are as small as can be."""
    widths = ("dim", "inter_dim", "moe_inter_dim", "vocab_size")
    rank = None if config.q_lora_rank is None else min(WIDTH, config.q_lora_rank)
    return replace(config, q_lora_rank=rank, **{n: min(WIDTH, getattr(config, n)) for n in widths})


def cold_shares(dry: Dry) -> dict[str, float]:
    """Return the share of bytes that come from memory, by class of products."""
    moved: dict[str, list[int]] = {}
    for op in (op for op in dry.operations if op.flops):
        total = moved.setdefault(class_of(op), [0, 0])
        total[0] += op.cold
        total[1] += op.bytes
    return {name: cold / max(1, total) for name, (cold, total) in moved.items()}
