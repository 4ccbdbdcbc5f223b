"""Continuing rows of tokens from a cache, one token a step, or several with multi-token prediction as a draft."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsmini.inference.fused import Decoder
from dsmini.inference.sampling import Sampling, draw, is_whole, likeliest
from dsmini.inference.speculative import Drafter, accept, accept_greedy
from dsmini.nn import Cache, Transformer
from dsmini.nn.cache import CacheDtype, last_valid

PREFILL = 2048
"""Number of tokens of each prompt that are read at a time."""
MOST_NEW = 1_000_000_000
"""Largest number of new tokens that may be asked for: years of decoding."""


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
    drafted: int = 0
    """Number of tokens that multi-token prediction guessed."""
    accepted: int = 0
    """Number of accepted guesses."""
    draft_seconds: float = 0.0
    """Part of the time of decoding that multi-token prediction took, in seconds."""

    @property
    def decoded_tokens(self) -> int:
        """New tokens without the first of each row, which belongs to the prefill."""
        return max(0, self.new_tokens - self.rows)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of decoding."""
        return _ratio(self.decoded_tokens, self.seconds)

    @property
    def acceptance_rate(self) -> float:
        """Share of accepted guesses, from 0 to 1."""
        return _ratio(self.accepted, self.drafted)

    @property
    def tokens_per_step(self) -> float:
        """New tokens per row and decoding step: 1 without speculation."""
        return _ratio(self.decoded_tokens, self.steps)

    @property
    def most_speedup(self) -> float:
        """Upper bound of the speed of this decoding relative to that without guesses.

        A step without guesses takes at most the time that the model took here for a token and its guesses.
        """
        return self.tokens_per_step * (1 - _ratio(self.draft_seconds, self.seconds))


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


class Generated(NamedTuple):
    """Prompts with their continuations, padded with 0 on the right."""

    tokens: Tensor
    """[b, longest]: each row's prompt and its continuation."""
    lengths: Tensor
    """[b]: number of tokens of each row, prompt included."""
    stats: Stats


def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    speculative: bool = False,
    generator: torch.Generator | None = None,
    cache_dtype: CacheDtype | None = None,
) -> Generated:
    """Continue each prompt by up to max_new_tokens tokens.

    Args:
        prompts: [b, s], or a list of rows of any lengths, tensors or lists.
        temperature, top_k, top_p, min_p, repetition_penalty: see Sampling.
        eos_token_id: a row ends after this token, or one of these; None never ends early.
        speculative: let multi-token prediction guess ahead; the tokens have the same distribution, in fewer steps.
        generator: source of the random draws.
        cache_dtype: None: the model's compute dtype; or "fp8".

    Raises: ValueError for no prompt, an empty one, a token or an end token outside the vocabulary, or more tokens than
        the context.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    generation = Generation(
        model,
        rows_of(prompts),
        max_new_tokens,
        sampling=sampling,
        eos_token_id=eos_token_id,
        speculative=speculative,
        generator=generator,
        cache_dtype=cache_dtype,
    )
    for _ in generation:
        pass
    lengths = torch.tensor([len(row) for row in generation.rows])
    return Generated(padded(generation.rows), lengths, generation.stats)


class Generation:
    """Streaming generate: an iterator that yields one list of new tokens per row and step, [] for finished rows.

    Args:
        max_seq_len: number of tokens of a row that the cache has room for; None: the length of the longest row.
        slide: when a row fills the cache, forget its older half and read the rest again. Without it, such a request
            is an error at the start.
        watch: called while the prompts are read, with the number of tokens read so far and that of all.
        The others are as in generate.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        speculative: bool = False,
        generator: torch.Generator | None = None,
        cache_dtype: CacheDtype | None = None,
        max_seq_len: int | None = None,
        slide: bool = False,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        ends = [] if eos_token_id is None else eos_token_id
        ends = ends if isinstance(ends, Collection) else [ends]
        room = checked_room(model, prompts, max_new_tokens, ends, max_seq_len, slide, speculative)
        self.model: Transformer = model
        self.sampling: Sampling = sampling or Sampling()
        self.generator: torch.Generator | None = generator
        self.rows: list[list[int]] = [list(prompt) for prompt in prompts]
        """Each row's prompt and continuation so far."""
        self._ends, self._watch = set(ends), watch
        self._left = [max_new_tokens] * len(prompts)
        self._begin = [0] * len(prompts)  # first token of each row that is in the cache
        self.cache: Cache = model.new_cache(len(prompts), room, cache_dtype, mtp=speculative)
        self.decoder: Decoder = Decoder(model)
        self.drafter: Drafter | None = (
            Drafter(self.decoder, self.cache, self.sampling, generator) if speculative else None
        )
        self._active = list(range(len(prompts)))
        """The row that each sequence of the cache belongs to."""
        self._device, self._started = model.device, False
        self.stats: Stats = Stats(
            prompt_tokens=sum(map(len, prompts)),
            rows=len(prompts),
            cache_bytes=self.cache.nbytes + self.cache.mtp_nbytes,
            cache_bytes_per_token=self.cache.nbytes_per_token,
        )
        """Counts and times so far."""

    def end(self, row: int) -> None:
        """End this row early."""
        self._left[row] = 0

    def __iter__(self) -> "Generation":
        return self

    @torch.inference_mode()
    def __next__(self) -> list[list[int]]:
        if not any(self._left):
            raise StopIteration
        start = time.perf_counter()
        if not self._started:
            self._started = True
            logits = prefill(self.model, self.cache, self.rows, self.drafter, self._watch)
            if self.sampling.greedy:
                first = likeliest(logits)
            else:
                first = draw(self.sampling.probabilities(logits, self._seen()), self.generator)
            chosen = [[token] for token in first.tolist()]
            self.stats.prefill_seconds += time.perf_counter() - start
        else:
            self._drop_ended()
            self._forget()
            chosen = self._step()
            self.stats.seconds += time.perf_counter() - start
        new: list[list[int]] = [[] for _ in self.rows]
        for row, tokens in zip(self._active, chosen, strict=True):
            new[row] = self._take(row, tokens)
        return new

    def _take(self, row: int, tokens: list[int]) -> list[int]:
        """Append new tokens to a row, up to its end token or its limit; return those that were appended."""
        taken: list[int] = []
        for token in tokens[: self._left[row]]:
            taken.append(token)
            if token in self._ends:
                break
        ended = bool(taken) and taken[-1] in self._ends
        self._left[row] = 0 if ended else self._left[row] - len(taken)
        self.rows[row] += taken
        self.stats.new_tokens += len(taken)
        return taken

    def _step(self) -> list[list[int]]:
        """Run one decoding step of all rows; return the new tokens of each."""
        tokens = torch.tensor([self.rows[row][-1:] for row in self._active], device=self._device)
        live = self._live()
        # 1. the last token of each row and its guesses: [b, s]
        guesses, q = tokens[:, :0], []
        if self.drafter is not None:
            began = time.perf_counter()
            guesses, q = self.drafter.guess(tokens, live, self._seen())
            self.stats.draft_seconds += time.perf_counter() - began
            tokens = torch.cat((tokens, guesses), 1)
        # 2. the model's logits after each of them: [b, s, v]
        start = self.cache.lengths
        new = None if all(live) else torch.tensor(live, device="cpu") * tokens.shape[1]
        states = self.decoder.states(tokens, self.cache, new)
        logits = self.decoder.logits(states.normed)
        # 3. the accepted guesses of each row, and one more token
        if self.sampling.greedy:
            chosen = [accept_greedy(*row) for row in zip(guesses.tolist(), likeliest(logits).tolist(), strict=True)]
        else:
            p = self._probabilities(logits, guesses)
            chosen = [accept(guesses[i].tolist(), [d[i] for d in q], p[i], self.generator) for i in range(len(p))]
        if self.drafter is not None:
            kept = [len(tokens) * is_live for tokens, is_live in zip(chosen, live, strict=True)]
            self.drafter.drop_rejected(start, padded(chosen, self._device), kept, states.given)
            self.stats.drafted += guesses.shape[1] * sum(live)
            self.stats.accepted += sum(kept) - sum(live)
        self.stats.steps += sum(live)
        return chosen

    def _probabilities(self, logits: Float[Tensor, "b s v"], guesses: Int[Tensor, "b n"]) -> Float[Tensor, "b s v"]:
        """Return the distribution of the next token after each column."""
        seen, parts = self._seen(), []
        for column in range(logits.shape[1]):
            if column and seen is not None:
                seen.scatter_(1, guesses[:, column - 1, None], True)
            parts.append(self.sampling.probabilities(logits[:, column], seen))
        return torch.stack(parts, 1)

    def _seen(self) -> Bool[Tensor, "b v"] | None:
        """Return a mask of the tokens that each row holds; None if the sampling needs none."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(self._active), self.model.config.vocab_size, dtype=torch.bool, device="cpu")
        for i, row in enumerate(self._active):
            seen[i, self.rows[row]] = True
        return seen.to(self._device)

    def _live(self) -> list[bool]:
        """Return which sequences of the cache have not ended."""
        return [self._left[row] > 0 for row in self._active]

    def _drop_ended(self) -> None:
        """Free the cache of the rows that have ended, once they are at least half of all rows."""
        live = [i for i, row in enumerate(self._active) if self._left[row]]
        if 2 * len(live) > len(self._active):
            return
        self.cache.select(live)
        if self.drafter is not None:
            self.drafter.select(live)
        self._active = [self._active[i] for i in live]

    def _forget(self) -> None:
        """Read the newer half of each row again that has reached the end of the cache.

        The cache of multi-token prediction can only start again for all rows, so then all rows are read again.
        """
        room = self.cache.max_seq_len
        full = [is_live and n >= room for is_live, n in zip(self._live(), self.cache.lengths.tolist(), strict=True)]
        if not any(full):
            return
        again = torch.tensor(full, device="cpu") | (self.drafter is not None)
        self.cache.truncate(torch.where(again, 0, self.cache.lengths))
        contexts: list[list[int]] = []
        for i, row in enumerate(self._active):
            if full[i]:
                self._begin[row] = len(self.rows[row]) - 1 - room // 2
            read = bool(again[i]) and self._left[row] > 0
            contexts.append(self.rows[row][self._begin[row] : -1] if read else [])
        prefill(self.model, self.cache, contexts, self.drafter)


def prefill(
    model: Transformer,
    cache: Cache,
    contexts: list[list[int]],
    drafter: Drafter | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b v"]:
    """Append the tokens of each row to the cache, PREFILL at a time; return the logits after each row's last.

    Args:
        contexts: one list of token ids for each row of the cache; an empty one appends nothing.
        drafter: is shown the same tokens.
        watch: called after each part with the number of tokens read so far and that of all.
    """
    device = model.device
    lengths = torch.tensor([len(context) for context in contexts], device="cpu")
    last: Tensor | None = None
    for start in range(0, max(map(len, contexts)), PREFILL):
        # 1. right-padded rows of new tokens: [b, s]
        new = (lengths - start).clamp(0, PREFILL)
        tokens = padded([context[start : start + PREFILL] for context in contexts], device)
        uneven = None if bool((new == tokens.shape[1]).all()) else new
        # 2. hidden states of all of them, of which the last in each row are needed: [b, m]
        states = model.states(tokens, cache, uneven)
        if drafter is not None:
            drafter.read(tokens, states.given, uneven)
        last = last_valid(states.normed, uneven, states.normed[:, 0] if last is None else last)
        if watch is not None:
            watch(int(lengths.clamp(max=start + PREFILL).sum()), int(lengths.sum()))
    assert last is not None, "some row has tokens"
    return model.head(last)


def padded(rows: list[list[int]], device: torch.device | None = None) -> Tensor:
    """Return rows of token ids as a tensor [b, longest], padded with 0 on the right; by default on torch's device."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)


def rows_of(prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Return prompts as lists of token ids.

    Raises: ValueError for a row that does not hold whole numbers.
    """
    rows: list[Any] = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or not all(map(is_whole, row)):
            raise ValueError(
                f"prompt {i} is not a row of whole numbers; want prompts [b, s], or a list of rows of token ids"
            )
    return [list(row) for row in rows]


def check_new_tokens(max_new_tokens: int) -> None:
    """Raise ValueError for a number of new tokens that is not whole, negative or too large."""
    if not is_whole(max_new_tokens) or not 0 <= max_new_tokens <= MOST_NEW:
        raise ValueError(
            f"max_new_tokens={max_new_tokens!r} is not a whole number from 0 to {MOST_NEW:,}; use for example 64"
        )


def checked_room(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    max_seq_len: int | None,
    slide: bool,
    speculative: bool,
) -> int:
    """Return the number of tokens of a row that the cache needs room for.

    Raises: ValueError for prompts or options that this model, or a cache with that room, cannot serve.
    """
    longest, context, v = max(map(len, prompts), default=0), model.config.max_seq_len, model.config.vocab_size
    check_new_tokens(max_new_tokens)
    for i, prompt in enumerate(prompts):
        if wrong := [token for token in prompt if not 0 <= token < v]:
            raise ValueError(f"prompt {i} has token id {wrong[0]}, outside the vocabulary; want 0 to {v - 1}")
    if not prompts or not min(map(len, prompts)):
        raise ValueError("a prompt is empty, or there is none; give each at least one token")
    for token in ends:
        if not is_whole(token) or not 0 <= token < v:
            raise ValueError(f"eos_token_id={token} is outside the vocabulary; want 0 to {v - 1}, or None")
    if speculative and not len(model.mtp):
        raise ValueError("speculative=True, but the model has no multi-token prediction blocks; leave it out")
    # guesses lie after a row's last token, also those of the others next to a row that has ended
    room = longest + max_new_tokens + 2 * speculative * len(model.mtp)
    room = min(context, room) if max_seq_len is None else max_seq_len
    # the last new token is never fed back; a row that slides needs room for its prompt and half of the cache
    fits = longest + max_new_tokens - 1 <= room or (slide and longest <= room and room > 1)
    if longest > context or not fits:
        limit = f"the model's context of {context}" if room >= context else f"the cache's {room}"
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than {limit}; "
            + (
                f"ask for {room - longest + 1} or fewer, or give a shorter prompt"
                if longest <= room
                else "shorten the prompt"
            )
        )
    return room
