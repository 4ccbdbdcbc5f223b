"""The norm before a product that no step contains: its check, and the description of a call for the C++."""

from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import run
from dsmini_kernels.cpu.steps import MOST_TOKENS, detached, n_threads, vectors
from dsmini_kernels.cpu.tiles import span


def normed(x: Tensor, norm: Any, y: Tensor | None = None, y_norm: Any = None) -> Tensor:
    """Return norm(x), or norm(x) and y_norm(y) side by side."""
    rows = x.shape[:-1].numel()
    if x.dtype != torch.float32 or not 1 <= rows <= MOST_TOKENS:
        raise Unserved(f"{list(x.shape)} numbers of {x.dtype}")
    if y is not None and (y.dtype != x.dtype or y.shape != x.shape):
        raise Unserved(f"{list(y.shape)} numbers of {y.dtype} next to {list(x.shape)} of {x.dtype}")
    x, y = detached(x).contiguous(), None if y is None else detached(y).contiguous()
    inputs = 1 if y is None else 2
    out = x.new_empty(*x.shape[:-1], inputs * x.shape[-1])
    (a, x_bytes), (b, y_bytes) = span(x), span(y)
    weights = vectors(norm.weight, None if y is None else y_norm.weight)
    call = (
        *(n_threads(), rows, x.shape[-1], a, b, x_bytes, y_bytes, *weights, *span(out)),
        *(norm.eps, 0.0 if y is None else y_norm.eps),
    )
    run("norms", call)
    return out
