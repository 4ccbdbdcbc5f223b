"""The tile primitives, with the signatures of their references in dsmini/numerics/quantization.py.

This module checks and packs a call; tiles.cpp computes it.
"""

from collections.abc import Container

import torch
from torch import Tensor

from dsmini_kernels import Unserved, entry_of
from dsmini_kernels.cpu.calls import library, run, span, strided

QUANTIZE, DEQUANTIZE, QUANTIZE_DEQUANTIZE = range(3)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {"e4m3": 0, "e5m2": 1, "e5m6": 2}
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
PACKED = 2
SCALES = {"fp32": 0, "ue8m0": 1}
THREADED = 1 << 17
"""Number of elements from which two threads are faster than one."""
LARGEST = 2.0**127


def quantize(x: Tensor, tile: tuple[int, int], scale: str, format: str, amax_min: float) -> tuple[Tensor, Tensor]:
    x, f = _plain(x, TYPES), entry_of(FORMATS, format, "format")
    *batch, r, c = x.shape
    codes = torch.empty((*batch, r, -(-c // 8) * 12) if f == PACKED else x.shape, dtype=CODES[f], device="cpu")
    scales = torch.empty((*batch, *_tiles(r, c, tile)), dtype=torch.float32, device="cpu")
    _call(QUANTIZE, x, codes, c, scales, tile, f, entry_of(SCALES, scale, "scale"), amax_min)
    return codes, scales


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tile: tuple[int, int],
    format: str = "e4m3",
    dtype: torch.dtype = torch.float32,
    columns: int | None = None,
) -> Tensor:
    f = entry_of(FORMATS, format, "format")
    codes = _plain(codes, (CODES[f], torch.uint8))
    *batch, r, last = codes.shape
    c = last if columns is None else columns
    if c < 0 or last != (-(-c // 8) * 12 if f == PACKED else c):
        raise Unserved(f"{last} bytes of codes for {c} columns")
    scales = _plain(scales, TYPES).float().contiguous()
    if scales.shape != (*batch, *_tiles(r, c, tile)):
        raise Unserved(f"scales of shape {list(scales.shape)} for {list(codes.shape)}")
    out = torch.empty((*batch, r, c), dtype=dtype, device="cpu")
    _call(DEQUANTIZE, codes, out, c, scales, tile, f)
    return out


def quantize_dequantize(
    x: Tensor,
    tile: tuple[int, int],
    scale: str,
    format: str,
    amax_min: float,
    dtype: torch.dtype,
    ends: Tensor | None = None,
) -> Tensor:
    x, f = _plain(x, TYPES), entry_of(FORMATS, format, "format")
    _tiles(1, 1, tile)
    if ends is not None:
        if not ends.is_cpu or ends.dim() != 1 or x.dim() != 2 or ends.dtype not in (torch.int64, torch.int32):
            raise Unserved("`ends` must be integers of one dimension, and x a matrix")
        ends = ends.long().contiguous()
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    _call(QUANTIZE_DEQUANTIZE, x, out, x.shape[-1], None, tile, f, entry_of(SCALES, scale, "scale"), amax_min, ends)
    return out


def _plain(x: Tensor, dtypes: Container[torch.dtype]) -> Tensor:
    """Return x, or a copy of it, as rows of contiguous elements in main memory."""
    if not x.is_cpu or x.layout is not torch.strided or x.dtype not in dtypes or x.dim() < 2:
        raise Unserved(f"a tensor of {x.dtype} on {x.device} with {x.dim()} dimensions")
    if x.requires_grad and torch.is_grad_enabled():
        raise Unserved("kernels have no gradients, and this tensor wants one")
    x = x.resolve_neg()  # else the memory holds -x
    is_rows = x.is_contiguous() or (x.dim() <= 3 and x.stride(-1) == 1)
    return x if is_rows else x.contiguous()


def _tiles(r: int, c: int, tile: tuple[int, int]) -> tuple[int, int]:
    if tile[0] < 1 or tile[1] < 1:
        raise Unserved(f"tiles of {tile[0]}x{tile[1]}")
    return -(-r // tile[0]), -(-c // tile[1])


def _call(
    operation: int,
    x: Tensor,
    out: Tensor,
    columns: int,
    scales: Tensor | None,
    tile: tuple[int, int],
    format: int,
    scale: int = 0,
    amax_min: float = 0.0,
    ends: Tensor | None = None,
) -> None:
    if not -LARGEST < amax_min < LARGEST:
        raise Unserved(f"amax_min={amax_min}")
    x = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    run(
        "tiles",
        operation=operation,
        threads=torch.get_num_threads() if out.numel() >= THREADED else 1,
        in_type=0 if operation == DEQUANTIZE else TYPES[x.dtype],
        out_type=0 if operation == QUANTIZE else entry_of(TYPES, out.dtype, "output"),
        format=format,
        powers_of_two=scale,
        batch=len(x),
        rows=x.shape[1],
        columns=columns,
        tile_rows=tile[0],
        tile_columns=tile[1],
        x=strided(x),
        batch_stride=x.stride(0),
        row_stride=x.stride(1),
        out=span(out),
        scales=span(scales),
        ends=span(ends),
        groups=0 if ends is None else ends.numel(),
        amax_min=amax_min,
        parallel=library().parallel,
    )
