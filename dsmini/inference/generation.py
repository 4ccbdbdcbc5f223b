"""Continuing rows of tokens from a cache, one token a step, or several with multi-token prediction as a draft."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dsmini.inference.fused import Decoder
from dsmini.inference.sampling import Sampling, is_whole, log_probabilities
from dsmini.inference.speculative import Drafter, accept, accept_greedy
from dsmini.nn import Cache, Transformer
from dsmini.nn.cache import CacheDtype, last_valid
from dsmini.nn.gate import Routing

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
    """Bytes that each further token adds in all layers, measured from the storage, without multi-token prediction."""
    cache_fixed_bytes: int = 0
    """Bytes of each row besides, whatever its length: V4's windows."""
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
    logprobs: Tensor
    """[b, most new tokens]: logarithm of the probability of each new token in nats, FP32, by the model's own
    distribution, before penalty, temperature and filters. Padding is 0, so that a row's sum is that of its text."""
    routing: list[Tensor] | None = None
    """[b, longest - 1, k] for each MoE layer without those of multi-token prediction: the experts of each token that
    the model has read, -1 in padding, for `losses(..., routing=)`; None where they are not asked for."""
    keys: list[Tensor] | None = None
    """[b, longest - 1, k] for each indexer without those of multi-token prediction: the keys, in V4 the entries, that
    each token attends to, -1 where there are fewer. A row of -1 is padding, or a token that attends to all. For
    `losses(..., keys=)`; None where routing is."""


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
    seed: int | None = None,
    generator: torch.Generator | None = None,
    cache_dtype: CacheDtype | None = None,
    routing: bool = False,
) -> Generated:
    """Continue each prompt by up to max_new_tokens tokens.

    Args:
        prompts: [b, s], or a list of rows of any lengths, tensors or lists.
        temperature, top_k, top_p, min_p, repetition_penalty: see Sampling.
        eos_token_id, speculative, generator, cache_dtype, routing: see Generation.
        seed: makes the same draws again, from a generator of its own; None: torch's draws, or those of `generator`.

    Raises: ValueError for no prompt, an empty one, a token or an end token outside the vocabulary, or more tokens than
        the context.
    """
    generation = Generation(
        model,
        rows_of(prompts),
        max_new_tokens,
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        ),
        eos_token_id=eos_token_id,
        speculative=speculative,
        generator=generator if seed is None else seeded(seed, generator),
        cache_dtype=cache_dtype,
        record_logprobs=True,
        routing=routing,
    )
    for _ in generation:
        pass
    lengths = torch.tensor([len(row) for row in generation.rows])
    logprobs = padded(generation.logprobs, dtype=torch.float32)
    experts = keys = None
    if routing:
        read = max(0, int(lengths.max()) - 1)
        most = read // model.config.tokens_per_key
        experts = [layer[:, :read] for layer in generation.experts]
        keys = [layer[:, :read, :most] for layer in generation.keys]
    return Generated(padded(generation.rows), lengths, generation.stats, logprobs, experts, keys)


@dataclass(kw_only=True, eq=False)
class Row:
    """One text of a generation."""

    tokens: list[int]
    """The prompt and its continuation so far."""
    left: int
    """Number of tokens that may still be added; 0 once the row has ended."""
    place: int
    """Number of rows before it in the generation."""
    begin: int = 0
    """First token that is in the cache."""
    new: list[int] = field(default_factory=list)
    """Tokens that the last step added."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token after the prompt, as in Generated."""

    def take(self, tokens: list[int], logprobs: list[float], ends: Collection[int]) -> None:
        """Add the tokens of a step, up to an end token or the limit."""
        self.new = tokens[: self.left]
        stop = next((i for i, token in enumerate(self.new, 1) if token in ends), None)
        self.new = self.new[:stop]
        self.left = self.left - len(self.new) if stop is None else 0
        self.tokens += self.new
        self.logprobs += logprobs[: len(self.new)]


@dataclass(eq=False, repr=False)
class Generation:
    """Streaming generate: an iterator that yields one list of new tokens per row and step, [] for finished rows."""

    model: Transformer
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    _: KW_ONLY
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: int | Sequence[int] | None = None
    """A row ends after this token, or one of these; None never ends early."""
    speculative: bool = False
    """Let multi-token prediction guess ahead; the tokens have the same distribution, in fewer steps."""
    generator: torch.Generator | None = None
    """Source of the random draws; None: torch's own."""
    cache_dtype: CacheDtype | None = None
    """Dtype of the cache, or "fp8"; None: the model's compute dtype."""
    max_seq_len: int | None = None
    """Number of tokens of a row that the cache has room for; None: the length of the longest row."""
    slide: bool = False
    """When a row fills the cache, forget its older half and read the rest again. Without it, such a request is an error
    at the start."""
    routing: bool = False
    """Record the experts and the chosen keys of each token that the model reads; not with slide. Where there are
    indexers, modules decode in the place of kernels."""
    record_logprobs: bool = False
    """Record the log-probability of each new token."""
    watch: Callable[[int, int], None] | None = None
    """Called while the prompts are read, with the number of tokens read so far and that of all."""

    def __post_init__(self) -> None:
        model, ends = self.model, self.eos_token_id
        if ends is None or not isinstance(ends, Collection):
            ends = [] if ends is None else [ends]
        room = self._checked_room(ends)
        self._ends: set[int] = set(ends)
        self._rows: list[Row] = [
            Row(tokens=list(prompt), left=self.max_new_tokens, place=i) for i, prompt in enumerate(self.prompts)
        ]
        self._active: list[Row] = list(self._rows)
        """The row that each sequence of the cache belongs to."""
        self._device, self._started = model.device, False
        self.cache: Cache = model.new_cache(len(self.prompts), room, self.cache_dtype, mtp=self.speculative)
        self.experts: list[Tensor] = []
        """The experts of each position in each MoE layer, [rows, room, k], -1 where nothing was read."""
        self.keys: list[Tensor] = []
        """The same of the keys of each indexer."""
        if self.routing and self.slide:
            raise ValueError(
                "routing is recorded of whole rows, and slide forgets a part of them; leave out one of them"
            )
        self.decoder: Decoder = Decoder(model)
        self.drafter: Drafter | None = None
        if self.speculative:
            self.drafter = Drafter(self.decoder, self.cache, self.sampling, self.generator)
        self.stats: Stats = Stats(
            prompt_tokens=sum(map(len, self.prompts)),
            rows=len(self.prompts),
            cache_bytes=self.cache.nbytes + self.cache.mtp_nbytes,
            cache_bytes_per_token=self.cache.nbytes_per_token,
            cache_fixed_bytes=self.cache.fixed_nbytes,
        )
        """Counts and times so far."""

    def _checked_room(self, ends: Collection[int]) -> int:
        """Return the number of tokens of a row that the cache needs room for.

        Raises: ValueError for prompts or options that this model, or a cache with that room, cannot serve.
        """
        prompts, max_new_tokens, config = self.prompts, self.max_new_tokens, self.model.config
        longest, context, v = max(map(len, prompts), default=0), config.max_seq_len, config.vocab_size
        check_new_tokens(max_new_tokens)
        for i, prompt in enumerate(prompts):
            if wrong := [token for token in prompt if not 0 <= token < v]:
                raise ValueError(f"prompt {i} has token id {wrong[0]}, outside the vocabulary; want 0 to {v - 1}")
        if not prompts or not min(map(len, prompts)):
            raise ValueError("a prompt is empty, or there is none; give each at least one token")
        for token in ends:
            if not is_whole(token) or not 0 <= token < v:
                raise ValueError(f"eos_token_id={token} is outside the vocabulary; want 0 to {v - 1}, or None")
        if self.speculative and not len(self.model.mtp):
            raise ValueError("speculative=True, but the model has no multi-token prediction blocks; leave it out")
        # guesses lie after a row's last token, also those of the others next to a row that has ended
        room = longest + max_new_tokens + 2 * self.speculative * len(self.model.mtp)
        room = min(context, room) if self.max_seq_len is None else self.max_seq_len
        if room > context:
            raise ValueError(f"a cache of {room} tokens is longer than the model's context of {context}; use {context}")
        # the last new token is never fed back; a row that slides needs room for its prompt and half of the cache
        fits = longest + max_new_tokens - 1 <= room or (self.slide and longest <= room and room > 1)
        if longest > context or not fits:
            limit = f"the model's context of {context}" if room == context else f"the cache's {room}"
            fewer = f"ask for {room - longest + 1} or fewer, or give a shorter prompt"
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than {limit}; "
                f"{fewer if longest <= room else 'shorten the prompt'}"
            )
        return room

    @property
    def rows(self) -> list[list[int]]:
        """Each row's prompt and continuation so far."""
        return [row.tokens for row in self._rows]

    @property
    def logprobs(self) -> list[list[float]]:
        """The log-probability of each new token so far, as in Generated; in a row that slides of what is left of it.

        They are recorded with record_logprobs alone.
        """
        return [row.logprobs for row in self._rows]

    def end(self, row: int) -> None:
        """End this row early."""
        self._rows[row].left = 0

    def __iter__(self) -> "Generation":
        return self

    @torch.inference_mode()
    def __next__(self) -> list[list[int]]:
        if not any(row.left for row in self._rows):
            raise StopIteration
        start = time.perf_counter()
        if not self._started:
            self._started = True
            logits = prefill(
                self.model, self.cache, self.rows, self.drafter, self.watch, self._record if self.routing else None
            )
            first, _ = self.sampling.draw(logits, self._seen(), self.generator)
            self._take(first[:, None].tolist(), logits[:, None])
            self.stats.prefill_seconds += time.perf_counter() - start
        else:
            self._drop_ended()
            self._forget()
            self._step()
            self.stats.seconds += time.perf_counter() - start
        return [row.new for row in self._rows]

    def _take(self, chosen: list[list[int]], logits: Float[Tensor, "b s v"]) -> None:
        """Add new tokens to the rows, each drawn after the logits of its column."""
        logprobs: list[list[float]] = [[] for _ in chosen]
        if self.record_logprobs:
            tokens = padded(chosen, self._device)
            logprobs = log_probabilities(logits[:, : tokens.shape[1]], tokens).tolist()
        for row in self._rows:
            row.new = []
        for row, new, of in zip(self._active, chosen, logprobs, strict=True):
            row.take(new, of, self._ends)
            self.stats.new_tokens += len(row.new)

    def _step(self) -> None:
        """Run one decoding step of all rows."""
        tokens = torch.tensor([row.tokens[-1:] for row in self._active], device=self._device)
        live, seen = [row.left > 0 for row in self._active], self._seen()
        # 1. the last token of each row and its guesses: [b, s]
        guesses, q = tokens[:, :0], []
        if self.drafter is not None:
            began = time.perf_counter()
            guesses, q = self.drafter.guess(tokens, live, seen)
            self.stats.draft_seconds += time.perf_counter() - began
            tokens = torch.cat((tokens, guesses), 1)
        # 2. the model's logits after each of them: [b, s, v]
        start = self.cache.lengths
        new = None if all(live) else torch.tensor(live, device="cpu") * tokens.shape[1]
        keys: list[Any] | None = [] if self.routing else None
        states = self.decoder.states(tokens, self.cache, new, keys)
        logits = self.decoder.logits(states.normed)
        # 3. the accepted guesses of each row, and one more token
        if seen is not None:  # and the guesses before each column
            held = F.one_hot(guesses, logits.shape[-1]).cumsum(1).bool()
            seen = seen[:, None] | F.pad(held, (0, 0, 1, 0))
        if self.sampling.greedy:
            best = self.sampling.likeliest(logits, seen)
            chosen = [accept_greedy(*row) for row in zip(guesses.tolist(), best.tolist(), strict=True)]
        else:
            p = self.sampling.probabilities(logits, seen)
            chosen = [accept(guesses[i].tolist(), [d[i] for d in q], p[i], self.generator) for i in range(len(p))]
        if self.drafter is not None:
            kept = [len(tokens) * is_live for tokens, is_live in zip(chosen, live, strict=True)]
            self.drafter.drop_rejected(start, padded(chosen, self._device), kept, states.given)
            self.stats.drafted += guesses.shape[1] * sum(live)
            self.stats.accepted += sum(kept) - sum(live)
        self.stats.steps += sum(live)
        self._take(chosen, logits)
        # 4. the experts and keys of what is left of them; the last new token is read in the next step
        if keys is not None:
            self._record(states.routing, keys, start, [len(row.new) for row in self._active])

    def _record(self, routing: list[Routing], keys: list[Any], starts: Int[Tensor, " b"], counts: list[int]) -> None:
        """Note experts and keys of tokens of the rows in the cache.

        Args:
            keys: those that each indexer chose.
            starts: number of tokens of each row before them.
            counts: number of tokens of each row.
        """
        sizes, topk = (len(self._rows), self.cache.max_seq_len), self.model.config.index_topk or 0
        if not self.experts and not self.keys:
            self.experts = [of.indices.new_full((*sizes, of.indices.shape[1]), -1) for of in routing]
            self.keys = [torch.full((*sizes, topk), -1, device=self._device) for _ in keys]
        experts = [of.indices.unflatten(0, (len(counts), -1)) for of in routing]
        for store, indices in zip([*self.experts, *self.keys], [*experts, *keys], strict=True):
            if indices is None:  # all keys are read, as where nothing is noted
                continue
            for i, (row, start, n) in enumerate(zip(self._active, starts.tolist(), counts, strict=True)):
                missing = store.shape[2] - indices.shape[2]
                store[row.place, start : start + n] = F.pad(indices[i, :n], (0, missing), value=-1)

    def _seen(self) -> Bool[Tensor, "b v"] | None:
        """Return a mask of the tokens that each row holds; None if the sampling needs none."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(self._active), self.model.config.vocab_size, dtype=torch.bool, device="cpu")
        for i, row in enumerate(self._active):
            seen[i, row.tokens] = True
        return seen.to(self._device)

    def _drop_ended(self) -> None:
        """Free the cache of the rows that have ended, once they are at least half of all rows."""
        live = [i for i, row in enumerate(self._active) if row.left]
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
        room, lengths = self.cache.max_seq_len, self.cache.lengths.tolist()
        full = [row.left > 0 and n >= room for row, n in zip(self._active, lengths, strict=True)]
        if not any(full):
            return
        again = torch.tensor(full, device="cpu") | (self.drafter is not None)
        self.cache.truncate(torch.where(again, 0, self.cache.lengths))
        contexts: list[list[int]] = []
        for row, is_full, read in zip(self._active, full, again.tolist(), strict=True):
            if is_full:
                row.begin = len(row.tokens) - 1 - room // 2
            contexts.append(row.tokens[row.begin : -1] if read and row.left else [])
        prefill(self.model, self.cache, contexts, self.drafter)


def prefill(
    model: Transformer,
    cache: Cache,
    contexts: list[list[int]],
    drafter: Drafter | None = None,
    watch: Callable[[int, int], None] | None = None,
    record: Callable[[list[Routing], list[Any], Tensor, list[int]], None] | None = None,
) -> Float[Tensor, "b v"]:
    """Append the tokens of each row to the cache, PREFILL at a time; return the logits after each row's last.

    Args:
        contexts: one list of token ids for each row of the cache; an empty one appends nothing.
        drafter: is shown the same tokens.
        watch: called after each part with the number of tokens read so far and that of all.
        record: called after each part with the routing, the chosen keys, the valid lengths before, and the numbers of
            new tokens.
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
        starts, keys = cache.lengths, None if record is None else list[Any]()
        states = model.states(tokens, cache, uneven, chosen=keys)
        if record is not None and keys is not None:
            record(states.routing, keys, starts, new.tolist())
        if drafter is not None:
            drafter.read(tokens, states.given, uneven)
        last = last_valid(states.normed, uneven, states.normed[:, 0] if last is None else last)
        if watch is not None:
            watch(int(lengths.clamp(max=start + PREFILL).sum()), int(lengths.sum()))
    assert last is not None, "some row has tokens"
    return model.head(last)


def padded(
    rows: Sequence[Sequence[float]], device: torch.device | None = None, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return rows of numbers as a tensor [b, longest], padded with 0 on the right; by default on torch's device."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=dtype, device=device)


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


def seeded(seed: int, generator: torch.Generator | None = None) -> torch.Generator:
    """Return a generator of this seed.

    Raises: ValueError for a seed that is none, and next to a generator.
    """
    if generator is not None:
        raise ValueError(f"seed={seed} and a generator: the draws have one source; leave out one of them")
    if not is_whole(seed) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r} is not a whole number from 0 to 2^63 - 1; use 0, say")
    return torch.Generator().manual_seed(seed)


def check_new_tokens(max_new_tokens: int) -> None:
    """Raise ValueError for a number of new tokens that is not whole, negative or too large."""
    if not is_whole(max_new_tokens) or not 0 <= max_new_tokens <= MOST_NEW:
        raise ValueError(
            f"max_new_tokens={max_new_tokens!r} is not a whole number from 0 to {MOST_NEW:,}; use for example 64"
        )
