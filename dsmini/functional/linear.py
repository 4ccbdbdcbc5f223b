"""Products of BF16 rows on CPUs without BF16 units, where torch takes 3 to 16 times as long in BF16 as in FP32.

With several rows the operands become FP32, are multiplied, and the sums are rounded to BF16 once, as BF16 units do. Not
in training: autograd would keep the wider operands.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import machine, ops
from dsmini.numerics import QuantizedTensor

FEW_ROWS = 8
"""Rows below which a product reads its weight once, and a wider copy would cost more than it saves."""


def is_slow_bf16(x: Tensor) -> bool:
    """Return True for BF16 numbers on a CPU without BF16 units, 2 to 16 times as fast with many rows in FP32."""
    here = x.is_cpu and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return here and not machine.multiplies_bf16()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which these rows are multiplied fastest."""
    many = not torch.is_grad_enabled() and x.shape[:-1].numel() >= FEW_ROWS
    return torch.float32 if many and is_slow_bf16(x) else x.dtype


@ops.eager("linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    dtype = product_dtype(x)
    return F.linear(x.to(dtype), weight.to(x.dtype).to(dtype)).to(x.dtype)


@ops.eager("quantized_linear")
def _(x: Tensor, weight: QuantizedTensor) -> Tensor:
    dtype = product_dtype(x)
    return F.linear(x.to(dtype), weight.dequantize(x.dtype).to(dtype)).to(x.dtype)
