"""Quantize and dequantize tiles of short codes with a scale each, and both at once.

dsmini.numerics.quantization defines these operations. The kernels give the same bits.

No cast to a short format is used: not all GPUs have them, and the interpreter's are wrong. A format with m bits of
fraction is rounded in FP32 by an addition. Let E be the exponent field of |y|, at least that of the format's smallest
normal value, and magic the power of two with field E + 23 - m. In |y| + magic FP32 has no bits below the format's
last, so

    total = |y| + magic            is rounded, ties to even
    total - magic                  is the rounded value, exactly
    bits(total) - bits(magic)      counts its steps within E; together with E it gives the code

This holds only if the compiler neither reassociates the two nor fuses the addition with the computation of y. Triton
does not reassociate. y comes from a division, so that there is no multiplication to fuse. The division is tl.div_rn,
since `/` is not IEEE's on a GPU. The largest magnitude is found among integers, where NaN is above infinity and
infinity above all numbers.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmini_kernels import Unserved, entry_of
from dsmini_kernels.triton.programs import dequantize_program, pack_program, quantize_program

BLOCK = 4096
"""Number of elements that a program holds at a time, unless its tile is larger."""
LARGEST_TILE = 32768
"""Maximum number of elements of a tile, sides rounded up to powers of two: they fit the registers of 16 warps."""


class Format(NamedTuple):
    """A short format. Codes are given without their sign, whose bit is above those of nan, which are all ones."""

    mantissa: int
    bias: int
    max: float
    above: int
    """First code without a value."""
    infinity: int
    """Code of infinity, or -1."""
    nan: int
    packed: bool
    """True if two codes share three bytes."""


FORMATS = {
    "e4m3": Format(mantissa=3, bias=7, max=448.0, above=0x7F, infinity=-1, nan=0x7F, packed=False),
    "e5m2": Format(mantissa=2, bias=15, max=57344.0, above=0x7C, infinity=0x7C, nan=0x7F, packed=False),
    "e5m6": Format(mantissa=6, bias=15, max=65024.0, above=0x7C0, infinity=-1, nan=0x7FF, packed=True),
}
CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e5m6": torch.uint8}
VALUES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(x: Tensor, tile: tuple[int, int], scale: str, format: str, amax_min: float) -> tuple[Tensor, Tensor]:
    """Return codes, and FP32 scales [*batch, ceil(r / tile[0]), ceil(c / tile[1])]."""
    f = entry_of(FORMATS, format, "format")
    r, c = x.shape[-2:]
    scales = torch.empty(*x.shape[:-2], -(-r // tile[0]), -(-c // tile[1]), dtype=torch.float32, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.int16 if f.packed else torch.uint8, device=x.device)
    _launch_quantize(x, codes, scales, tile, scale, f, amax_min)
    return (_pack(codes) if f.packed else codes.view(CODES[format])), scales


def quantize_dequantize(
    x: Tensor,
    tile: tuple[int, int],
    scale: str,
    format: str,
    amax_min: float,
    dtype: torch.dtype,
    ends: Tensor | None = None,
) -> Tensor:
    """Return the values of the codes, without the codes. `ends`: the row after each group's last."""
    _check_values(dtype)
    if ends is not None and x.dim() != 2:
        raise Unserved(f"groups of rows want a matrix, and x has {x.dim()} dimensions")
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch_quantize(
        x, out, None, tile, scale, entry_of(FORMATS, format, "format"), amax_min, None if tile[0] == 1 else ends
    )
    return out


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tile: tuple[int, int],
    format: str = "e4m3",
    dtype: torch.dtype = torch.float32,
    columns: int | None = None,
) -> Tensor:
    """Return code * scale in FP32, rounded to dtype."""
    _check_values(dtype)
    _check_device(codes)
    f = entry_of(FORMATS, format, "format")
    *batch, r, width = codes.shape
    c = width if columns is None else columns
    if width != (-(-c // 8) * 12 if f.packed else c) or codes.element_size() != 1:
        raise Unserved(f"codes of {codes.dtype} in {width} columns are not {c} columns of {format}")
    rt, ct = -(-r // tile[0]), -(-c // tile[1])
    if scales.shape != (*batch, rt, ct):
        raise Unserved(f"scales of shape {list(scales.shape)} do not fit; want {[*batch, rt, ct]}")
    out = torch.empty(*batch, r, c, dtype=dtype, device=codes.device)
    if not out.numel():
        return out
    block_columns = min(BLOCK, triton.next_power_of_2(c))
    block_rows = BLOCK // block_columns
    rows = out.numel() // c
    _launch(
        dequantize_program,
        triton.cdiv(rows, block_rows) * triton.cdiv(c, block_columns),
        codes.contiguous().view(torch.uint8),
        scales.resolve_neg().float().contiguous(),
        _stored(out),
        *(rows, r, c, width, rt, ct),
        MANTISSA=f.mantissa,
        BIAS=f.bias,
        STEP=2.0 ** (1 - f.bias - f.mantissa),
        ABOVE=f.above,
        INFINITY=f.infinity,
        NAN=f.nan,
        PACKED=f.packed,
        HEIGHT=min(tile[0], triton.next_power_of_2(r)),
        WIDTH=min(tile[1], triton.next_power_of_2(c)),
        BF16=dtype == torch.bfloat16,
        ROWS=block_rows,
        COLUMNS=block_columns,
    )
    return out


def interpreting() -> bool:
    """Return True if Triton's interpreter runs these kernels."""
    return not isinstance(quantize_program, triton.JITFunction)


def halfway() -> bool:
    """Return True if the interpreter would run these kernels, but the compiler the functions of Triton's library."""
    return interpreting() and isinstance(tl.max, triton.JITFunction)


def _launch_quantize(
    x: Tensor,
    out: Tensor,
    scales: Tensor | None,
    tile: tuple[int, int],
    scale: str,
    f: Format,
    amax_min: float,
    ends: Tensor | None = None,
) -> None:
    """Fill out with codes, and scales with scales; if scales is None, fill out with values."""
    if x.dtype not in VALUES:
        raise Unserved(f"x is {x.dtype}; it takes float32, bfloat16 and float16")
    _check_device(x)
    r, c = x.shape[-2:]
    height, width = min(tile[0], triton.next_power_of_2(r)), min(tile[1], triton.next_power_of_2(c))
    tall, wide = triton.next_power_of_2(height), triton.next_power_of_2(width)
    if tall * wide > LARGEST_TILE:
        raise Unserved(f"a tile of {height}x{width} does not fit the registers of a program")
    if not x.numel():
        return
    if height == 1 and c % width == 0:
        r, c = 1, x.numel()  # such tiles are contiguous: a program takes tiles of several rows
    batch, rt, ct, groups = x.numel() // (r * c), -(-r // height), -(-c // width), 0 if ends is None else ends.shape[0]
    at_once = min(max(1, BLOCK // (tall * wide)), triton.next_power_of_2(ct))
    floor = torch.tensor(max(0.0, amax_min), dtype=torch.float32).view(torch.int32).item()
    _launch(
        quantize_program,
        (batch * rt + groups) * triton.cdiv(ct, at_once),  # each group may end in a tile that is not full
        x.resolve_neg().contiguous(),
        out if scales is not None else _stored(out),
        scales,
        None if ends is None else ends.contiguous(),
        *(r, c, rt, ct, groups, floor),
        UE8M0=scale == "ue8m0",
        MANTISSA=f.mantissa,
        BIAS=f.bias,
        MAX=f.max,
        NAN=f.nan,
        BF16=out.dtype == torch.bfloat16,
        HEIGHT=height,
        WIDTH=width,
        TALL=tall,
        WIDE=wide,
        TILES=at_once,
        GROUPS=triton.next_power_of_2(groups),
        num_warps=min(16, max(1, tall * wide * at_once // 1024)),
    )


def _pack(codes: Tensor) -> Tensor:
    """Pack 12-bit codes [..., c], two in three bytes, filled up with zeros to 12 ceil(c / 8) bytes."""
    c, width = codes.shape[-1], -(-codes.shape[-1] // 8) * 12
    out = torch.empty(*codes.shape[:-1], width, dtype=torch.uint8, device=codes.device)
    if out.numel():
        _launch(pack_program, triton.cdiv(out.numel(), BLOCK), codes, out, out.numel(), c, width, BLOCK=BLOCK)
    return out


def _launch(kernel: Any, programs: int, first: Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on the first tensor's GPU, without fusing products and sums."""
    with torch.cuda.device_of(first):
        kernel[(programs,)](first, *args, enable_fp_fusion=False, **constants)


def _stored(out: Tensor) -> Tensor:
    """Return the tensor that a kernel stores to: int16 for BF16, whose bits programs.py makes."""
    return out.view(torch.int16) if out.dtype == torch.bfloat16 else out


def _check_values(dtype: torch.dtype) -> None:
    if dtype not in VALUES:
        raise Unserved(f"got dtype={dtype}; it gives float32, bfloat16 and float16")


def _check_device(x: Tensor) -> None:
    if not x.is_cuda and not interpreting():
        raise Unserved(f"the tensor is on {x.device}, and without its interpreter Triton serves GPUs alone")
