"""Numbers in E4M3, eight bits each, with an FP32 scale for every tile: value = code * scale.

E4M3 reaches 448 with three bits of fraction. A tile is scaled so that its largest magnitude is 448; numbers down to
2^-15 of that keep their three bits or lose them one by one. A dimension that is no multiple of the tile's ends in a
ragged tile: the 576 rows of a released kv_a_proj_with_mqa have four blocks of 128 rows and one of 64.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WEIGHT_TILE = (128, 128)
"""How the released checkpoints cut their weights."""

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_AMAX = 2.0**-100
"""Below it a tile counts as zero: it needs a scale that can be divided by."""
STRIP = 1 << 18
"""Elements that are coded or decoded at a time: they stay in a cache, and no FP32 copy of a whole matrix is made."""


def quantize_tiles(
    x: Float[Tensor, "*batch r c"], tile: tuple[int, int] = WEIGHT_TILE
) -> tuple[Float[Tensor, "*batch r c"], Float[Tensor, "*batch rt ct"]]:
    """Codes (float8_e4m3fn, shaped as x) and scales (FP32, one a tile) of the last two dimensions, ragged tiles too.

    scale = amax / 448 of its tile, code = x / scale rounded to nearest even; a tile of zeros has zero codes.

    Raises: ValueError for x that is not finite.

    Source: DeepSeek-V3 report, section 3.3.2 (128x128 for weights, 1x128 for activations).
    """
    scales = tile_scales(x, tile)
    return encode_tiles(x, scales, tile), scales


def tile_scales(x: Float[Tensor, "*batch r c"], tile: tuple[int, int] = WEIGHT_TILE) -> Float[Tensor, "*batch rt ct"]:
    """The scales of quantize_tiles: amax / 448 of each tile, with rt = ceil(r / tile[0]) and ct = ceil(c / tile[1])."""
    r, c = x.shape[-2:]
    rows, columns = -(-r // tile[0]), -(-c // tile[1])
    padded = F.pad(x.abs(), (0, columns * tile[1] - c, 0, rows * tile[0] - r))
    amax = padded.unflatten(-1, (columns, tile[1])).amax(-1).unflatten(-2, (rows, tile[0])).amax(-2).float()
    if not torch.isfinite(amax).all():
        raise ValueError("a tensor to be quantised holds infinities or NaN; E4M3 has no codes for them")
    return amax.clamp(min=SMALLEST_AMAX) / LARGEST


def encode_tiles(
    x: Float[Tensor, "*batch r c"], scales: Float[Tensor, "*batch rt ct"], tile: tuple[int, int] = WEIGHT_TILE
) -> Float[Tensor, "*batch r c"]:
    """The codes of x under given scales: x / scale, limited to 448, to nearest even."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    for strip, spread in _strips(x, scales, tile):
        # Before torch 2.12 the cast does not saturate.
        codes[..., strip, :] = (x[..., strip, :] / spread).clamp_(-LARGEST, LARGEST).to(codes.dtype)
    return codes


def dequantize_tiles(
    codes: Float[Tensor, "*batch r c"],
    scales: Float[Tensor, "*batch rt ct"],
    tile: tuple[int, int] = WEIGHT_TILE,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch r c"]:
    """code * scale in FP32, rounded once to dtype. Works on any device, in plain torch, a strip of rows at a time.

    Raises: ValueError for scales that are not one a tile.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for strip, spread in _strips(codes, scales, tile):
        out[..., strip, :] = codes[..., strip, :].float().mul_(spread)
    return out


def _strips(x: Tensor, scales: Tensor, tile: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, a whole number of tiles at a time, with the scale of each of their elements in FP32."""
    r, c = x.shape[-2:]
    want = (*x.shape[:-2], -(-r // tile[0]), -(-c // tile[1]))
    if scales.shape != want:
        raise ValueError(
            f"scales of shape {list(scales.shape)} do not fit {list(x.shape)} in tiles of {tile[0]}x{tile[1]}; "
            f"want {list(want)}"
        )
    tiles = max(1, STRIP * max(1, r) // max(1, x.numel()) // tile[0])
    for first in range(0, want[-2], tiles):
        some = scales[..., first : first + tiles, :].float()
        strip = slice(first * tile[0], min(r, (first + tiles) * tile[0]))
        spread = some.repeat_interleave(tile[1], -1)[..., :c].repeat_interleave(tile[0], -2)
        yield strip, spread[..., : strip.stop - strip.start, :]
