"""The subject: a model that decodes one token of each sequence, over and over after the same number of tokens.

Its prompts are read once. Afterwards every step is the same work: the cache is cut back to where it was.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsmini import accounting
from dsmini.checkpoint.memory import refuse_too_large
from dsmini.config import ModelConfig
from dsmini.diagnosis.decoding.arm import Arm, Narrow
from dsmini.diagnosis.decoding.drafts import Acceptance, acceptance
from dsmini.diagnosis.decoding.steps import Point, Run, seconds_of, steps_in_turn, steps_with
from dsmini.inference.generation import prefill
from dsmini.inference.sampling import likeliest
from dsmini.measure.workloads import ROOM, StepDtype, dtype_name
from dsmini.nn import Transformer

MOST_CONTEXT = 4096
"""Largest number of cached tokens where none is asked for: more take long to read."""


@dataclass(frozen=True, kw_only=True)
class DecodedStep:
    """Decoding steps that were timed together."""

    seconds: float
    """Mean seconds of one."""


@dataclass(frozen=True, kw_only=True)
class DecodedModel:
    """A model to decode with, and a text to read before."""

    model: Transformer
    trained: bool
    """False for random weights."""
    text: Tensor | None
    """Token ids to read; None: random ones."""
    source: str
    """The text in words."""


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
        self._run = steps_with(self.model, self.cache, self.tokens)
        self._together = steps_in_turn(self._run)
        self._arms: dict[Arm, tuple[Run, int]] = {}
        self.narrow: dict[tuple[Arm, int], Narrow] = {}
        """Times and prices of narrow models, by arm and batch."""

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
    def point(self) -> Point:
        """The place where it decodes."""
        return Point(batch=self.batch, context=self.context, tokens=self.tokens, rows=self.cache)

    def step(self) -> DecodedStep:
        """Decode one token of each sequence, several times over, and cut the cache back each time."""
        return DecodedStep(seconds=seconds_of(self._run, self._together))

    def seconds(self, arm: Arm) -> float:
        """Return the seconds of a step of an arm, which is made once."""
        if arm not in self._arms:
            run = arm.steps(self.model, self.point)
            self._arms[arm] = run, steps_in_turn(run)
        return seconds_of(*self._arms[arm])

    @cached_property
    def acceptance(self) -> Acceptance | None:
        """Guesses that a short generation accepts; None without multi-token prediction, or without room for guesses."""
        return acceptance(self.model, self.rows) if len(self.model.mtp) else None


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
