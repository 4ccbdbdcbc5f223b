"""Activation recomputation: save the inputs of a layer for backward, and compute the rest again there."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dsmini import ops


def recomputed(run: Callable[..., Any], *args: Any) -> Any:
    """Return run(*args). Backward computes its activations again, on the backend of the forward."""
    if torch.compiler.is_compiling():
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    backend = ops.chosen()

    def on_the_same_backend(*inputs: Any) -> Any:
        with ops.use(backend):
            return run(*inputs)

    return checkpoint(on_the_same_backend, *args, use_reentrant=False, preserve_rng_state=False)
