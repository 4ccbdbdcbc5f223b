"""Prompts: as lists of token ids, and whether a model can continue them."""

from collections.abc import Collection, Sequence
from numbers import Integral

from torch import Tensor

from dsmini.nn import Transformer

MOST_NEW_TOKENS = 2**31 - 1
"""Largest number of new tokens of a row."""


def rows_of(prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Return prompts as lists of token ids.

    Raises: ValueError for a row that does not hold whole numbers.
    """
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or not all(_is_whole(token) for token in row):
            raise ValueError(
                f"prompt {i} is not a row of whole numbers; want prompts [b, s], or a list of rows of token ids"
            )
    return [list(row) for row in rows]  # pyright: ignore[reportArgumentType]


def check_request(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
    speculative: bool,
) -> None:
    """Raise ValueError for prompts or options that this model cannot serve."""
    vocab_size = model.config.vocab_size
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give it at least one token")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt {i} has token id {token}, outside the vocabulary; want 0 to {vocab_size - 1}")
    if not _is_whole(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens} is not a whole number; use for example 64")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative; use 0 or more")
    if max_new_tokens > MOST_NEW_TOKENS:
        raise ValueError(f"max_new_tokens={max_new_tokens} is more than {MOST_NEW_TOKENS}; use that or less")
    for token in ends:
        if not _is_whole(token) or not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_id={token} is outside the vocabulary; want 0 to {vocab_size - 1}, or None")
    if speculative and not len(model.mtp):
        raise ValueError("speculative=True, but the model has no multi-token prediction blocks; leave it out")


def check_room(model: Transformer, longest: int, max_new_tokens: int, room: int, slide: bool) -> None:
    """Raise ValueError if prompts of up to `longest` tokens cannot be continued in a cache of `room` tokens a row.

    Args:
        slide: a row that fills the cache continues in its newer half, so that only its first new token must fit.
    """
    context = model.config.max_seq_len
    if longest > context:
        raise ValueError(f"a prompt of {longest} tokens is longer than the model's context of {context}; shorten it")
    if longest > room:
        raise ValueError(f"a prompt of {longest} tokens is longer than the cache's {room}; make that larger")
    max_new_tokens = 1 if slide else max_new_tokens
    # the last new token is never fed back
    if longest + max_new_tokens - 1 > room:
        limit = f"the model's context of {context}" if room >= context else f"the cache's {room}"
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than {limit}; "
            f"use max_new_tokens={max(0, room - longest + 1)}, or a shorter prompt"
        )
    if slide and room < 2:
        raise ValueError(f"a cache of {room} token cannot forget its older half; use 2 or more")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
