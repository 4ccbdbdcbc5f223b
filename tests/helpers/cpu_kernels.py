"""Shared helpers of the tests of the C++ kernels: numbers of all kinds, the plain code, bitwise equality."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build

REASON = cpu.why_not()
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

REFERENCE: Any = {
    "quantize": quantize_tiles.__wrapped__,  # pyright: ignore[reportFunctionMemberAccess]
    "dequantize": dequantize_tiles.__wrapped__,  # pyright: ignore[reportFunctionMemberAccess]
    "quantize_dequantize": round_tiles.__wrapped__,  # pyright: ignore[reportFunctionMemberAccess]
}
LIBRARY = build.library()
TYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("e4m3", "e5m2", "e5m6")
SCALES = ("ue8m0", "fp32")
TILES = ((1, 128), (128, 1), (128, 128), (1, 1), (3, 5), (2, 16), (1, 100), (999, 999))
SHAPES = ((1, 1), (1, 63), (3, 64), (127, 130), (129, 576), (2, 3, 130, 63))
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3e38, -3e38, 2.0**-126, 448.0, 447.99997, 464.0)
ISAS = [isa for isa in build.isas_here() if list(build.ISAS).index(isa) <= list(build.ISAS).index(LIBRARY.isa)]
"""Instruction sets of this CPU, up to the one that DSMINI_CPU_ISA names."""


@functools.cache
def library_of(isa: str) -> build.Library:
    """Return a library, or skip the test if this CPU lacks the instructions."""
    if isa not in ISAS:
        pytest.skip(f"this CPU has no {isa}")
    return build.load(isa)


def wild(*shape: int, dtype: torch.dtype = torch.float32, special: float = 0.02) -> Tensor:
    """Return numbers of all magnitudes, whose tiles differ by powers of e^3, and some special values."""
    x = torch.randn(shape) * torch.exp(3 * torch.randn(*shape[:-1], 1))
    values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < special, values, x).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def assert_same(got: Tensor, want: Tensor, nan: bool = True) -> None:
    """Check bitwise equality; in values any NaN equals any other."""
    assert got.shape == want.shape and got.dtype == want.dtype
    equal = bits(got) == bits(want)
    if nan and got.itemsize > 1:
        equal |= got.isnan() & want.isnan()
    assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ, first at {(~equal).nonzero()[0].tolist()}"


def check_all(x: Tensor, tile: tuple[int, int], scale: str, format: str, amax_min: float = 1e-4) -> None:
    codes, scales = REFERENCE["quantize"](x, tile, scale, format, amax_min)
    got = cpu.quantize(x, tile, scale, format, amax_min)
    assert_same(got[0], codes)
    assert_same(got[1], scales, nan=False)
    for dtype in TYPES:
        want = REFERENCE["quantize_dequantize"](x, tile, scale, format, amax_min, dtype)
        assert_same(cpu.quantize_dequantize(x, tile, scale, format, amax_min, dtype), want)
        want = REFERENCE["dequantize"](codes, scales, tile, format, dtype, x.shape[-1])
        assert_same(cpu.dequantize(codes, scales, tile, format, dtype, x.shape[-1]), want)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)


def round_to_bf16(x: Tensor) -> Tensor:
    return round_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4, torch.bfloat16)


def quantize_and_back(x: Tensor) -> Tensor:
    return dequantize_tiles(*quantize(x), (1, 128))
