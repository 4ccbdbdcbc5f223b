"""Muon's update of matrices: checks, and the call of the C++."""

from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import run, span
from dsmini_kernels.cpu.steps import vector
from dsmini_kernels.cpu.structs import LAYOUTS, LIMITS

LARGEST = 1 << 18
"""Number of elements up to which a matrix and what is computed from it stay in a core's own cache."""


def muon_update(
    matrices: Any, steps: Any, *, lr: float, momentum: float, weight_decay: float, matmul_dtype: torch.dtype
) -> None:
    """Move matrices by Muon, in place. Sums are FP32; with BF16 as matmul_dtype, operands are BF16 where that is fast.

    Raises: Unserved for other dtypes, layouts that are not contiguous, and matrices that torch multiplies faster.
    """
    o, i = matrices.params[0].shape[-2:]
    if matmul_dtype not in (torch.float32, torch.bfloat16):
        raise Unserved(f"products in {matmul_dtype}")
    if not 0 < o * i <= LARGEST:
        raise Unserved
    if max(o, i) > LIMITS["MOST_SIDE"]:
        raise Unserved(f"a matrix of {o} x {i}")
    pieces = bytearray()
    for p, grad, m in zip(matrices.params, matrices.grads, matrices.momenta, strict=True):
        numbers = {"p": _numbers(p, p.shape), "g": _numbers(grad, p.shape), "m": _numbers(m, p.shape)}
        sizes = {"count": p.numel() // (o * i), "rows": p.shape[-2], "columns": p.shape[-1], "stacked": p.dim() > 2}
        pieces += LAYOUTS["MuonPiece"].pack(**numbers, **sizes)
    piece = torch.frombuffer(pieces, dtype=torch.uint8)
    coefficients = torch.tensor(steps.coefficients, dtype=torch.float64, device="cpu")
    run(
        "muon",
        bf16=matmul_dtype == torch.bfloat16,
        rational=steps.rational,
        pieces=len(matrices.params),
        steps=len(coefficients),
        piece=span(piece),
        coefficients=span(coefficients),
        lr=lr,
        momentum=momentum,
        decay=weight_decay,
    )
    # what was made or saved of the old parameters is seen to be old
    torch.autograd.graph.increment_version((*matrices.params, *matrices.momenta))


def _numbers(x: Tensor, shape: torch.Size) -> bytes:
    """Return the Span of FP32 numbers of that shape."""
    if x.shape != shape or x.is_neg():
        raise Unserved(f"a gradient or a momentum of shape {list(x.shape)} for a parameter of {list(shape)}")
    return vector(x)
