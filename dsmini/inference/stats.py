"""Counts and times of a generation: tokens, seconds, steps, guesses and bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dsmini.nn import Cache, Experts, Routing, Transformer


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts and times of a generation, over all rows."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Time of reading the prompts, in seconds."""
    seconds: float
    """Time of decoding, in seconds: everything after the first new token of each row."""
    steps: int
    """Number of decoding steps, summed over the rows that took part in each."""
    drafted: int
    """Number of tokens that multi-token prediction guessed."""
    accepted: int
    """Number of accepted guesses."""
    cache_bytes: int
    """Size of the whole cache in bytes, measured from its storage."""
    cache_bytes_per_token: float
    """Size of one token in all layers in bytes, measured from the storage, without multi-token prediction."""
    rows: int
    """Number of prompts."""
    moved_bytes: float = 0.0
    """Bytes that the decoding steps had to move, as StepTraffic counts them."""
    batches: int = 0
    """Number of decoding steps, each for all rows together."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of decoding. The first token of each row belongs to the prefill."""
        return max(0, self.new_tokens - self.rows) / self.seconds if self.seconds else 0.0

    @property
    def moved_bytes_per_token(self) -> float:
        """Bytes that decoding had to move for each new token."""
        decoded = self.new_tokens - self.rows
        return self.moved_bytes / decoded if decoded > 0 else 0.0

    @property
    def moved_bytes_per_s(self) -> float:
        """Rate at which decoding moved these bytes, in bytes per second."""
        return self.moved_bytes / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of accepted guesses, from 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per row and decoding step: 1 without speculation."""
        return max(0, self.new_tokens - self.rows) / self.steps if self.steps else 0.0


class StepTraffic:
    """The bytes that the decoding steps of a generation must move, from the storage of the weights and of the cache.

    A step reads each weight once, for all rows and tokens together. Of the routed experts it reads those that some
    token chose. Of the cache it reads the rows of the context and writes those of the new tokens. That is a lower
    bound: the activations are left out, which are small (dsmini.accounting.traffic counts them from a config). Where
    several processes divide the experts, it is what one would read that has all.
    """

    def __init__(self, model: Transformer, cache: Cache) -> None:
        experts = _experts(model.layers)
        self._once = _nbytes(model.layers) + _nbytes(model.norm) + _nbytes(model.head) - sum(map(_nbytes, experts))
        self._expert = sum(map(_nbytes, experts)) / sum(len(e.w1) for e in experts) if experts else 0.0
        self._index_row = cache.index_nbytes_per_token
        self._row = cache.nbytes_per_token - self._index_row
        self._most = model.config.index_topk or cache.max_seq_len
        self._embedding = model.embed.weight[0].nbytes
        self._draft = _draft_bytes(model) if cache.mtp is not None else 0
        self._drafting = len(model.mtp) / len(cache.stores) if cache.mtp is not None else 0.0
        self.total = 0.0

    def add(self, start: Int[Tensor, " b"], new: int, routing: Sequence[Routing]) -> None:
        """Add a step.

        Args:
            start: valid length of each row of the cache before the step.
            new: number of tokens of each row in the step, guesses included.
            routing: the decisions of each layer with experts.
        """
        tokens, before = len(start) * new, start.tolist()
        visited = int(torch.cat([each.counts for each in routing]).count_nonzero()) if routing else 0
        self.total += self._once + visited * self._expert + tokens * self._embedding
        self.total += self._rows([n + new for n in before]) + tokens * (self._row + self._index_row)
        self.total += self._draft + self._drafting * self._rows(before)

    def _rows(self, keys: list[int]) -> float:
        """Return the bytes of cached rows that queries read which see this many keys; of DSA's, those that it picks."""
        return sum(min(n, self._most) for n in keys) * self._row + sum(keys) * self._index_row


def _draft_bytes(model: Transformer) -> int:
    """Return the least bytes of weights for a step's guesses: depth k runs k times, with the experts of one token."""
    total = 0
    for k, block in enumerate(cast(list[nn.Module], list(model.mtp)), 1):
        stacks = _experts(block)
        experts = sum(map(_nbytes, stacks))
        chosen = experts * model.config.n_activated_experts // sum(len(e.w1) for e in stacks) if stacks else 0
        total += k * (_nbytes(block) - experts + chosen) + _nbytes(model.head)
    return total


def _experts(module: nn.Module) -> list[Experts]:
    return [part for part in module.modules() if isinstance(part, Experts)]


def _nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
