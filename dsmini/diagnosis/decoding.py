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
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from dsmini import accounting, ops
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.config import ModelConfig
from dsmini.diagnosis import decoding_steps as steps
from dsmini.diagnosis.arms import Arm, Axis, Step
from dsmini.diagnosis.contention import Contention, cores, quiet_arm, watch
from dsmini.diagnosis.decoding_prices import DecodingPrices
from dsmini.diagnosis.decoding_steps import Point, Variant, timed
from dsmini.diagnosis.findings import Finding, finding, other_programs
from dsmini.diagnosis.loading import DecodedModel
from dsmini.diagnosis.prices import threads_put_back
from dsmini.inference import Generation
from dsmini.inference.generation import prefill
from dsmini.inference.sampling import likeliest
from dsmini.measure.forecast import Forecast
from dsmini.measure.rates import Roofs
from dsmini.measure.step_rates import Rates
from dsmini.measure.turns import Estimate
from dsmini.measure.workloads import ROOM, StepDtype, dtype_name
from dsmini.nn import Transformer

MOST_CONTEXT = 4096
"""Largest number of cached tokens where none is asked for: more take long to read."""
PROMPT, NEW_TOKENS, SECONDS = 64, 96, 4.0
"""Most tokens of a prompt, most new tokens, and seconds after which the counting of accepted guesses ends."""
Z_95 = 1.96
LEAVE_A_CORE = "Stop other programs, or leave them a core."


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
        return [other_programs(self.turns[1:] or self.turns, LEAVE_A_CORE)] if self.turns else []

    @contextmanager
    def plain(self, roofs: Roofs | None) -> Iterator[Step]:
        """Yield plain steps, and note what others took meanwhile."""
        ended = watch(roofs, self.device)
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


def decoding_arms(subject: DecodingSubject, prices: DecodingPrices | None) -> list[Arm]:
    """Return all arms of decoding, the plain steps first. Without prices nothing is predicted."""
    c, device, used = subject.config, subject.device, torch.get_num_threads()
    experts = None if c.n_dense_layers < c.n_layers else "the model has no routed experts"
    few = "one token has different experts, however they are chosen; try --batch 8"
    one_token = few if subject.batch == 1 else None
    kernels, all_cores = no_kernels(subject), f"all {used} cores are used already" if used >= cores() else None
    guesses = no_guesses(subject)

    def of(
        name: str,
        axis: Axis,
        variant: Variant,
        words: str,
        advice: str,
        *,
        why_not: str | None = None,
        reference: Variant | None = None,
        tokens: float = 1.0,
    ) -> Arm:
        """Return the arm of a variant, or of its ratio to a reference that runs in the same way."""

        def step(base: float) -> float:
            seconds = subject.seconds(variant)
            return seconds if reference is None else base * seconds / subject.seconds(reference)

        def predicted(prices: DecodingPrices) -> float:
            seconds = prices.seconds(variant)
            return seconds if reference is None else prices.seconds() * seconds / prices.seconds(reference)

        return Arm(
            name=name,
            axis=axis,
            words=words,
            advice=advice,
            why_not=why_not,
            apply=lambda: nullcontext(step),
            predict=None if prices is None else partial(predicted, prices),
            tokens=tokens,
        )

    return [
        Arm(
            name="plain",
            apply=lambda: subject.plain(None if prices is None else prices.rates.roofs),
            predict=prices and prices.seconds,
        ),
        of(
            "free_cache",
            "Machine",
            steps.FREE_CACHE,
            "1 cached token in place of all: the rest is not attended to",
            "Keep contexts shorter, or the cache smaller: fewer kv_lora_rank numbers a token, --cache-dtype fp8.",
            why_not=None if subject.context > 1 else "there is only 1 cached token",
        ),
        of(
            "expanded_mla",
            "Algorithm",
            steps.EXPANDED,
            "keys and values of all cached tokens are made again, instead of absorbing",
            "Expand: at so few cached tokens absorbing costs more than it saves.",
            why_not=no_forms(c),
            reference=steps.ABSORBED,
        ),
        of(
            "mha_baseline",
            "Algorithm",
            steps.MHA,
            "multi-head attention of as many heads, which caches keys and values of each",
            'Set model.attention = "mha" where contexts stay this short: it has a larger cache and fewer projections.',
            why_not=no_mha(c),
        ),
        of(
            "uniform_routing",
            "Algorithm",
            steps.UNIFORM,
            "tokens go to all experts in turn",
            "Choose experts that more sequences of a batch share, or balance them in training.",
            why_not=experts or one_token,
            reference=steps.ROUTED,
        ),
        of(
            "dense_active",
            "Algorithm",
            steps.DENSE,
            "a dense feed-forward with as many active parameters stands in for the experts",
            "Make fewer and wider experts: routing and small products cost more than they save at this size.",
            why_not=experts,
        ),
        of(
            "drafts",
            "Algorithm",
            steps.DRAFTS,
            "multi-token prediction guesses, and one step checks all guesses",
            "Add --speculative to dsmini.generate.",
            why_not=guesses,
            tokens=1.0 if guesses or subject.acceptance is None else subject.acceptance.tokens_per_step,
        ),
        Arm(
            name="all_threads",
            words="products run on all cores",
            advice="Leave train.threads out, so that all cores are used.",
            why_not=f"products run on {device}" if device.type != "cpu" else all_cores,
            apply=lambda: subject.threads(cores()),
            predict=prices and (lambda: prices.threads(cores())),
        ),
        of(
            "bfloat16_weights",
            "Machine",
            steps.WEIGHTS["bfloat16"],
            "weights are held in BF16",
            "Make a folder in BF16 with python -m dsmini.convert RUN FOLDER --dtype bfloat16, and decode from it.",
            why_not=kernels or ("the weights have 2 bytes already" if subject.weight_dtype == "bfloat16" else None),
        ),
        of(
            "fp8_weights",
            "Machine",
            steps.WEIGHTS["fp8"],
            "weights inside the blocks are held as FP8 codes with scales",
            "Make a folder in FP8 with python -m dsmini.convert RUN FOLDER --fp8, and decode with --fp8 keep.",
            why_not=kernels,
        ),
        Arm(
            name="replay",
            axis="Data",
            why_not="decoding waits for no data: the model makes each token itself",
            apply=lambda: nullcontext(lambda base: base),
        ),
        quiet_arm(lambda: subject.turns[-1], LEAVE_A_CORE),
    ]
