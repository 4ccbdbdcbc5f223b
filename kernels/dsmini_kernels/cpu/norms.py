"""Norms outside of decoding steps: of few rows before a product, and in training. Checks, and calls of the C++."""

from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import memory, run, span
from dsmini_kernels.cpu.steps import MOST_TOKENS, detached, vector


def normed(x: Tensor, norm: Any) -> Tensor:
    """Return norm(x)."""
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    if x.dtype != torch.float32 or not 1 <= rows <= MOST_TOKENS:
        raise Unserved(f"{list(x.shape)} numbers of {x.dtype}")
    x = detached(x).contiguous()
    y = torch.empty_like(x)
    run("norms", n=rows, dim=dim, x=span(x), weight=vector(norm.weight), y=span(y), eps=norm.eps)
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
    return _train(x, weight, inverse.contiguous(), detached(grad).contiguous(), dw), dw


def _train(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor | None = None, dw: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Return the normed rows and write inverse, or return the gradient of x and write dw."""
    known = x.dtype in (torch.float32, torch.bfloat16) and weight.dtype == torch.float32
    if not known or not x.numel() or weight.shape != x.shape[-1:]:
        raise Unserved(f"{list(x.shape)} numbers of {x.dtype}, a weight of {weight.dtype} and {list(weight.shape)}")
    rows, y, weight = detached(x), x.new_empty(x.shape), detached(weight).contiguous()
    rows = rows.flatten(0, -2) if x.dim() > 1 else rows[None]
    (n, dim), size = rows.shape, x.element_size()
    if rows.stride(1) != 1 or rows.stride(0) < dim or n == 1:  # else they may be apart in memory
        rows = rows.contiguous()
    stride = size * (rows.stride(0) if n > 1 else dim)
    sizes = {"n": n, "dim": dim, "bf16": x.dtype == torch.bfloat16, "backward": grad is not None, "eps": eps}
    strided = {"x": memory(rows.data_ptr(), (n - 1) * stride + dim * size), "x_stride": stride}
    spans = {"weight": weight, "inverse": inverse, "y": y, "dy": grad, "dw": dw}
    run("trained_norm", **sizes, **strided, **{name: span(t) for name, t in spans.items()})
    return y
