"""Muon's update of matrices: checks, and the description of a call for the C++."""

from struct import Struct
from typing import Any

import torch
from torch import Tensor

from dsmini_kernels import Unserved
from dsmini_kernels.cpu.calls import run
from dsmini_kernels.cpu.steps import n_threads
from dsmini_kernels.cpu.tiles import span

PIECE = Struct("=10q")
"""struct MuonPiece of steps.h."""
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
    pieces = bytearray()
    for p, grad, m in zip(matrices.params, matrices.grads, matrices.momenta, strict=True):
        spans = (number for x in (p, grad, m) for number in _numbers(x, p.shape))
        pieces += PIECE.pack(*spans, p.numel() // (o * i), *p.shape[-2:], p.dim() > 2)
    flat = [number for each in steps.coefficients for number in each]
    coefficients = Struct(f"={len(flat)}d").pack(*flat)
    held = torch.frombuffer(pieces, dtype=torch.uint8), torch.frombuffer(bytearray(coefficients), dtype=torch.uint8)
    call = (
        *(n_threads(), matmul_dtype == torch.bfloat16, steps.rational, len(matrices.params), len(steps.coefficients)),
        *(*span(held[0]), *span(held[1]), lr, momentum, weight_decay),
    )
    run("muon", call)


def _numbers(x: Tensor, shape: torch.Size) -> tuple[int, int]:
    """Return the address and the bytes of FP32 numbers of that shape."""
    if x.dtype != torch.float32 or not x.is_cpu or x.layout is not torch.strided or not x.is_contiguous():
        raise Unserved(f"a tensor in {x.dtype} on {x.device}, or one that is not contiguous")
    if x.shape != shape or x.is_neg():
        raise Unserved(f"a gradient or a momentum of shape {list(x.shape)} for a parameter of {list(shape)}")
    return span(x)
