"""Continuing a text, token by token."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsmini.nn import Transformer


@dataclass(frozen=True, kw_only=True)
class Stats:
    """How a generation went."""

    new_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all rows together."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


class Generated(NamedTuple):
    """What generate returns: prompts and continuations, right-padded with 0."""

    tokens: Tensor
    """[b, longest]: each row's prompt and what follows it."""
    lengths: Tensor
    """[b]: tokens in each row."""
    stats: Stats


def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Continue each prompt by up to max_new_tokens tokens. The context is recomputed for every token, and
    slides once it is max_seq_len long.

    Args:
        prompts: [b, s], or a list of rows of any lengths.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest only.
        eos_token_id: a row ends after this token; None never ends early.
        generator: source of the draws.

    Raises: ValueError for an empty prompt, a token outside the vocabulary, a negative temperature.
    """
    start = time.perf_counter()
    rows = [row.tolist() for row in prompts]
    new = 0
    for tokens in stream(
        model,
        rows,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        eos_token_id=eos_token_id,
        generator=generator,
    ):
        new += sum(token is not None for token in tokens)
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return Generated(padded, lengths, Stats(new_tokens=new, seconds=time.perf_counter() - start))


@torch.inference_mode()
def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """generate as it happens: each step's new token of every row, None for a row that has ended."""
    _check(model, prompts, max_new_tokens, temperature, top_k)
    rows = [list(prompt) for prompt in prompts]
    ended = [False] * len(rows)
    context = model.config.max_seq_len
    for _ in range(max_new_tokens):
        windows = [row[-context:] for row in rows]
        tokens = torch.zeros(len(rows), max(map(len, windows)), dtype=torch.int64)
        for i, window in enumerate(windows):
            tokens[i, : len(window)] = torch.tensor(window)  # what is padded lies in the future of every row
        last = torch.tensor([len(window) - 1 for window in windows])
        logits = model(tokens.to(model.embed.weight.device))[torch.arange(len(rows)), last].float().cpu()
        picked = sample(logits, temperature, top_k, generator).tolist()
        new = [None if done else token for done, token in zip(ended, picked, strict=True)]
        for i, token in enumerate(new):
            if token is not None:
                rows[i].append(token)
                ended[i] = token == eos_token_id
        yield new
        if all(ended):
            return


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits [b, v]; at temperature 0 the likeliest, the lowest id among equals."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    # less the largest first: divided by a tiny temperature the logits would be infinite
    return torch.multinomial(
        ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1), 1, generator=generator
    ).squeeze(1)


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int | None
) -> None:
    vocab_size = model.config.vocab_size
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give it at least one token")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt {i} has token id {token}, outside the vocabulary; want 0 to {vocab_size - 1}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative; use 0 or more")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} is not 0 or more; use 0 for the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is less than 1; use 1 or more, or leave it out")
