"""Operands of simulated FP8 products."""

from typing import Any, Literal

import torch
from torch import Tensor

from dsmini.numerics import AMAX_MIN, round_tiles

# DeepGEMM's bounds: for quantization, and for the order of sums and the rounding of the result
QUANTISED = 1e-3
SIMULATED = 5e-6

Scale = Literal["ue8m0", "fp32"]


def rounded(
    x: Tensor, tile: tuple[int, int], scale: Scale = "ue8m0", format: Any = "e4m3", amax_min: float = AMAX_MIN
) -> Tensor:
    """Return x after rounding as an operand, in FP64."""
    return round_tiles(x.detach(), tile, scale, format, amax_min, torch.float32).double()


def varied(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal numbers whose 1x128 and 128x128 tiles differ in magnitude, log-normally with sigma 1.5.

    A misplaced scale then gives a calc_diff of 0.75, with plain normal numbers 0.005.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    tiles = [-(-n // 128) for n in shape[-2:]]
    magnitude = torch.randn(*shape[:-2], *tiles, generator=generator).mul(1.5).exp()
    columns = magnitude.repeat_interleave(128, -1)[..., : shape[-1]]
    for i, rows in enumerate(x.split(128, -2)):
        rows.mul_(columns[..., i : i + 1, :])
    return x.to(dtype)
