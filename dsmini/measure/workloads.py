"""Workloads for measurements: a random model, a filled cache, random tokens, and steps of training and of serving.

Speed does not depend on the values of the weights, so a step can be timed without training or downloading. There are
two exceptions: the experts that a token visits, and the accepted drafts of multi-token prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dsmini.config import ModelConfig, TrainConfig
from dsmini.inference.fused import Decoder
from dsmini.nn import Routing, Transformer
from dsmini.nn.cache import Cache, CacheDtype, Rows
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.training.optim import begin_stage, optimizers

Step = Callable[[], list[Routing]]
"""One step, which returns its routing."""
Work = Literal["training", "prefill", "decode"]
StepDtype = Literal["float32", "bfloat16", "fp8"]
"""Dtype of a step's products. "fp8": in training simulated FP8, in serving BF16 with matrices held as E4M3 codes."""
ROOM = 64
"""Rows of a cache after its context: rows are read in multiples of 64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """A step, with all that its time depends on."""

    work: Work
    config: ModelConfig
    dtype: StepDtype
    batch: int
    tokens: int
    """Tokens of a sequence in training, of a prompt in prefill; in decode, tokens in the cache before the step."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimizer, moments, recompute and grad_accum of training."""
    cache: Literal["float32", "bfloat16", "fp8"] | None = None
    """Dtype of the cache; None: the model's."""

    def make(self, device: torch.device, **training: Any) -> Step:
        """Return the step of a random model.

        Args:
            training: change and update, as of training_step.
        """
        compute = torch.float32 if self.dtype == "float32" else torch.bfloat16
        if self.work == "training":
            config = replace(self.config, precision="fp8") if self.dtype == "fp8" else self.config
            return training_step(config, self.train, compute, self.batch, self.tokens, device, **training)
        model = random_model(self.config, device, compute)
        model = hold_all_fp8(model) if self.dtype == "fp8" else model
        cache: CacheDtype | None = None
        if self.cache is not None:
            cache = "fp8" if self.cache == "fp8" else getattr(torch, self.cache)
        if self.work == "prefill":
            return prefill_step(model, self.batch, self.tokens, cache)
        room = min(ROOM, self.config.max_seq_len - self.tokens)
        return decoding_step(model, random_cache(model, self.batch, self.tokens, room, cache))


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Return a model with the same random weights in each call, ready to decode in this dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(config).to(dtype).eval()


def random_cache(
    model: Transformer, batch: int, context: int, room: int, dtype: CacheDtype | None = None, mtp: bool = False
) -> Cache:
    """Return a cache with random rows for `context` tokens, and room for `room` more.

    Args:
        mtp: with rows for multi-token prediction too.
    """
    cache = model.new_cache(batch, context + room, dtype=dtype, mtp=mtp)
    generator = torch.Generator(cache.device).manual_seed(0)
    for store in [*cache.stores, *(cache.mtp.stores if cache.mtp else ())]:
        for rows in store.parts:
            _fill(rows, context, generator)
    cache.lengths = torch.full((batch,), context)
    return cache


def _fill(rows: Rows, context: int, generator: torch.Generator) -> None:
    """Write random numbers into the first rows, encoded like real ones."""
    data = rows.data[:, :context]
    numbers = torch.empty(*data.shape[:2], rows.codec.numbers, device=data.device).normal_(generator=generator)
    data.copy_(rows.codec.encode(numbers))


def random_tokens(config: ModelConfig, batch: int, length: int, device: torch.device) -> Tensor:
    """Return random token ids [batch, length] from torch's global generator."""
    return torch.randint(0, config.vocab_size, (batch, length), device=device)


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    """Return the name of a dtype in accounting and in this machine's rates."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def training_step(
    config: ModelConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    batch: int,
    seq_len: int,
    device: torch.device,
    change: Callable[[Transformer], object] = lambda model: None,
    update: bool = True,
) -> Step:
    """Return a step that trains a random model on random tokens: forward, backward, clipping and the optimizers.

    Args:
        train: its optimizer, moments, recompute and grad_accum count.
        dtype: of activations and products.
        change: changes the model before.
        update: False for a forward and backward alone.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config, compute_dtype=dtype)
    change(model)
    begin_stage(model, train.dsa_stage)
    moving = optimizers(model, train, dtype)
    text = random_tokens(config, batch, seq_len + 1, device)

    def step() -> list[Routing]:
        routing: list[Routing] = []
        for part in text.chunk(train.grad_accum):
            losses = model.losses(part[:, :-1], part[:, 1:], recompute=train.recompute)
            (losses.total / train.grad_accum).backward()
            routing = losses.routing
        if update:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            for optimizer in moving:
                optimizer.step()
        model.zero_grad(set_to_none=True)
        return routing

    return step


def prefill_step(model: Transformer, batch: int, tokens: int, dtype: CacheDtype | None = None) -> Step:
    """Return a step that reads a random prompt and makes the logits of its last token."""
    prompt = random_tokens(model.config, batch, tokens, model.device)
    cache = model.new_cache(batch, tokens, dtype=dtype)

    @torch.no_grad()
    def step() -> list[Routing]:
        cache.truncate(0)
        read = model.states(prompt, cache)
        model.head(read.normed[:, -1:])
        return read.routing

    return step


def decoding_step(model: Transformer, cache: Cache, tokens: Int[Tensor, "b 1"] | None = None) -> Step:
    """Return a step that decodes one token of each sequence after those in a cache, and cuts the cache back.

    Args:
        tokens: last token of each sequence; None: random ones, others in each step, which choose other experts.
    """
    decoder, lengths = Decoder(model), cache.lengths.clone()

    @torch.no_grad()
    def step() -> list[Routing]:
        last = random_tokens(model.config, len(lengths), 1, model.device) if tokens is None else tokens
        states = decoder.states(last, cache)
        cache.truncate(lengths)
        model.head(states.normed)
        return states.routing

    return step
