"""Decoding as the work that is diagnosed: a model that decodes one token of each sequence, and the arms.

    free_cache         Machine    1 cached token in place of all: the gain is the share of cached attention
    expanded_mla       Algorithm  keys and values of all cached tokens are made again; dsmini decodes absorbed
    mha_baseline       Algorithm  multi-head attention of as many heads, which caches the keys and values of each
    uniform_routing    Algorithm  tokens go to all experts in turn; one token has different experts in any case
    dense_active       Algorithm  a dense feed-forward with as many active parameters: what routing costs
    drafts             Algorithm  multi-token prediction guesses, at the share of guesses that is accepted
    all_threads        Machine    products run on all cores
    bfloat16_weights   Machine    weights of 2 bytes
    fp8_weights        Machine    weights of 1 byte, with scales
    quiet_machine      Machine    other programs take nothing (contention.py)

A negative gain is what the way in use saves: expanded_mla at -50 % says that a step would take half as long again.
Kernels serve plain steps, and not every variant. Then two variants that both run by modules are compared, and a plain
step is taken to change by the same ratio: T_X = T * T(variant) / T(reference).

Multi-token prediction guesses ahead, and the model checks all guesses in one step. With n blocks a step takes 1 + n
tokens of each sequence and makes the guesses that are accepted, and one token more:

    seconds of a token = seconds of a step with guesses / (1 + accepted guesses a step)

Worked example: a step of 10 ms, and 13 ms with one guess, of which 60 % are accepted. A token takes 13 / 1.6 = 8.1 ms:
guessing gains 19 %. At 20 % accepted it takes 10.8 ms, and guessing loses 8 %. The share of accepted guesses depends on
the text and on the training, not on the machine. So it is counted on its own, in a short greedy generation.

Source: DeepSeek-V3 report, section 5.4.3 (85 to 90 % accepted).

Predictions price the operations of a step that runs dry (measure/forecast.py). Two parts are not in these rates:
Python, which is most of a short step, and attention with heads of other sizes. A model with as many blocks, experts and
heads, but only WIDTH wide, tells both. It is timed after `low` and `high` cached tokens, and priced in the same way:

    slope = (T(narrow, high) - T(narrow, low)) / (high - low)
    T(t)  = T(narrow, low) + price(low) - price(narrow, low) + slope (t - low)

Worked example: a narrow model takes 0.45 ms after 63 tokens, 0.20 by its price, and 0.57 ms after 1023: 0.125 us a
token. A price of 0.31 ms predicts 0.45 + 0.11 = 0.56 ms after 63 tokens, and 1.32 ms after 6143.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from dsmini import accounting, ops
from dsmini.config import ModelConfig
from dsmini.diagnosis import decoding_steps as steps
from dsmini.diagnosis.arms import Arm, Step, arm_of
from dsmini.diagnosis.contention import Contention, cores, quiet, watch
from dsmini.diagnosis.decoding_steps import Point, Variant, timed
from dsmini.diagnosis.findings import Finding, finding, other_programs
from dsmini.diagnosis.loading import DecodedModel
from dsmini.diagnosis.prices import seconds_with_threads, threads_put_back
from dsmini.diagnosis.training import no_more_threads
from dsmini.inference import Generation
from dsmini.inference.generation import prefill
from dsmini.inference.sampling import likeliest
from dsmini.machine import refuse_too_large
from dsmini.measure.forecast import Forecast, forecast
from dsmini.measure.step_rates import Rates
from dsmini.measure.turns import Estimate, in_turns, reported
from dsmini.measure.workloads import ROOM, StepDtype, StepShape, dtype_name
from dsmini.nn import Transformer
from dsmini.nn.cache import KEY_STEP

MOST_CONTEXT = 4096
"""Largest number of cached tokens where none is asked for: more take long to read."""
PROMPT, NEW_TOKENS, SECONDS = 64, 96, 4.0
"""Most tokens of a prompt, most new tokens, and seconds after which the counting of accepted guesses ends."""
Z_95 = 1.96
WIDTH = 16
"""Width of all that is narrow in a narrow model."""
TURNS = 8
"""Turns of a narrow model, of which the fastest counts."""
LEAST = 0.05
"""Least share of its price that a step takes, whatever narrow models say."""
LONGEST = 1024
"""Most tokens after which narrow models are timed, the new one included."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Guesses that were made and accepted."""

    drafted: int
    accepted: int
    tokens_per_step: float
    """New tokens of a sequence in a step."""

    @property
    def share(self) -> Estimate:
        """Share of accepted guesses, with Wilson's 95 % interval: it holds for few guesses and shares near 0 and 1."""
        n, z2 = max(1, self.drafted), Z_95**2
        p = self.accepted / n
        middle, half = p + z2 / (2 * n), Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low, high = ((middle + end) / (1 + z2 / n) for end in (-half, half))
        return Estimate(value=p, low=max(0.0, min(low, p)), high=min(1.0, max(high, p)), turns=n)


def accepted_guesses(model: Transformer, rows: Sequence[Sequence[int]], seconds: float = SECONDS) -> Acceptance:
    """Count the accepted guesses of a short greedy generation after these texts."""
    room = model.config.max_seq_len
    prompts = [row[: min(PROMPT, room // 2)] for row in rows]
    new = min(NEW_TOKENS, room - max(map(len, prompts)))
    generation = Generation(model, prompts, new, speculative=True)
    start = time.perf_counter()
    for _ in generation:
        if time.perf_counter() - start > seconds:
            break
    stats = generation.stats
    per_step = stats.accepted / max(1, stats.drafted // len(model.mtp))
    return Acceptance(drafted=stats.drafted, accepted=stats.accepted, tokens_per_step=1 + per_step)


class DecodingSubject:
    """A model with a cache of `context` tokens for each of `batch` sequences.

    Raises: ValueError for a context that the model does not allow, and a cache larger than memory.
    """

    def __init__(self, decoded: DecodedModel, batch: int = 1, context: int | None = None) -> None:
        self.model, self.trained, self.source = decoded.model, decoded.trained, decoded.source
        self.batch, self.context = batch, checked_context(decoded.model.config, context)
        room = min(self.config.max_seq_len, self.context + ROOM)
        needed = accounting.cache_bytes(self.config, max_seq_len=room, batch=batch, dtype=self.compute_dtype).total
        refuse_too_large(int(needed), f"a cache of {batch} x {room} tokens", self.device)
        self.rows = _rows(decoded.text, self.config.vocab_size, batch, self.context)
        """Token ids in the cache, by sequence."""
        self.cache = self.model.new_cache(batch, room)
        with torch.no_grad():
            self.tokens = likeliest(prefill(self.model, self.cache, self.rows))[:, None]
        """First token of each sequence that is decoded, [b, 1]."""
        self.run = steps.steps_with(self.model, self.cache, self.tokens)
        """Takes one step. It decodes a token of each sequence, and cuts the cache back."""
        self._timed = {steps.PLAIN: timed(self.run)}
        self.turns: list[Contention] = []
        """What others took in turns of plain steps, the one to warm up included."""
        self.prices: DecodingPrices | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def compute_dtype(self) -> StepDtype:
        """Dtype of products and of the cache."""
        return dtype_name(self.model.compute_dtype or self.model.embed.weight.dtype)

    @property
    def weight_dtype(self) -> StepDtype:
        """Dtype in which the weights are held."""
        return dtype_name(self.model.embed.weight.dtype)

    def seconds(self, variant: Variant = steps.PLAIN) -> float:
        """Return the mean seconds of a few steps of a variant, which is made once."""
        if variant not in self._timed:
            point = Point(batch=self.batch, context=self.context, tokens=self.tokens, rows=self.cache)
            self._timed[variant] = timed(variant.steps(self.model, point))
        return self._timed[variant]()

    @cached_property
    def acceptance(self) -> Acceptance | None:
        """Guesses that a short generation accepts; None without multi-token prediction."""
        return accepted_guesses(self.model, self.rows) if len(self.model.mtp) else None

    def arms(self, rates: Rates | None) -> list[Arm]:
        """Return all arms, plain steps first."""
        self.prices = None if rates is None else DecodingPrices(self, rates)
        return decoding_arms(self, self.prices)

    @property
    def facts(self) -> dict[str, str]:
        """The subject in words."""
        weights = f"{self.weight_dtype}{'' if self.trained else ', random weights'}"
        return {
            "step": f"1 token of each of {self.batch} sequences, {self.context} tokens in the cache of each",
            "weights": f"{weights}, products and cache: {self.compute_dtype}, threads: {torch.get_num_threads()}",
            "text": self.source,
        }

    def forecast(self) -> Forecast | None:
        """Return the forecast of a plain step; None without rates."""
        return None if self.prices is None else self.prices.forecast()

    def look(self) -> list[Finding]:
        """Return the share of accepted guesses, a figure and never a fault; nothing without multi-token prediction."""
        found = self.acceptance
        if found is None:
            return []
        share = found.share
        words = (
            f"Of {found.drafted:,} guesses of multi-token prediction {share.value:.0%} are accepted ({share.low:.0%} "
            f"to {share.high:.0%}), in greedy decoding: {found.tokens_per_step:.2f} tokens a step."
        )
        if not self.trained:
            words += " The weights are random, so that this says nothing about a trained model."
        return [finding("Algorithm", "accepted_guesses", share, words)]

    def look_back(self) -> list[Finding]:
        """Return findings of the plain steps that were taken."""
        return [other_programs(self.turns[1:] or self.turns, "decoding")] if self.turns else []

    @contextmanager
    def plain(self) -> Iterator[Step]:
        """Yield plain steps, and note what others took meanwhile."""
        ended = watch(None if self.prices is None else self.prices.rates.roofs, self.device)
        yield lambda _base: self.seconds()
        self.turns.append(ended())

    @contextmanager
    def threads(self, number: int) -> Iterator[Step]:
        """Let products run on a number of cores."""
        with threads_put_back():
            torch.set_num_threads(number)
            yield lambda _base: self.seconds()


def checked_context(config: ModelConfig, context: int | None) -> int:
    """Return the number of cached tokens: the one asked for, or three quarters of what the model allows.

    Raises: ValueError for one that leaves no room for a new token.
    """
    most = config.max_seq_len - 1
    if context is None:
        return max(1, min(MOST_CONTEXT, 3 * config.max_seq_len // 4, most))
    if not 1 <= context <= most:
        raise ValueError(
            f"--context {context} is not from 1 to {most}: the model's max_seq_len is {most + 1}, and the new token "
            "needs a place"
        )
    return context


def _rows(text: Tensor | None, vocab_size: int, batch: int, context: int) -> list[list[int]]:
    """Return a piece of text for each sequence, one after another, repeated where it is too short; or random ids."""
    if text is None or not len(text):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (batch, context), generator=generator).tolist()
    whole = text.repeat(math.ceil(batch * context / len(text)))
    return whole[: batch * context].view(batch, context).tolist()


# --- predictions


class DecodingPrices:
    """Forecasts of a subject's steps, each made once."""

    def __init__(self, subject: DecodingSubject, rates: Rates) -> None:
        self.subject, self.rates = subject, rates
        self.low, self.high = ends_of(subject.config)
        self.narrow: dict[tuple[Variant, int], tuple[float, float]] = {}
        """Seconds beyond the price, and of a cached token, of narrow models, by variant and batch."""
        self.known: dict[tuple[Variant, int, int], Forecast] = {}

    def seconds(self, variant: Variant = steps.PLAIN, batch: int | None = None, context: int | None = None) -> float:
        """Return the forecast seconds of a variant's step; None: at the subject's batch and context."""
        return self.forecast(variant, batch, context).seconds

    def forecast(
        self, variant: Variant = steps.PLAIN, batch: int | None = None, context: int | None = None
    ) -> Forecast:
        """Return the forecast of a variant's step; None: at the subject's batch and context."""
        point = Point(batch=batch or self.subject.batch, context=context or self.subject.context)
        if (key := (variant, point.batch, point.context)) not in self.known:
            price = self.priced(variant, point.batch, self.subject.config)
            beyond, slope = self.told(variant, point.batch)
            parts = dict(price.by_class)
            parts["calls"] += max(beyond, (LEAST - 1) * price.seconds)
            parts["cached tokens"] = slope * (variant.at(point).context - self.low)
            parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
            seconds = max(LEAST * price.seconds, sum(parts.values()))
            self.known[key] = replace(price, by_class=parts, seconds=seconds)
        return self.known[key]

    def priced(self, variant: Variant, batch: int, config: ModelConfig) -> Forecast:
        """Return the price of a variant's step after few cached tokens."""
        dtype, point = variant.dtype or self.subject.weight_dtype, Point(batch=batch, context=self.low)
        shape = StepShape(work="decode", config=config, dtype=dtype, batch=batch, tokens=self.low)
        at_low = replace(variant, context=None)
        make = lambda: at_low.steps(like(self.subject, config), point)  # noqa: E731
        return forecast(shape, self.rates, make, f"{variant.rates_of} {dtype}")

    def told(self, variant: Variant, batch: int) -> tuple[float, float]:
        """Return the seconds of a narrow model's step beyond its price, and those of one more cached token."""
        variant = replace(variant, context=None)
        if (key := (variant, batch)) not in self.narrow:
            model = like(self.subject, narrow(self.subject.config))
            ends = {name: Point(batch=batch, context=n) for name, n in (("low", self.low), ("high", self.high))}
            runs = {name: timed(variant.steps(model, point)) for name, point in ends.items()}
            taken = in_turns(runs, count=TURNS, clock=reported).seconds
            low, high = (min(taken[name]) for name in ends)  # other programs only make it slower
            slope = max(0.0, high - low) / max(1, self.high - self.low)
            if variant.keeps_attention and (variant.dtype is None or self.subject.compute_dtype == "bfloat16"):
                slope = self.told(steps.PLAIN, batch)[1]
            self.narrow[key] = low - self.priced(variant, batch, model.config).seconds, slope
        return self.narrow[key]

    def threads(self, number: int) -> float:
        """Return the predicted seconds of a plain step on a number of threads."""
        return seconds_with_threads(self.forecast(), number, self.rates)


def ends_of(config: ModelConfig) -> tuple[int, int]:
    """Return the numbers of cached tokens after which narrow models are timed, with room for a guess of each depth."""
    most = min(LONGEST, config.max_seq_len - config.n_mtp_layers)
    if most < 2 * KEY_STEP:
        return 1, max(1, most - 1)
    return KEY_STEP - 1, most // KEY_STEP * KEY_STEP - 1  # whole steps of rows need no mask


def like(subject: DecodingSubject, config: ModelConfig) -> Transformer:
    """Return a random model in the subject's dtypes; made dry, it takes no memory."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config, compute_dtype=subject.model.compute_dtype)
    return model.to(subject.device, subject.model.embed.weight.dtype).eval()


def narrow(config: ModelConfig) -> ModelConfig:
    """Return a config with the same blocks, experts and heads, whose matrices are as small as can be."""
    widths = ("dim", "inter_dim", "moe_inter_dim", "vocab_size")
    rank = None if config.q_lora_rank is None else min(WIDTH, config.q_lora_rank)
    return replace(config, q_lora_rank=rank, **{n: min(WIDTH, getattr(config, n)) for n in widths})


# --- reasons not to try


def no_forms(c: ModelConfig) -> str | None:
    """Return why the two forms of MLA cannot be compared; None if they can."""
    if not c.is_mla:
        return f"only MLA has two forms, and the attention is {c.attention}"
    return "normed heads have no absorbed form (qk_norm)" if c.qk_norm else None


def no_mha(c: ModelConfig) -> str | None:
    """Return why there is no multi-head attention to compare with; None if there is."""
    if c.attention == "mha":
        return "the attention is multi-head attention already"
    if c.qk_nope_head_dim % 2:
        return f"heads of qk_nope_head_dim={c.qk_nope_head_dim} cannot be rotated in pairs"
    return None


def no_guesses(subject: DecodingSubject) -> str | None:
    """Return why multi-token prediction cannot guess; None if it can."""
    c, depths = subject.config, len(subject.model.mtp)
    if not depths:
        return "the model has no multi-token prediction"
    if subject.context + 1 + depths > c.max_seq_len:
        return f"{subject.context} cached tokens leave no room for a guess in max_seq_len={c.max_seq_len}"
    return None


def no_kernels(subject: DecodingSubject) -> str | None:
    """Return why weights of fewer bytes save nothing here; None if kernels read them as they lie."""
    if ops.serving(subject.device.type) != "cpu":
        return "no kernels serve here, and without them such weights are made wider in every step"
    return "the model multiplies in simulated FP8" if subject.config.precision == "fp8" else None


# --- arms


def decoding_arms(subject: DecodingSubject, prices: DecodingPrices | None) -> list[Arm]:
    """Return all arms of decoding, the plain steps first. Without prices nothing is predicted."""
    c, arm = subject.config, partial(arm_of, "decoding")
    experts = None if c.n_dense_layers < c.n_layers else "the model has no routed experts"
    few = "one token has different experts, however they are chosen; try --batch 8"
    one_token = few if subject.batch == 1 else None
    kernels, guesses = no_kernels(subject), no_guesses(subject)
    two_bytes = "the weights have 2 bytes already" if subject.weight_dtype == "bfloat16" else None

    def of(
        name: str, variant: Variant, why_not: str | None, reference: Variant | None = None, tokens: float = 1.0
    ) -> Arm:
        """Return the arm of a variant, or of its ratio to a reference that runs in the same way."""

        def step(base: float) -> float:
            seconds = subject.seconds(variant)
            return seconds if reference is None else base * seconds / subject.seconds(reference)

        def predicted(prices: DecodingPrices) -> float:
            seconds = prices.seconds(variant)
            return seconds if reference is None else prices.seconds() * seconds / prices.seconds(reference)

        predict = None if prices is None else partial(predicted, prices)
        return arm(name, lambda: nullcontext(step), why_not=why_not, predict=predict, tokens=tokens)

    return [
        Arm(name="plain", apply=subject.plain, predict=prices and prices.seconds),
        of("free_cache", steps.FREE_CACHE, None if subject.context > 1 else "there is only 1 cached token"),
        of("expanded_mla", steps.EXPANDED, no_forms(c), reference=steps.ABSORBED),
        of("mha_baseline", steps.MHA, no_mha(c)),
        of("uniform_routing", steps.UNIFORM, experts or one_token, reference=steps.ROUTED),
        of("dense_active", steps.DENSE, experts),
        of(
            "drafts",
            steps.DRAFTS,
            guesses,
            tokens=1.0 if guesses or subject.acceptance is None else subject.acceptance.tokens_per_step,
        ),
        arm(
            "all_threads",
            lambda: subject.threads(cores()),
            why_not=no_more_threads(subject.device, torch.get_num_threads()),
            predict=prices and (lambda: prices.threads(cores())),
        ),
        of("bfloat16_weights", steps.WEIGHTS["bfloat16"], kernels or two_bytes),
        of("fp8_weights", steps.WEIGHTS["fp8"], kernels),
        Arm(
            name="replay",
            axis="Data",
            why_not="decoding waits for no data: the model makes each token itself",
            apply=lambda: nullcontext(lambda base: base),
        ),
        arm("quiet_machine", lambda: quiet(subject.turns[-1]), uncounted=0, counted=1),
    ]
