"""FP4 as DeepSeek-V4 stores experts: E2M1 codes, and a power of two (UE8M0) for each 32 numbers of a row.

    code    0  1    2  3    4  5  6  7       bit 3 is the sign; the first of two codes is the low half of a byte
    value   0  0.5  1  1.5  2  3  4  6

    amax    = max |x| over the block, 6 * 2^-126 or more
    scale   = 2^ceil(log2(amax / 6))         nothing is cut off; stored as a byte, its exponent + 127
    code    = x / scale to the nearest, ties to the even code

This is the rule of fp4_act_quant in DeepSeek-V4's inference code, with the rounding of the hardware that it runs on.
All of it is a tile of 1x32 in quantization.py. A block that holds an infinity or NaN becomes NaN, by the scale 255.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dsmini.numerics.quantization import (
    WEIGHT_TILE,
    StraightThrough,
    check_source,
    dequantize_tiles,
    encode_tiles,
    quantize_tiles,
    round_tiles,
    tile_amax,
)

FP4_BLOCK = 32
"""Number of neighbours in a row that share a scale."""
FP4_AMAX_MIN = 6 * 2.0**-126
"""Smallest amax, so that scales are normal FP32 numbers: only a block of zeros is far below."""
ABSORBED = 6
"""Number of powers of two that E4M3 takes over from FP4's scales: 6 * 2^6 still fits."""


def round_fp4(x: Float[Tensor, "*any d"], block: int = FP4_BLOCK) -> Float[Tensor, "*any d"]:
    """Return the values of quantize_fp4 in x's dtype. Its gradient is the straight-through estimator.

    Raises: ValueError for FP64 and integers, and for a width that is not a multiple of block.
    """
    rows = _rows(x, block).detach()
    values = round_tiles(rows, (1, block), "ue8m0", "e2m1", FP4_AMAX_MIN, x.dtype).view(x.shape)
    return StraightThrough.apply(x, values)  # pyright: ignore[reportReturnType]


def quantize_fp4(
    x: Float[Tensor, "*any d"], block: int = FP4_BLOCK
) -> tuple[Integer[Tensor, "*any d/2"], Integer[Tensor, "*any d/block"]]:
    """Return two codes a byte, and the scales of blocks as UE8M0 bytes, both uint8. See round_fp4."""
    codes, scales = quantize_tiles(_rows(x, block).detach(), (1, block), "ue8m0", "e2m1", FP4_AMAX_MIN)
    lead, d = x.shape[:-1], x.shape[-1]
    as_bytes = scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    return codes.view(*lead, d // 2), as_bytes.view(*lead, d // block)


def dequantize_fp4(
    packed: Integer[Tensor, "*any d/2"], scales: Integer[Tensor, "*any d/block"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*any d"]:
    """Return code * scale in FP32, rounded once to dtype. BF16 holds every such value from 2^-126 on.

    Raises: ValueError for scales that do not divide the codes into blocks.
    """
    d = 2 * packed.shape[-1]
    block = d // max(1, scales.shape[-1]) or FP4_BLOCK
    codes, factors = torch.atleast_2d(packed, scales.view(torch.float8_e8m0fnu))
    return dequantize_tiles(codes, factors, (1, block), "e2m1", dtype, d).view(*packed.shape[:-1], d)


def fp4_to_fp8(
    packed: Integer[Tensor, "*any r c/2"], scales: Integer[Tensor, "*any r c/32"]
) -> tuple[Tensor, Float[Tensor, "*any rt ct"]]:
    """Return E4M3 codes [*any, r, c] and power-of-two scales of 128x128 blocks in FP32, with the same values.

    A block's scale is its largest one in FP4 over 2^6. Scales of zeros do not count.

    Raises: ValueError if a value would change, which takes scales in a block more than 2^14 apart, or is NaN.

    Source: DeepSeek-V4 report, on quantization-aware training; cast_e2m1fn_to_e4m3fn in its inference code, which
        allows 2^6 and does not use E4M3's smallest numbers.
    """
    values = dequantize_fp4(packed, scales)
    used = scales.view(torch.uint8).masked_fill(values.unflatten(-1, (scales.shape[-1], -1)).eq(0).all(-1), 0).int()
    largest = tile_amax(used, (WEIGHT_TILE[0], WEIGHT_TILE[1] // FP4_BLOCK))
    # as FP32's exponent field
    block_scales = ((largest - ABSORBED).clamp(min=1) << 23).view(torch.float32)
    codes = encode_tiles(values, block_scales, WEIGHT_TILE)
    if not torch.equal(dequantize_tiles(codes, block_scales, WEIGHT_TILE), values):
        raise ValueError(
            "FP4 scales in a block of 128x128 are NaN or more than 2^14 apart, which FP8 cannot hold without loss; "
            "dequantize these weights to BF16"
        )
    return codes, block_scales


def _rows(x: Tensor, block: int) -> Tensor:
    """Return x with two dimensions at least. Raises: as round_fp4."""
    check_source(x, "x")
    if block < 2 or block % 2 or x.shape[-1] % block:
        raise ValueError(f"rows of {x.shape[-1]} numbers have no whole blocks of {block} in FP4; want a multiple of it")
    return torch.atleast_2d(x)
