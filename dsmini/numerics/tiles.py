"""Store numbers in a short format with a scale for every tile: value = code * scale.

A tile is scaled so that its largest magnitude is the format's largest. Smaller magnitudes keep all bits of fraction
down to the format's smallest normal number, in E4M3 1/28672 of the largest; below it they lose bits one by one. Tiles
cut the last two dimensions. The last tile may be ragged: the 576 rows of a released kv_a_proj_with_mqa have four blocks
of 128 rows and one of 64.

This is the definition of scale and code. Every fast version gives the same bits:

    amax  = max |x| over the tile
    scale = max(amax, amax_min) / max              an FP32 division; for ue8m0 then up to a power of two
    code  = x / scale in FP32, limited to +-max, to the nearest code, ties to even
    value = code * scale in FP32, rounded once to the dtype that is asked for

DeepSeek's kernels compute this in four ways that differ in the last bit. A tile that holds an infinity or NaN becomes
NaN as a whole, its scale and all its codes, so that the error stays visible. From 3.3e38 on, near FP32's largest
number, a finite tile may have an infinite value.
"""

from collections.abc import Callable
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics.formats import FORMATS, UE8M0

Scale = Literal["ue8m0", "fp32"]
FormatName = Literal["e4m3", "e5m2", "e5m6"]
Tile = tuple[int, int]

STRIP = 1 << 18
"""Number of elements that are coded or decoded at a time. They stay in a cache, and no FP32 copy of a whole matrix is
made (except by round_tiles with groups of rows)."""


@ops.operation("quantize", differentiable=False)
def quantize_tiles(
    x: Float[Tensor, "*batch r c"], tile: Tile, scale: Scale, format: FormatName, amax_min: float
) -> tuple[Tensor, Float[Tensor, "*batch rt ct"]]:
    """Return the codes of x, which is FP32, BF16 or FP16, and the FP32 scales of its tiles.

    Codes have x's shape; packed ones are [*batch, r, 12 ceil(c / 8)] bytes. The last tiles may be ragged.

    Source: DeepSeek-V3 report, section 3.3.2 (128x128 for weights, 1x128 for activations).
    """
    scales = tile_scales(x, tile, scale, format, amax_min)
    return encode_tiles(x, scales, tile, format), scales


@ops.operation("dequantize", differentiable=False)
def dequantize_tiles(
    codes: Tensor,
    scales: Float[Tensor, "*batch rt ct"],
    tile: Tile,
    format: FormatName = "e4m3",
    dtype: torch.dtype = torch.float32,
    columns: int | None = None,
) -> Float[Tensor, "*batch r c"]:
    """Return code * scale, on any device, computed a strip of rows at a time.

    Args:
        columns: c; needed for packed codes only.

    Raises: ValueError if there is not one scale for each tile, and for packed codes of another number of columns.
    """
    f = FORMATS[format]
    c = codes.shape[-1] if columns is None else columns
    if f.packed and codes.shape[-1] != -(-c // 8) * 12:
        raise ValueError(
            f"{codes.shape[-1]} bytes of packed codes for {c} columns; want {-(-c // 8) * 12}, and columns"
        )
    shape = torch.Size((*codes.shape[:-1], c))
    return _in_strips(shape, scales, tile, lambda strip, s: f.decode(codes[..., strip, :], c) * s, dtype)


@ops.operation("quantize_dequantize", differentiable=False)
def round_tiles(
    x: Float[Tensor, "*batch r c"],
    tile: Tile,
    scale: Scale,
    format: FormatName,
    amax_min: float,
    dtype: torch.dtype,
    ends: Int[Tensor, " e"] | None = None,
) -> Float[Tensor, "*batch r c"]:
    """Return the values that quantize_tiles and dequantize_tiles give, without codes in between.

    Args:
        ends: the row after each group's last, for a matrix x [r, c]; the last is r, and groups may be empty. Each group
            then begins a new tile, so that no tile holds tokens of two experts.
    """
    if ends is not None:
        return _round_groups(x, tile, scale, format, amax_min, dtype, ends)
    scales = tile_scales(x, tile, scale, format, amax_min)
    return _in_strips(x.shape, scales, tile, lambda strip, s: FORMATS[format].round(x[..., strip, :] / s) * s, dtype)


def tile_scales(
    x: Float[Tensor, "*batch r c"], tile: Tile, scale: Scale, format: FormatName, amax_min: float
) -> Float[Tensor, "*batch rt ct"]:
    """Return the scales of quantize_tiles, with rt = ceil(r / tile[0]) and ct = ceil(c / tile[1])."""
    r, c = x.shape[-2:]
    height, width = min(tile[0], max(1, r)), min(tile[1], max(1, c))
    padded = F.pad(x.abs(), (0, -c % width, 0, -r % height))
    rows, columns = padded.shape[-2] // height, padded.shape[-1] // width
    amax = padded.unflatten(-1, (columns, width)).amax(-1).unflatten(-2, (rows, height)).amax(-2).float()
    return _scales(amax, scale, format, amax_min)


def encode_tiles(
    x: Float[Tensor, "*batch r c"], scales: Float[Tensor, "*batch rt ct"], tile: Tile, format: FormatName = "e4m3"
) -> Tensor:
    """Return the codes of x under given scales."""
    f = FORMATS[format]
    return _in_strips(x.shape, scales, tile, lambda strip, s: f.encode(x[..., strip, :] / s), f.dtype)


def _scales(amax: Tensor, scale: Scale, format: FormatName, amax_min: float) -> Tensor:
    if scale not in ("ue8m0", "fp32"):
        raise ValueError(f"scale={scale!r} is unknown; use one of ue8m0, fp32")
    # The divisor is a tensor on the device: by a Python number a GPU divides as a multiplication with 1 / 448.
    scales = amax.clamp(min=amax_min) / amax.new_full((), FORMATS[format].max)
    scales = UE8M0.round_up(scales) if scale == "ue8m0" else scales
    return torch.where(amax.isfinite(), scales, torch.nan)


def group_sizes(ends: Int[Tensor, " e"]) -> Int[Tensor, " e"]:
    """Return the number of rows of each group, from the row after the last of each."""
    return torch.diff(ends, prepend=ends.new_zeros(1))


def listed_sizes(ends: Int[Tensor, " e"], rows: int) -> list[int]:
    """Return group_sizes as numbers, for which the host waits. On the meta device the first group has all rows."""
    return [rows, *[0] * (ends.shape[0] - 1)] if ends.is_meta else group_sizes(ends).tolist()


def _round_groups(
    x: Tensor, tile: Tile, scale: Scale, format: FormatName, amax_min: float, dtype: torch.dtype, ends: Tensor
) -> Tensor:
    """Compute round_tiles with groups: rows are spread out so that each group begins a new tile.

    Sizes stay on the device, and nothing waits for it.
    """
    rows, e = x.shape[0], ends.shape[0]
    ends = ends.long()
    sizes = group_sizes(ends)
    tiles = (sizes + tile[0] - 1) // tile[0]
    row = torch.arange(rows, device=x.device)
    group = torch.searchsorted(ends, row, right=True)
    tile_of_row = (tiles.cumsum(0) - tiles)[group] + (row - (ends - sizes)[group]) // tile[0]
    width = min(tile[1], max(1, x.shape[1]))
    wide = F.pad(x.abs(), (0, -x.shape[1] % width)).unflatten(-1, (-1, width)).amax(-1).float()
    at_most = -(-rows // tile[0]) + e
    place = tile_of_row * tile[0] + (row - (ends - sizes)[group]) % tile[0]
    apart = wide.new_zeros(at_most * tile[0], wide.shape[1]).index_copy(0, place, wide)
    amax = apart.unflatten(0, (at_most, tile[0])).amax(1)
    spread = _spread(_scales(amax, scale, format, amax_min)[tile_of_row], width, x.shape[1], -1)
    return FORMATS[format].round(x / spread).mul_(spread).to(dtype)


def _spread(x: Tensor, times: int, size: int, dim: int) -> Tensor:
    """Repeat each number this many times along dim, and keep the first `size`."""
    if torch.compiler.is_compiling():
        # the index is a quotient in disguise: inductor reads past the end of x if it sees one (CPU, torch 2.13)
        place, ends = torch.arange(size, device=x.device), torch.arange(times, size + times, times, device=x.device)
        return x.index_select(dim, torch.bucketize(place, ends, right=True))
    return x.repeat_interleave(times, dim).narrow(dim, 0, size)


def _in_strips(
    shape: torch.Size, scales: Tensor, tile: Tile, make: Callable[[slice, Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """Return `make(rows, scale of each of their elements)` for all rows of a tensor of that shape, in dtype.

    Each call gets a whole number of tiles. Under torch.compile, which fuses the work, one call gets all rows.
    """
    r, c = shape[-2:]
    want = (*shape[:-2], -(-r // tile[0]), -(-c // tile[1]))
    if scales.shape != want:
        raise ValueError(
            f"scales of shape {list(scales.shape)} do not fit {list(shape)} in tiles of {tile[0]}x{tile[1]}; "
            f"want {list(want)}"
        )
    height, width = min(tile[0], max(1, r)), min(tile[1], max(1, c))

    def rows(first: int, tiles: int) -> Tensor:
        strip = slice(first * height, min(r, (first + tiles) * height))
        some = _spread(scales[..., first : first + tiles, :].float(), width, c, -1)
        return make(strip, _spread(some, height, strip.stop - strip.start, -2)).to(dtype)

    tiles = max(1, STRIP * max(1, r) // max(1, shape.numel()) // height)
    if tiles >= want[-2] or torch.compiler.is_compiling():
        return rows(0, max(1, want[-2]))
    parts = (rows(first, tiles) for first in range(0, want[-2], tiles))
    first = next(parts)
    out = torch.empty(*shape[:-1], first.shape[-1], dtype=dtype, device=scales.device)
    at = 0
    for part in chain((first,), parts):
        out[..., at : at + part.shape[-2], :] = part
        at += part.shape[-2]
    return out
