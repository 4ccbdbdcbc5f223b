"""The routed experts for any number of tokens: checks, and the description of a call for the C++."""

from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.build import EXPERTS, library
from dsmini_kernels.cpu.steps import detached, matrix, place, run, span

LEAST = 1 << 20
"""Number of multiplications below which torch's calls cost no more."""


def experts(x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, w1: Any, w2: Any, w3: Any) -> Tensor:
    """Return the weighted sum of each token's chosen experts. Sums are FP32, of numbers in BF16 where x is.

    A CPU without products of BF16 numbers takes them as FP32. Hidden numbers are rounded to BF16 once, or not at all.

    Raises: Unserved for other dtypes and layouts, and for little work.
    """
    if x.dtype not in (torch.float32, torch.bfloat16) or weights.dtype != torch.float32:
        raise Unserved(f"x of {x.dtype} and weights of {weights.dtype}")
    (n, m), (e, f, _) = x.shape, w1.shape
    if 3 * indices.numel() * f * m < LEAST:
        raise Unserved
    matrices = [matrix(detached_weight(w)) for w in (w1, w2, w3)]
    x, weights = detached(x).contiguous(), detached(weights).contiguous()
    indices = indices.to(torch.int64).contiguous()
    y = torch.empty_like(x)
    call = (
        *(*place(library()), n, m, f, e, indices.shape[1], x.dtype == torch.bfloat16),
        *(*span(x), *span(y), *span(indices), *span(weights)),
        *(number for w in matrices for number in w),
    )
    run(library().experts, EXPERTS, call)
    return y


quantized_experts = experts


def detached_weight(weight: Any) -> Any:
    """Return the weight, if nobody asks for its gradient."""
    return detached(weight) if isinstance(weight, Tensor) else weight
