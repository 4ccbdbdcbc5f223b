"""Counts and times of a generation: tokens, seconds, steps, guesses and bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dsmini.nn import Cache, Experts, Routing, Transformer


@dataclass(kw_only=True)
class Stats:
    """Counts and times of a generation so far, over all rows."""

    prompt_tokens: int
    rows: int
    """Number of prompts."""
    cache_bytes: int
    """Size of the whole cache in bytes, measured from its storage when it is made."""
    cache_bytes_per_token: float
    """Size of one token in all layers in bytes, measured from the storage, without multi-token prediction."""
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    """Time of reading the prompts, in seconds."""
    seconds: float = 0.0
    """Time of decoding, in seconds: everything after the first new token of each row."""
    steps: int = 0
    """Number of decoding steps, summed over the rows that took part in each."""
    batches: int = 0
    """Number of decoding steps, each for all rows together."""
    drafted: int = 0
    """Number of tokens that multi-token prediction guessed."""
    accepted: int = 0
    """Number of accepted guesses."""
    moved_bytes: float = 0.0
    """Bytes that the decoding steps had to move, as StepTraffic counts them."""

    @property
    def decoded_tokens(self) -> int:
        """New tokens without the first of each row, which belongs to the prefill."""
        return max(0, self.new_tokens - self.rows)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of decoding."""
        return self.decoded_tokens / self.seconds if self.seconds else 0.0

    @property
    def moved_bytes_per_token(self) -> float:
        """Bytes that decoding had to move for each new token."""
        return self.moved_bytes / self.decoded_tokens if self.decoded_tokens else 0.0

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
        return self.decoded_tokens / self.steps if self.steps else 0.0


class StepTraffic:
    """The bytes that a decoding step of a generation must move, from the storage of the weights and of the cache.

    A step reads each weight once, for all rows and tokens together. Of the routed experts it reads those that some
    token chose. Of the cache it reads the rows of the context and writes those of the new tokens. That is a lower
    bound: the activations are left out, which are small (dsmini.accounting.traffic counts them from a config). Where
    several processes divide the experts, it is what one would read that has all.
    """

    def __init__(self, model: Transformer, cache: Cache) -> None:
        experts, self._expert = _experts(model.layers)
        self._once = _nbytes(model.layers) + _nbytes(model.norm) + _nbytes(model.head) - experts
        self._index_row = cache.index_nbytes_per_token
        self._row = cache.nbytes_per_token - self._index_row
        self._most = model.config.index_topk or cache.max_seq_len
        self._embedding = model.embed.weight[0].nbytes
        self._draft = self._drafting = 0.0
        if cache.mtp is not None:  # depth k runs k times, with the experts of one token
            self._drafting = len(model.mtp) / len(cache.stores)
            for k, block in enumerate(cast(list[nn.Module], list(model.mtp)), 1):
                experts, expert = _experts(block)
                used = _nbytes(block) - experts + model.config.n_activated_experts * expert
                self._draft += k * used + _nbytes(model.head)

    def nbytes(self, start: Int[Tensor, " b"], new: int, routing: Sequence[Routing]) -> float:
        """Return the bytes of a step.

        Args:
            start: valid length of each row of the cache before the step.
            new: number of tokens of each row in the step, guesses included.
            routing: the decisions of each layer with experts.
        """
        tokens, before = len(start) * new, start.tolist()
        chosen = int(torch.cat([each.counts for each in routing]).count_nonzero()) if routing else 0
        weights = self._once + chosen * self._expert + tokens * self._embedding
        rows = self._rows([n + new for n in before]) + tokens * (self._row + self._index_row)
        return weights + rows + self._draft + self._drafting * self._rows(before)

    def _rows(self, keys: list[int]) -> float:
        """Return the bytes of cached rows that queries read which see this many keys; of DSA's, the chosen ones."""
        return sum(min(n, self._most) for n in keys) * self._row + sum(keys) * self._index_row


def _experts(module: nn.Module) -> tuple[int, float]:
    """Return the bytes of all routed experts of a module, and of one of them on average."""
    stacks = [part for part in module.modules() if isinstance(part, Experts)]
    total = sum(map(_nbytes, stacks))
    return total, total / sum(len(e.w1) for e in stacks) if stacks else 0.0


def _nbytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
