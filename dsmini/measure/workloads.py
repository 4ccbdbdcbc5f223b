"""Things to measure on: a model with random weights, a cache that is full already, random tokens.

Speed does not depend on what the weights say, so nothing has to be trained or downloaded to time a step. Two things
do depend on it: which experts a token visits, and whether the guesses of multi-token prediction are right.
"""

from typing import Literal

import torch
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.nn import Transformer
from dsmini.nn.cache import Cache, CacheDtype


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Return a model with random weights, always the same ones, ready to decode in this dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(config).to(dtype).eval()


def random_cache(model: Transformer, batch: int, context: int, room: int, dtype: CacheDtype | None = None) -> Cache:
    """Return a cache that holds random rows in place of `context` tokens, with room for this many more."""
    cache = model.new_cache(batch, context + room, dtype=dtype)
    generator = torch.Generator(cache.stores[0].data.device).manual_seed(0)
    for store in cache.stores:
        if store.data.dtype == torch.uint8:  # codes and scales: written as rows are
            rows = torch.randn(batch, context, store.c + store.r, generator=generator, device=store.data.device)  # pyright: ignore[reportAttributeAccessIssue]
            store.data[:, :context] = store._encode(rows)
        else:
            store.data[:, :context].normal_(generator=generator)
    cache.lengths = torch.full((batch,), context)
    return cache


def random_tokens(config: ModelConfig, batch: int, length: int, device: torch.device) -> Tensor:
    """Return token ids [batch, length], drawn from torch's own generator."""
    return torch.randint(0, config.vocab_size, (batch, length), device=device)


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    """Return the name under which accounting and this machine's rates know a dtype."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"
