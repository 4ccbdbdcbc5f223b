"""Embedding lookup: row weight[i] for token id i."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops


def embedding(tokens: Int[Tensor, "*batch"], weight: Float[Tensor, "v m"]) -> Float[Tensor, "*batch m"]:
    """Return weight[tokens].

    Raises: ValueError for ids that check_ids refuses.
    """
    check_ids("token", tokens, weight.shape[0])
    return F.embedding(tokens, weight)


def check_ids(what: str, ids: Int[Tensor, "*batch"], vocab_size: int) -> None:
    """Raise ValueError for an id outside the vocabulary, in eager mode on a CPU.

    On an accelerator the check would wait for the device in every step. There the commands check their data once.
    """
    if ops.shows_numbers(ids) and ids.numel():
        low, high = (int(i) for i in ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{what} id {wrong} is outside the vocabulary; want 0 to {vocab_size - 1}")
