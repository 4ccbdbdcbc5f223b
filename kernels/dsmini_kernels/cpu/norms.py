"""Norms outside of decoding steps: of few rows before a product, and in training. Checks, and calls of the C++."""

from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import detached, is_bf16, run, span, strided
from dsmini_kernels.cpu.steps import MOST_TOKENS, vector


def normed(x: Tensor, norm: Any) -> Tensor:
    """Return norm(x)."""
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    if x.dtype != torch.float32 or not 1 <= rows <= MOST_TOKENS:
        raise Unserved(f"{list(x.shape)} numbers of {x.dtype}")
    y = x.new_empty(x.shape)
    run("norms", n=rows, dim=dim, x=x, weight=vector(norm.weight), y=span(y), eps=norm.eps)
    return y


def trained_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + eps) * weight in x's dtype, and each row's 1 / sqrt(mean(x^2) + eps)."""
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return _train(x, weight, inverse, eps=eps), inverse


def trained_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    if grad.dtype != x.dtype or grad.shape != x.shape:
        raise Unserved(f"a gradient of {grad.dtype} and {list(grad.shape)}")
    dw = torch.empty_like(weight)
    return _train(x, weight, inverse.contiguous(), grad, dw), dw


def _train(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor | None = None, dw: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Return the normed rows and write inverse, or return the gradient of x and write dw."""
    bf16 = is_bf16(x)
    if weight.dtype != torch.float32 or not x.numel() or weight.shape != x.shape[-1:]:
        raise Unserved(f"{list(x.shape)} numbers, and a weight of {weight.dtype} and {list(weight.shape)}")
    rows, y = detached(x).reshape(-1, x.shape[-1]), x.new_empty(x.shape)
    n, dim = rows.shape
    if rows.stride(1) != 1 or rows.stride(0) < dim or n == 1:  # else they may be apart in memory
        rows = rows.contiguous()
    stride = x.element_size() * (rows.stride(0) if n > 1 else dim)
    sizes = {"n": n, "dim": dim, "bf16": bf16, "backward": grad is not None, "eps": eps}
    written = {"inverse": span(inverse), "y": span(y), "dw": span(dw)}
    run("trained_norm", **sizes, **written, x=strided(rows), x_stride=stride, weight=weight, dy=grad)
    return y
