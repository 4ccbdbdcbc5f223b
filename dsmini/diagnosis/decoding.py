"""Decoding as the work that is diagnosed: steps that are the same work, variants of the model, arms and predictions.

    free_cache         Machine    1 cached token in place of all: the gain is the share of cached attention
    drafts             Algorithm  multi-token prediction guesses, at the share of guesses that is accepted
    bfloat16_weights   Machine    weights of 2 bytes
    fp8_weights        Machine    weights of 1 byte, with scales
    all_threads        Machine    products run on all cores

Where a gain is negative, the current choice is faster. Other attention and dense feed-forwards are compared by
`python -m benchmarks kv-cache moe`, each with the kernels that it would have. A step is what generation does: embed
the last token, run the blocks with the cache, make logits.

    cached tokens         0 1 2 ... context-1 | new token        the new token's row is written, and attends to all
    after the step        0 1 2 ... context-1 |                  the cache is cut back to where it was

A variant is a changed model with what makes its steps: the same ones are timed, and run dry to be priced. It shares
every module with its model but those that differ, so that it takes little memory, and the model stays as it is.

Multi-token prediction guesses ahead, and the model checks all guesses in one step. With n blocks a step takes 1 + n
tokens of each sequence and makes the guesses that are accepted, and one token more:

    seconds of a token = seconds of a step with guesses / (1 + accepted guesses a step)

Worked example: a step of 10 ms, and 13 ms with one guess, of which 60 % are accepted. A token takes 13 / 1.6 = 8.1 ms:
guessing gains 19 %. At 20 % accepted it takes 10.8 ms, and guessing loses 8 %. The share of accepted guesses depends on
the text and on the training, not on the machine. So it is counted on its own, in a short greedy generation.

Source: DeepSeek-V3 report, section 5.4.3 (85 to 90 % accepted).

Predictions price the operations of a step that runs dry (measure/price.py), each at its own shape.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dsmini import accounting, ops
from dsmini.config import ModelConfig
from dsmini.diagnosis.arms import Arm, Step, Work, percent
from dsmini.diagnosis.contention import Contention, watch
from dsmini.diagnosis.findings import Finding
from dsmini.diagnosis.training import all_threads
from dsmini.inference import Generation
from dsmini.inference.fused import Decoder
from dsmini.inference.generation import prefill
from dsmini.inference.sampling import Sampling
from dsmini.inference.speculative import Drafter, accept_greedy
from dsmini.machine import memory_bytes, on_threads, refuse_too_large
from dsmini.measure.price import Forecast, Prices
from dsmini.measure.turns import stopwatch
from dsmini.measure.workloads import (
    ROOM,
    StepDtype,
    StepShape,
    decoding_step,
    dtype_name,
    random_cache,
    random_tokens,
)
from dsmini.nn import Block, Cache, Transformer
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.mtp import MTPChain

MOST_CONTEXT = 4096
"""Largest number of cached tokens where none is asked for: more take long to read."""
BATCHES = (1, 2, 4, 8, 16, 32)
"""Sequences that are decoded together in a sweep; above MOST_TOKENS of the decoder other code decodes."""
MOST_MEMORY = 0.25
"""Share of memory that all caches of a sweep may take."""
PROMPT, NEW_TOKENS, SECONDS = 64, 96, 4.0
"""Most tokens of a prompt, most new tokens, and seconds after which the counting of accepted guesses ends."""
TURN, MOST_STEPS = 0.02, 256
"""Least seconds of the steps that are timed together, as a single one of a small model is shorter than a clock's noise,
and their largest number."""


SMALLER_CACHE = {
    "mla": "a smaller kv_lora_rank, --cache-dtype fp8",
    "dsa": "a smaller kv_lora_rank, --cache-dtype fp8",
    "compressed": "larger compress_ratios, --cache-dtype fp8",
    "mha": "attention gqa or mla",
    "gqa": "a smaller n_kv_heads",
    "mqa": "narrower heads",
}
"""Changes that make the cache of each kind of attention smaller."""


class Acceptance(NamedTuple):
    """Guesses that were made and accepted, and the new tokens of a sequence in a step."""

    drafted: int
    accepted: int
    tokens_per_step: float


class DecodingSubject:
    """A model with a cache of `context` tokens for each of `batch` sequences.

    Args:
        trained: False for random weights.
        text: token ids to read before; None: random ones.
        source: the text in words.

    Raises: ValueError for a context that the model does not allow, and a cache larger than memory.
    """

    work: Work = "decoding"

    def __init__(
        self,
        model: Transformer,
        batch: int = 1,
        context: int | None = None,
        *,
        trained: bool = False,
        text: Tensor | None = None,
        source: str = "random tokens",
    ) -> None:
        self.model: Transformer = model
        self.trained: bool = trained
        self.source: str = source
        self.batch: int = batch
        self.context: int = checked_context(model.config, context)
        room = min(self.config.max_seq_len, self.context + ROOM)
        needed = accounting.cache_bytes(self.config, max_seq_len=room, batch=batch, dtype=self.compute_dtype).total
        refuse_too_large(int(needed), f"a cache of {batch} x {room} tokens", self.device)
        self.rows: list[list[int]] = _rows(text, self.config.vocab_size, batch, self.context)
        """Token ids in the cache, by sequence."""
        self.cache: Cache = self.model.new_cache(batch, room)
        with torch.no_grad():
            self.tokens: Tensor = Sampling().likeliest(prefill(self.model, self.cache, self.rows))[:, None]
        """First token of each sequence that is decoded, [b, 1]."""
        step = decoding_step(self.model, self.cache, self.tokens)
        self._timed = {(PLAIN, batch): timed(step, self.device)}
        self.turns: list[Contention] = []
        """Shares that others took in turns of plain steps, the one to warm up included."""
        self.prices: Prices | None = None

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

    @property
    def facts(self) -> dict[str, str]:
        """The subject in words."""
        weights = f"{self.weight_dtype}{'' if self.trained else ', random weights'}"
        return {
            "step": f"1 token of each of {self.batch} sequences, {self.context} tokens in the cache of each",
            "weights": f"{weights}, products and cache: {self.compute_dtype}, threads: {torch.get_num_threads()}",
            "text": self.source,
        }

    def seconds(self, variant: "Variant", batch: int | None = None) -> float:
        """Return the mean seconds of a few steps of a variant, which is made once. Another batch has random rows."""
        key = variant, batch or self.batch
        if key not in self._timed:
            point = Point(batch=key[1], context=self.context)
            if batch is None:
                point = replace(point, tokens=self.tokens, rows=self.cache)
            self._timed[key] = timed(variant.steps(self.model, point), self.device)
        return self._timed[key]()

    @cached_property
    def acceptance(self) -> Acceptance | None:
        """Guesses that a short generation accepts; None without multi-token prediction."""
        return accepted_guesses(self.model, self.rows) if len(self.model.mtp) else None

    def look(self) -> list[Finding]:
        """Return the share of accepted guesses, a figure and never a fault; nothing without multi-token prediction."""
        found = self.acceptance
        if found is None:
            return []
        share = found.accepted / max(1, found.drafted)
        words = (
            f"Greedy decoding accepts {percent(share)} of {found.drafted:,} guesses by multi-token prediction: "
            f"{found.tokens_per_step:.2f} tokens a step."
        )
        if not self.trained:
            words += " The weights are random, so that this says nothing about a trained model."
        return [Finding(axis="Algorithm", name="accepted_guesses", value=share, sentence=words)]

    def look_back(self) -> list[Finding]:
        """Return findings of the plain steps that were taken: none."""
        return []

    @property
    def contentions(self) -> list[Contention]:
        """Others' shares in the turns of plain steps."""
        return self.turns[1:] or self.turns

    def arms(self, prices: Prices | None) -> list[Arm]:
        """Return all arms, the plain steps first. Without prices nothing is predicted."""
        self.prices, c, mtp = prices, self.config, len(self.model.mtp)
        no_guess = None
        if not mtp:
            no_guess = "the model has no multi-token prediction"
        elif self.context + 1 + mtp > c.max_seq_len:
            no_guess = f"{self.context} cached tokens leave no room for a guess in max_seq_len={c.max_seq_len}"
        # only kernels read weights of fewer bytes as they lie
        no_kernels = "the model multiplies in simulated FP8" if c.precision == "fp8" else None
        if ops.serving(self.device.type) != "cpu":
            no_kernels = "no kernels serve here, and without them such weights are made wider in every step"
        no_data = "decoding waits for no data: the model makes each token itself"
        narrow = "the weights have 2 bytes already" if self.weight_dtype == "bfloat16" else None
        return [
            Arm(name="plain", apply=self.plain, predict=lambda: self.forecast().seconds),
            self.arm(
                "free_cache",
                axis="Machine",
                why_not=None if self.context > 1 else "there is only 1 cached token",
                words="1 cached token in place of all: the rest is not attended to",
                advice=f"Shorten the contexts, or make the cache smaller: {SMALLER_CACHE[c.attention]}.",
            ),
            self.arm(
                "drafts",
                axis="Algorithm",
                why_not=no_guess,
                tokens=1.0 if no_guess or self.acceptance is None else self.acceptance.tokens_per_step,
                words="multi-token prediction guesses, and one step checks all guesses",
                advice="Add --speculative to dsmini.generate.",
            ),
            self.arm(
                "bfloat16_weights",
                axis="Machine",
                why_not=no_kernels or narrow,
                words="weights are held in BF16",
                advice="Make a folder in BF16 by python -m dsmini.convert RUN FOLDER --dtype bfloat16; decode from it.",
            ),
            self.arm(
                "fp8_weights",
                axis="Machine",
                why_not=no_kernels,
                words="weights inside the blocks are held as FP8 codes with scales",
                advice="Make a folder in FP8 by python -m dsmini.convert RUN FOLDER --fp8, and decode with --fp8 keep.",
            ),
            all_threads(self, "Leave train.threads out, so that all cores are used."),
            Arm(name="replay", axis="Data", why_not=no_data, apply=self.plain),
        ]

    def arm(self, name: str, **more: Any) -> Arm:
        """Return the arm of the variant of that name."""
        variant = VARIANTS[name]
        apply = lambda: nullcontext(lambda _base: self.seconds(variant))  # noqa: E731
        return Arm(name=name, apply=apply, predict=lambda: self.forecast(name).seconds, **more)

    @contextmanager
    def plain(self) -> Iterator[Step]:
        """Yield plain steps, and note what others took meanwhile."""
        ended = watch(self.prices and self.prices.roofs, self.device)
        yield lambda _base: self.seconds(PLAIN)
        self.turns.append(ended())

    def batch_sizes(self) -> list[int]:
        """Return numbers of sequences to try, the own one first: their caches together fit into memory."""
        sizes, row = (
            [n for n in BATCHES if n != self.batch],
            accounting.kv_bytes_per_token(self.config, "float32") * self.context,
        )
        while sizes and (self.batch + sum(sizes)) * row > MOST_MEMORY * memory_bytes(self.device):
            sizes.pop()
        return [self.batch, *sizes]

    def batch_of(self, n: int) -> "nullcontext[Step]":
        """Return the context of steps of a number of sequences."""
        return nullcontext(lambda _base: self.seconds(PLAIN, n))

    @contextmanager
    def threads(self, number: int) -> Iterator[Step]:
        """Let products run on a number of cores."""
        with on_threads(number):
            yield lambda _base: self.seconds(PLAIN)

    # --- predictions

    def forecast(self, name: str = "", batch: int | None = None) -> Forecast:
        """Return the forecast of a variant's step, or of a plain one; batch None: the subject's."""
        assert self.prices is not None, "without prices nothing is predicted"
        variant, config = VARIANTS.get(name, PLAIN), self.config
        point = Point(batch=batch or self.batch, context=self.context)
        dtype, context = variant.dtype or self.weight_dtype, variant.context or self.context
        shape = StepShape(work="decode", config=config, dtype=dtype, batch=point.batch, tokens=context)
        return self.prices.forecast(shape, lambda: variant.steps(self.like(config), point), name or "plain")

    def seconds_on(self, threads: int) -> float:
        """Predict the seconds of a plain step on a number of threads."""
        with on_threads(threads):
            return self.forecast().seconds

    def like(self, config: ModelConfig) -> Transformer:
        """Return a random model in the subject's dtypes; made dry, it takes no memory."""
        with torch.random.fork_rng(devices=[]):
            made = Transformer(config, compute_dtype=self.model.compute_dtype)
        return made.to(self.device, self.model.embed.weight.dtype).eval()


def accepted_guesses(model: Transformer, rows: Sequence[Sequence[int]]) -> Acceptance:
    """Count the accepted guesses of a short greedy generation after these texts."""
    room = model.config.max_seq_len
    prompts = [row[: min(PROMPT, room // 2)] for row in rows]
    generation = Generation(model, prompts, min(NEW_TOKENS, room - max(map(len, prompts))), speculative=True)
    start = time.perf_counter()
    for _ in generation:
        if time.perf_counter() - start > SECONDS:
            break
    stats = generation.stats
    return Acceptance(stats.drafted, stats.accepted, 1 + stats.accepted / max(1, stats.drafted // len(model.mtp)))


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


# --- steps


@dataclass(frozen=True, kw_only=True)
class Point:
    """Place where steps decode."""

    batch: int
    """Number of sequences."""
    context: int
    """Number of cached tokens of each sequence."""
    tokens: Int[Tensor, "b 1"] | None = None
    """Last token of each sequence; None: random ones."""
    rows: Cache | None = None
    """Cache whose rows are copied where they fit; None: random rows."""


Maker = Callable[[Transformer, Point], Callable[[], Any]]


def plain_steps(model: Transformer, point: Point) -> Callable[[], Any]:
    """Return steps as generation takes them: by kernels where they serve."""
    return decoding_step(model, filled_cache(model, point), tokens_of(model, point))


def guessing_steps(model: Transformer, point: Point) -> Callable[[], Any]:
    """Return steps in which multi-token prediction guesses and the model checks; each is back at the point."""
    decoder, tokens = Decoder(model), tokens_of(model, point)
    room = min(max(ROOM, 1 + len(model.mtp)), model.config.max_seq_len - point.context)
    cache = random_cache(model, point.batch, point.context, room, mtp=True)
    mtp = cache.mtp
    assert mtp is not None, "the cache was made with mtp=True"
    lengths = torch.full((point.batch,), point.context)
    live, hidden = [True] * point.batch, [torch.randn_like(each) for each in mtp.last]

    @torch.no_grad()
    def step() -> object:
        cache.lengths, mtp.lengths, mtp.last = lengths.clone(), lengths.clone(), list(hidden)
        guesses, _ = Drafter(decoder, cache, Sampling()).guess(tokens, live, None)
        states = decoder.states(torch.cat((tokens, guesses), 1), cache)
        best = Sampling().likeliest(model.head(states.normed))
        return [accept_greedy(*row) for row in zip(guesses.tolist(), best.tolist(), strict=True)]

    return step


def filled_cache(model: Transformer, point: Point) -> Cache:
    """Return a cache of a model with the point's rows, or random ones, and room for new tokens."""
    room = min(ROOM, model.config.max_seq_len - point.context)
    cache = random_cache(model, point.batch, point.context, room)
    if point.rows is not None:
        for both in zip(cache.stores, point.rows.stores, strict=True):
            for store, given in zip(*(store.parts for store in both), strict=True):
                n = min(point.context, store.data.shape[1], given.data.shape[1])
                store.data[:, :n] = given.data[:, :n].to(store.data.dtype)
    return cache


def tokens_of(model: Transformer, point: Point) -> Int[Tensor, "b 1"]:
    """Return the last token of each sequence."""
    return random_tokens(model.config, point.batch, 1, model.device) if point.tokens is None else point.tokens


def timed(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Return what takes steps, as many as a turn needs, and returns the mean seconds of one."""
    run()
    clock = stopwatch(device)
    steps = max(1, min(MOST_STEPS, round(TURN / max(1e-6, clock(run, 1)))))
    return lambda: clock(run, steps) / steps


# --- variants of a model


def with_bfloat16_weights(model: Transformer) -> Transformer:
    """Return a variant whose matrices are held, and multiplied, in BF16; without multi-token prediction."""
    variant = copy.copy(model)
    for part in ("_modules", "_parameters", "_buffers"):  # its own, so that the model keeps its parts
        variant.__dict__[part] = dict(model.__dict__[part])
    tables = {id(t): t for t in model.buffers() if not t.is_floating_point()}  # shared: made dry, a copy has no numbers
    for name in ("embed", "layers", "norm", "head"):
        setattr(variant, name, copy.deepcopy(getattr(model, name), dict(tables)).bfloat16())
    c = model.config
    variant.mtp = MTPChain(replace(c, n_mtp_layers=0, n_dense_layers=min(c.n_dense_layers, c.n_layers)), Block)
    variant.compute_dtype = torch.bfloat16
    return variant


def with_fp8_weights(model: Transformer) -> Transformer:
    """Return a variant whose matrices in the blocks are held as E4M3 codes with scales, and the rest in BF16."""
    return hold_all_fp8(with_bfloat16_weights(model))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Steps of a changed model."""

    change: Callable[[Transformer], Transformer] = lambda model: model
    make: Maker = plain_steps
    context: int | None = None
    """Number of cached tokens instead of the point's."""
    dtype: StepDtype | None = None
    """Dtype in which it holds its weights; None: the model's."""

    def steps(self, model: Transformer, point: Point) -> Callable[[], Any]:
        """Return its steps of this model."""
        return self.make(self.change(model), replace(point, context=self.context or point.context))


PLAIN = Variant()
VARIANTS = {
    "free_cache": Variant(context=1),
    "drafts": Variant(make=guessing_steps),
    "bfloat16_weights": Variant(change=with_bfloat16_weights, dtype="bfloat16"),
    "fp8_weights": Variant(change=with_fp8_weights, dtype="fp8"),
}
"""Variants by the name of their arm."""
