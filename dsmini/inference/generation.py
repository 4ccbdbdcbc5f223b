"""Continuing token rows from a cache, one token at a step, or several with multi-token prediction as a draft.

Speculative decoding (DeepSeek-V3 report, section 5.4.3; Leviathan et al. 2023): the multi-token prediction blocks guess
the tokens behind the last one, the model looks at the last one and all guesses in one forward, and the guesses it
agrees with are kept. A guess x drawn from q is kept with probability min(1, p(x) / q(x)), the first that is not is
drawn anew from max(p - q, 0): what comes out is distributed as if there were no guesses, and greedy decoding, where p
and q lie on one token each, gives the same tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsmini.inference.sampling import Sampling, draw
from dsmini.nn import Transformer
from dsmini.nn.cache import CacheDtype

PREFILL = 512
"""Tokens of the prompts that are read at a time."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """How a generation went. Tokens of all rows together."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Reading the prompts."""
    seconds: float
    """Decoding: all behind the first new token of each row."""
    steps: int
    """Decoding steps, summed over the rows that each moved on."""
    drafted: int
    accepted: int
    cache_bytes: int
    """Of the whole cache, read off its storage."""
    cache_bytes_per_token: float
    """In all layers, read off the storage; multi-token prediction's is apart."""
    rows: int

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second of decoding; the first of each row is the prefill's."""
        return max(0, self.new_tokens - self.rows) / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that were kept."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens of a row in a decoding step: 1 without speculation."""
        return max(0, self.new_tokens - self.rows) / self.steps if self.steps else 0.0


class Generated(NamedTuple):
    """What generate returns: prompts and continuations, right-padded with 0."""

    tokens: Tensor
    """[b, longest]: each row's prompt and what follows it."""
    lengths: Tensor
    """[b]: tokens in each row."""
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
        speculative: let multi-token prediction guess ahead: the same tokens, in fewer steps.
        generator: source of the draws.
        cache_dtype: left out: the model's compute dtype; or "fp8".

    Raises: ValueError for no prompt, an empty one, a token outside the vocabulary, or more tokens than the context.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    generation = Generation(
        model,
        _rows(prompts),
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
    padded = torch.zeros(len(generation.rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(generation.rows):
        padded[i, : len(row)] = torch.tensor(row)
    return Generated(padded, lengths, generation.stats)


class Generation:
    """generate as it happens: an iterator whose every item has, for each row, the list of its new tokens, [] for a row
    that has ended.

    Args:
        max_seq_len: tokens of a row the cache has room for; left out: what the longest row can come to.
        slide: where a row would grow beyond the cache, forget the older half of what it holds and read the rest again;
            else that is an error at the start.
        As in generate.
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
    ) -> None:
        _check(model, prompts, max_new_tokens, speculative)
        longest = max(map(len, prompts))
        room = max_seq_len or min(model.config.max_seq_len, longest + max_new_tokens)
        _check_room(model, longest, 1 if slide else max_new_tokens, room)
        if slide and room < 2:
            raise ValueError(f"a cache of {room} token cannot forget its older half; use 2 or more")
        self.model, self.sampling, self.generator = model, sampling or Sampling(), generator
        self.rows = [list(prompt) for prompt in prompts]
        """Each row's prompt and continuation so far."""
        ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        self._ends = set(ends)
        self._left = [max_new_tokens] * len(prompts)
        self._begin = [0] * len(prompts)  # of what the cache holds of a row
        self._depths = len(model.mtp) if speculative else 0
        self.cache = model.new_cache(len(prompts), room, cache_dtype, mtp=speculative)
        self._active = list(range(len(prompts)))
        """The row that each sequence of the cache belongs to."""
        self._device = model.embed.weight.device
        self._drafting: tuple[Tensor, Tensor, Tensor] | None = None  # what multi-token prediction has not seen
        self._prompt_tokens, self._new_tokens = sum(map(len, prompts)), 0
        self._prefill_seconds = self._seconds = 0.0
        self._steps = self._drafted = self._accepted = 0
        self._started = False

    @property
    def stats(self) -> Stats:
        """So far."""
        return Stats(
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            prefill_seconds=self._prefill_seconds,
            seconds=self._seconds,
            steps=self._steps,
            drafted=self._drafted,
            accepted=self._accepted,
            cache_bytes=self.cache.nbytes + self.cache.lane_nbytes,
            cache_bytes_per_token=self.cache.nbytes_per_token,
            rows=len(self.rows),
        )

    def end(self, row: int) -> None:
        """The caller has seen enough of this row."""
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
            picked = [[token] for token in self._pick(self._read([list(row) for row in self.rows])).tolist()]
            self._prefill_seconds += time.perf_counter() - start
        else:
            self._drop_ended()
            self._make_room()
            picked = self._step()
            self._seconds += time.perf_counter() - start
        new: list[list[int]] = [[] for _ in self.rows]
        for row, tokens in zip(self._active, picked, strict=True):
            new[row] = self._take(row, tokens)
        return new

    def _take(self, row: int, tokens: list[int]) -> list[int]:
        """Append what a row has room for, up to its end."""
        taken: list[int] = []
        for token in tokens[: self._left[row]]:
            taken.append(token)
            if token in self._ends:
                break
        ended = bool(taken) and taken[-1] in self._ends
        self._left[row] = 0 if ended else self._left[row] - len(taken)
        self.rows[row] += taken
        self._new_tokens += len(taken)
        return taken

    def _read(self, contexts: list[list[int]]) -> Tensor:
        """Append each sequence's tokens to the cache, PREFILL at a time; the logits [b, v] behind its last."""
        lengths = torch.tensor([len(context) for context in contexts])
        last: Tensor | None = None
        for start in range(0, max(map(len, contexts)), PREFILL):
            new = (lengths - start).clamp(0, PREFILL)
            tokens = torch.zeros(len(contexts), int(new.max()), dtype=torch.int64)
            for i, context in enumerate(contexts):
                part = context[start : start + PREFILL]
                tokens[i, : len(part)] = torch.tensor(part, dtype=torch.int64)
            uneven = None if bool((new == tokens.shape[1]).all()) else new
            advance = self.model.advance(tokens.to(self._device), self.cache, uneven, mtp=bool(self._depths))
            states = advance.normed[torch.arange(len(contexts)), (new - 1).clamp(min=0)]
            last = states if last is None else torch.where((new > 0)[:, None].to(states.device), states, last)
        assert last is not None
        self._drafting = None
        return self.model.head(last)

    def _step(self) -> list[list[int]]:
        """One decoding step of all sequences: the tokens behind what each row holds."""
        last = torch.tensor([self.rows[row][-1:] for row in self._active], device=self._device)
        live = self._live()
        guesses, q = self._guess(last, live) if self._depths else (last[:, :0], [])
        columns = torch.cat((last, guesses), 1)
        before = self.cache.lengths
        advance = self.model.advance(columns, self.cache, None if bool(live.all()) else live * columns.shape[1])
        p = self._probabilities(self.model.head(advance.normed), guesses)
        picked = [_accept(guesses[i].tolist(), [d[i] for d in q], p[i], self.generator) for i in range(len(p))]
        kept = torch.tensor([len(tokens) for tokens in picked]) * live
        if q:
            self.cache.truncate(before + kept)
        if self._depths:
            self._drafting = (_padded(picked).to(self._device), advance.given[:, : max(map(len, picked))], kept)
        self._steps += int(live.sum())
        self._drafted += len(q) * int(live.sum())
        self._accepted += int((kept - 1).clamp(min=0).sum())
        return picked

    def _guess(self, last: Tensor, live: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A guess for each depth, [b, depths], and the distributions they were drawn from; none where the cache
        would not hold them."""
        tokens, before, lengths = self._drafting or (last, self.cache.lanes[0].before[:, None], torch.ones(len(last)))
        lengths = (lengths * live).long()
        if int(self.cache.lengths.max()) + 1 + self._depths > self.cache.max_seq_len:
            self.model.take_in(tokens, before, self.cache, lengths)
            return last[:, :0], []
        seen = self._seen()
        distributions: list[Tensor] = []

        def pick(logits: Tensor, depth: int) -> Tensor:
            distributions.append(self.sampling.probabilities(logits, seen))
            token = draw(distributions[-1], self.generator)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            return token

        return self.model.draft(tokens, before, self.cache, pick, lengths), distributions

    def _probabilities(self, logits: Tensor, guesses: Tensor) -> Tensor:
        """[b, s, v]: what the token behind each column is drawn from."""
        seen, parts = self._seen(), []
        for column in range(logits.shape[1]):
            if column and seen is not None:
                seen.scatter_(1, guesses[:, column - 1, None], True)
            parts.append(self.sampling.probabilities(logits[:, column], seen))
        return torch.stack(parts, 1)

    def _pick(self, logits: Tensor) -> Tensor:
        return draw(self.sampling.probabilities(logits, self._seen()), self.generator)

    def _seen(self) -> Tensor | None:
        """[b, v]: the tokens that each row holds; None if the sampling does not ask."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(self._active), self.model.config.vocab_size, dtype=torch.bool)
        for i, row in enumerate(self._active):
            seen[i, self.rows[row]] = True
        return seen.to(self._device)

    def _live(self) -> Tensor:
        """[b] bool: which sequences of the cache have not ended."""
        return torch.tensor([self._left[row] > 0 for row in self._active])

    def _drop_ended(self) -> None:
        """Let go of the sequences of ended rows, once they are half of all or more."""
        live = [i for i, row in enumerate(self._active) if self._left[row]]
        if 2 * len(live) > len(self._active):
            return
        self.cache.select(live)
        self._active = [self._active[i] for i in live]
        if self._drafting is not None:
            tokens, before, lengths = self._drafting
            self._drafting = (tokens[live], before[live], lengths[live])

    def _make_room(self) -> None:
        """Where a sequence has reached the end of the cache, read the newer half of it anew. What multi-token
        prediction keeps can only begin anew as a whole: with it the others are read again too, as they are."""
        room = self.cache.max_seq_len
        full = self._live() & (self.cache.lengths >= room)
        if not bool(full.any()):
            return
        anew = torch.ones_like(full) if self._depths else full
        self.cache.truncate(torch.where(anew, 0, self.cache.lengths))
        contexts: list[list[int]] = []
        for i, row in enumerate(self._active):
            if full[i]:
                self._begin[row] = len(self.rows[row]) - 1 - room // 2
            read = bool(anew[i]) and self._left[row] > 0
            contexts.append(self.rows[row][self._begin[row] : -1] if read else [])
        self._read(contexts)


def _accept(guesses: list[int], q: list[Tensor], p: Tensor, generator: torch.Generator | None) -> list[int]:
    """The guesses that are kept, and one token more.

    Args:
        q: for each guess, the distribution [v] it was drawn from.
        p: [guesses + 1, v], the model's.
    """
    kept: list[int] = []
    for i, guess in enumerate(guesses):
        device = "cpu" if generator is None else generator.device
        if torch.rand((), generator=generator, device=device).item() * q[i][guess].item() >= p[i, guess].item():
            rest = (p[i] - q[i]).clamp(min=0)
            return [*kept, int(draw((rest if rest.any() else p[i])[None], generator))]
        kept.append(guess)
    return [*kept, int(draw(p[len(guesses)][None], generator))]


def _padded(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def _rows(prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of token ids."""
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or not all(isinstance(token, int) for token in row):
            raise ValueError(
                f"prompt {i} is no row of whole numbers; want prompts [b, s], or a list of rows of token ids"
            )
    return [list(row) for row in rows]  # pyright: ignore[reportArgumentType]


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, speculative: bool) -> None:
    vocab_size = model.config.vocab_size
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give it at least one token")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt {i} has token id {token}, outside the vocabulary; want 0 to {vocab_size - 1}")
    if not isinstance(max_new_tokens, int):
        raise ValueError(f"max_new_tokens={max_new_tokens} is no whole number; use for example 64")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative; use 0 or more")
    if speculative and not len(model.mtp):
        raise ValueError("speculative=True, but the model has no multi-token prediction blocks; leave it out")


def _check_room(model: Transformer, longest: int, max_new_tokens: int, room: int) -> None:
    context = model.config.max_seq_len
    if longest > context:
        raise ValueError(f"a prompt of {longest} tokens is longer than the model's context of {context}; shorten it")
    if longest > room:
        raise ValueError(f"a prompt of {longest} tokens is longer than the cache's {room}; make that larger")
    # the last new token is never fed back
    if longest + max_new_tokens - 1 > room:
        what = f"the model's context of {context}" if room >= context else f"the cache's {room}"
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than {what}; "
            f"use max_new_tokens={max(0, room - longest + 1)}, or a shorter prompt"
        )
