"""Root mean square normalisation."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsmini.nn.fp32 import FP32Module, at_least_fp32


class RMSNorm(FP32Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in FP32, returned in x's dtype.

    In eager mode on a CPU it has a backward of its own: first derivatives only, and none of torch.func's transforms.

    Source: Zhang and Sennrich 2019; DeepSeek-V3 adds one after each compressed latent (report, section 4.2).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rms_norm(x: Float[Tensor, "*batch m"], weight: Float[Tensor, " m"], eps: float) -> Float[Tensor, "*batch m"]:
    """RMSNorm by torch's own operation."""
    y = at_least_fp32(x)
    return F.rms_norm(y, weight.shape, weight.to(y.dtype), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """rms_norm for the CPU, where torch makes it of operations that are slow there: means over short rows, operands of
    mixed dtypes. This one takes half to two thirds of the time (docs/log.md), and saves x, no FP32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = at_least_fp32(x)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (y * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = at_least_fp32(x) * inverse
        grad = at_least_fp32(grad)
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0)
        # a matrix-vector product: torch's mean over the last dimension is ten times slower
        mean = (product @ (weight.to(product.dtype) / x.shape[-1])).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
