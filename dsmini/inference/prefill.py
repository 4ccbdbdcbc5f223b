"""Reading prompts into a cache, a part at a time."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dsmini.inference.speculative import Drafter
from dsmini.nn import Cache, Transformer
from dsmini.nn.positions import last_valid

PREFILL = 512
"""Number of tokens of each prompt that are read at a time."""


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
    lengths = torch.tensor([len(context) for context in contexts])
    last: Tensor | None = None
    for start in range(0, max(map(len, contexts)), PREFILL):
        # 1. right-padded rows of new tokens: [b, s]
        new = (lengths - start).clamp(0, PREFILL)
        tokens = padded([context[start : start + PREFILL] for context in contexts]).to(device)
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


def padded(rows: list[list[int]]) -> Tensor:
    """Return rows of token ids as a tensor [b, longest], padded with 0 on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
