"""Calls of tests on small models: draw tokens, decode in chunks, and let indexers learn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsmini import Transformer
from tests.conftest import SMALL


def tokens_of(b: int, s: int) -> Tensor:
    """Return random tokens [b, s] of the vocabulary of SMALL."""
    return torch.randint(0, SMALL["vocab_size"], (b, s))


def decoded(model: Any, tokens: Tensor, sizes: int | Sequence[int], *cache: Any, **options: Any) -> Tensor:
    """Return the logits of tokens that arrive in chunks of these sizes, with a cache of these options."""
    new = model.new_cache(len(tokens), *cache, **options)
    return torch.cat([model(part, new) for part in tokens.split(sizes, 1)], 1)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter by its name; zeros where there is none."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, [*named.values()], materialize_grads=True), strict=True))


def same_weights(model: Transformer, **changes: Any) -> Transformer:
    """Return another model with the weights of this one, and with these changes of its config or options."""
    other = Transformer(model.config, **changes)
    other.load_state_dict(model.state_dict())
    return other


def set_stage(model: Transformer, stage: Any) -> Transformer:
    """Let the model's indexers learn in this stage, or for None not at all."""
    model.indexer_stage = stage
    return model
