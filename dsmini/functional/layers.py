"""Linears and root mean square normalisation on a CPU, where torch's own are slow.

Without BF16 units a product of several BF16 rows is made in FP32: operands are widened, and sums rounded to BF16 once,
as such units do. For their gradients linears keep operands in BF16; attention and experts without a kernel keep FP32
copies. RMSNorm has a backward of its own.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsmini import machine, ops
from dsmini.numerics import QuantizedTensor, at_least_fp32

KERNEL_FROM = 1 << 14
"""Numbers from which a norm in training asks for its kernel, which may have to be compiled."""
FEW_ROWS = 3
"""Rows below which a wider copy of the weight costs more than it saves."""


@ops.eager("linear")
def linear_eager(x: Tensor, weight: Tensor) -> Tensor:
    dtype = product_dtype(x) if x.dtype == torch.bfloat16 else x.dtype
    weight = weight.to(x.dtype)
    if dtype != x.dtype and torch.is_grad_enabled():
        return _wide_linear(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


@ops.eager("quantized_linear")
def quantized_linear_eager(x: Tensor, weight: QuantizedTensor) -> Tensor:
    return linear_eager(x, weight.dequantize(x.dtype))


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which these rows are multiplied fastest."""
    return torch.float32 if x.shape[:-1].numel() >= FEW_ROWS and is_slow_bf16(x) else x.dtype


def joined(parts: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    """Return parts as one tensor; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def is_slow_bf16(x: Tensor) -> bool:
    """Return True for BF16 on a CPU without BF16 units, where many rows are multiplied faster in FP32 (docs/log.md).

    False under autocast, which would make them BF16 again.
    """
    here = x.is_cpu and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return here and not machine.multiplies_bf16() and not torch.is_autocast_enabled("cpu")


def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute a linear of BF16 rows whose products are made in FP32. First derivatives only."""
    of_x, of_weight = x.requires_grad, weight.requires_grad

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y = F.linear(x.float(), weight.float()).to(x.dtype)
        return y, (x if of_weight else None, weight if of_x else None)

    def gradients(grad: Tensor, x: Tensor | None, weight: Tensor | None) -> list[Tensor | None]:
        wide, dx, dw = grad.float(), None, None
        if weight is not None:
            dx = (wide @ weight.float()).to(grad.dtype)
        if x is not None:
            rows = x.reshape(-1, x.shape[-1]).float()
            dw = (wide.reshape(-1, wide.shape[-1]).T @ rows).to(grad.dtype)
        return [dx, dw]

    return ops.trained(forward, gradients, x, weight)


@ops.operation("trained_norm")
def trained_norm(
    x: Float[Tensor, "*batch m"], weight: Float[Tensor, " m"], eps: float
) -> tuple[Float[Tensor, "*batch m"], Float[Tensor, "*batch 1"]]:
    """Return rms_norm, and each row's 1 / sqrt(mean(x^2) + eps)."""
    y = at_least_fp32(x)
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (y * inverse).mul_(weight).to(x.dtype), inverse


@ops.operation("trained_norm_gradients")
def trained_norm_gradients(
    grad: Float[Tensor, "*batch m"],
    x: Float[Tensor, "*batch m"],
    weight: Float[Tensor, " m"],
    inverse: Float[Tensor, "*batch 1"],
) -> tuple[Float[Tensor, "*batch m"], Float[Tensor, " m"]]:
    """Return the gradients of x and of the weight."""
    unit, wide = x.to(inverse.dtype) * inverse, grad.to(inverse.dtype)
    product = wide * unit
    # a matrix-vector product: torch's mean over the last dimension is ten times slower
    mean = (product @ (weight.to(product.dtype) / x.shape[-1])).unsqueeze(-1)
    grad_x = (wide * weight).addcmul_(unit, mean, value=-1).mul_(inverse)
    return grad_x.to(x.dtype), product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


@ops.eager("rms_norm")
def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute rms_norm with torch's operation, or in training on a CPU by the two operations, with first derivatives.

    torch composes its gradients of slow operations: means over short rows, mixed dtypes. These take half to two thirds
    of the time, less by a kernel (docs/log.md), and keep x instead of FP32 copies.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = at_least_fp32(x)
        return F.rms_norm(y, weight.shape, weight.to(y.dtype), eps).to(x.dtype)
    known = x.dtype in (torch.float32, torch.bfloat16) and weight.dtype == torch.float32
    served = known and x.numel() >= KERNEL_FROM and weight.shape == x.shape[-1:]
    served = served and not torch.is_autocast_enabled("cpu")
    norm, gradients = trained_norm, trained_norm_gradients

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, inverse = (norm if served else norm.plain)(x, weight, eps)
        return y, (x, weight, inverse)

    return ops.trained(forward, gradients if served else gradients.plain, x, weight)
