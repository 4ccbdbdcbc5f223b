"""Workloads for measurements: a random model, a filled cache, random tokens.

Speed does not depend on the values of the weights, so a step can be timed without training or downloading. There are
two exceptions: the experts that a token visits, and the accepted drafts of multi-token prediction.
"""

from typing import Literal

import torch
from torch import Tensor

from dsmini.config import ModelConfig
from dsmini.nn import Transformer
from dsmini.nn.cache import Cache, CacheDtype


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Return a model with the same random weights in each call, ready to decode in this dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(config).to(dtype).eval()


def random_cache(model: Transformer, batch: int, context: int, room: int, dtype: CacheDtype | None = None) -> Cache:
    """Return a cache with random rows for `context` tokens, and room for `room` more."""
    cache = model.new_cache(batch, context + room, dtype=dtype)
    generator = torch.Generator(cache.stores[0].data.device).manual_seed(0)
    for store in cache.stores:
        if store.data.dtype == torch.uint8:  # codes and scales, encoded like real rows
            rows = torch.randn(batch, context, store.c + store.r, generator=generator, device=store.data.device)  # pyright: ignore[reportAttributeAccessIssue]
            store.data[:, :context] = store._encode(rows)
        else:
            store.data[:, :context].normal_(generator=generator)
    cache.lengths = torch.full((batch,), context)
    return cache


def random_tokens(config: ModelConfig, batch: int, length: int, device: torch.device) -> Tensor:
    """Return random token ids [batch, length] from torch's global generator."""
    return torch.randint(0, config.vocab_size, (batch, length), device=device)


def dtype_name(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    """Return the name of a dtype in accounting and in this machine's rates."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"
