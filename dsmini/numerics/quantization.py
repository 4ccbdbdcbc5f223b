"""Quantize a tensor: codes in a short format, and a scale for each tile; value = code * scale.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dsmini import ops
from dsmini.numerics.formats import FORMATS, next_power_of_two

Scale = Literal["ue8m0", "fp32"]
FormatName = Literal["e4m3", "e5m2", "e5m6", "e2m1"]
Tile = tuple[int, int]

ACTIVATION_TILE = (1, 128)
"""Tile of activations and of gradients of outputs: along the contraction."""
TOKEN_TILE = (128, 1)
"""Tile along the tokens, which the weight's gradient contracts over."""
WEIGHT_TILE = (128, 128)
"""Tile of weights, as in the released checkpoints."""

AMAX_MIN = 1e-4
"""Smallest amax of DeepSeek's kernels, right for activations and weights."""
SMALLEST_AMAX = 2.0**-100
"""Smallest amax for gradients, which are tiny when nothing scales the loss: only a tile of zeros is below."""

ELEMENTS_AT_A_TIME = 1 << 18
"""Number of elements that are coded or decoded at a time. They stay in a cache, and no FP32 copy of a whole matrix is
made."""


@ops.operation("quantize")
def quantize_tiles(
    x: Float[Tensor, "*batch r c"], tile: Tile, scale: Scale, format: FormatName, amax_min: float
) -> tuple[Tensor, Float[Tensor, "*batch rt ct"]]:
    """Return the codes of x, which is FP32, BF16 or FP16, and the FP32 scales of its tiles.

    Codes have x's shape; packed ones are [*batch, r, width(c)] bytes. The last tiles may be ragged.

    Source: DeepSeek-V3 report, section 3.3.2 (128x128 for weights, 1x128 for activations).
    """
    scales = tile_scales(x, tile, scale, format, amax_min)
    return encode_tiles(x, scales, tile, format), scales


@ops.operation("dequantize")
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
    if codes.shape[-1] != f.width(c):
        raise ValueError(f"{codes.shape[-1]} bytes of packed codes for {c} columns; want {f.width(c)}, and columns")
    shape = torch.Size((*codes.shape[:-1], c))
    return _in_strips(shape, scales, tile, lambda strip, s: f.decode(codes[..., strip, :], c) * s, dtype)


@ops.operation("quantize_dequantize")
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
        rows, height = len(x), min(tile[0], max(1, len(x)))
        place = _places_apart(ends.long(), rows, height)
        apart = x.new_zeros((-(-rows // height) + len(ends)) * height, x.shape[1]).index_copy(0, place, x)
        return round_tiles.reference(apart, (height, tile[1]), scale, format, amax_min, dtype)[place]
    scales = tile_scales(x, tile, scale, format, amax_min)
    return _in_strips(x.shape, scales, tile, lambda strip, s: FORMATS[format].round(x[..., strip, :] / s) * s, dtype)


def tile_amax(x: Shaped[Tensor, "*batch r c"], tile: Tile) -> Shaped[Tensor, "*batch rt ct"]:
    """Return the largest magnitude of each tile, with rt = ceil(r / tile[0]) and ct = ceil(c / tile[1])."""
    r, c = x.shape[-2:]
    height, width = min(tile[0], max(1, r)), min(tile[1], max(1, c))
    padded = F.pad(x.abs(), (0, -c % width, 0, -r % height))
    rows, columns = padded.shape[-2] // height, padded.shape[-1] // width
    return padded.unflatten(-1, (columns, width)).amax(-1).unflatten(-2, (rows, height)).amax(-2)


def tile_scales(
    x: Float[Tensor, "*batch r c"], tile: Tile, scale: Scale, format: FormatName, amax_min: float
) -> Float[Tensor, "*batch rt ct"]:
    """Return the scales of quantize_tiles, one for each tile of tile_amax."""
    amax = tile_amax(x, tile).float()
    # The divisor is a tensor on the device: by a Python number a GPU divides as a multiplication with 1 / 448.
    scales = amax.clamp(min=amax_min) / amax.new_full((), FORMATS[format].max)
    scales = next_power_of_two(scales) if scale == "ue8m0" else scales
    return torch.where(amax.isfinite(), scales, torch.nan)


def encode_tiles(
    x: Float[Tensor, "*batch r c"], scales: Float[Tensor, "*batch rt ct"], tile: Tile, format: FormatName = "e4m3"
) -> Tensor:
    """Return the codes of x under given scales."""
    f = FORMATS[format]
    return _in_strips(x.shape, scales, tile, lambda strip, s: f.encode(x[..., strip, :] / s), f.dtype)


def group_sizes(ends: Int[Tensor, " e"]) -> Int[Tensor, " e"]:
    """Return the number of rows of each group, from the row after the last of each."""
    return torch.diff(ends, prepend=ends.new_zeros(1))


def listed_sizes(ends: Int[Tensor, " e"], rows: int) -> list[int]:
    """Return group_sizes as numbers, for which the host waits. On the meta device the first group has all rows."""
    return [rows, *[0] * (ends.shape[0] - 1)] if ends.is_meta else group_sizes(ends).tolist()


def _places_apart(ends: Int[Tensor, " e"], rows: int, height: int) -> Int[Tensor, " rows"]:
    """Return a place for each row of some groups, so that each group begins a new tile of this height.

    Sizes stay on the device, and nothing waits for it.
    """
    sizes = group_sizes(ends)
    tiles = (sizes + height - 1) // height
    begin = (tiles.cumsum(0) - tiles) * height - (ends - sizes)
    row = torch.arange(rows, device=ends.device)
    return row + begin[torch.searchsorted(ends, row, right=True)]


def _repeat_scales(x: Tensor, times: int, size: int, dim: int) -> Tensor:
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
        some = _repeat_scales(scales[..., first : first + tiles, :].float(), width, c, -1)
        return make(strip, _repeat_scales(some, height, strip.stop - strip.start, -2)).to(dtype)

    tiles = max(1, ELEMENTS_AT_A_TIME * max(1, r) // max(1, shape.numel()) // height)
    if tiles >= want[-2] or torch.compiler.is_compiling():
        return rows(0, max(1, want[-2]))
    out: Tensor | None = None
    for first in range(0, want[-2], tiles):
        part = rows(first, tiles)
        out = part.new_empty(*shape[:-1], part.shape[-1]) if out is None else out
        out[..., first * height : first * height + part.shape[-2], :] = part
    return cast(Tensor, out)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor as codes and scales, the result of `quantize`.

    Its gradient is the straight-through estimator: quantization counts as the identity. If the original tensor wants a
    gradient, so does the result of dequantize or fp8_matmul. Codes and scales have none.
    """

    codes: Tensor
    """Codes in the format's dtype and the original shape; packed ones as uint8, e5m6's [..., 12 ceil(c / 8)] and e2m1's
    [..., ceil(c / 2)]."""
    scales: Float[Tensor, "*tiles"]
    """Scales of tiles, FP32 or E8M0, [..., rt, ct]."""
    shape: torch.Size
    tile: Tile
    scale: Scale
    format: FormatName
    dtype: torch.dtype
    """Type of the original tensor."""
    source: Tensor | None = None
    """Stand-in for the original tensor in autograd's graph, without its values; None if no gradient is wanted."""

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        return self.codes, self.scales

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and the source if there is one: what an operation looks at to choose a backend."""
        return self.parts if self.source is None else (*self.parts, self.source)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
        """Return code * scale in FP32, rounded once to dtype.

        With power-of-two scales BF16 holds every such value from 2^-126 on.
        """
        codes, scales = self.parts if len(self.shape) > 1 else (self.codes[None], self.scales[None])
        values = dequantize_tiles(codes, scales, self.tile, self.format, dtype, self.shape[-1]).view(self.shape)
        return values if self.source is None else cast(Tensor, StraightThrough.apply(self.source, values))

    def __repr__(self) -> str:
        tile = f"{self.tile[0]}x{self.tile[1]}"
        return (
            f"QuantizedTensor({self.format} {list(self.shape)}, {self.scale} scales of {tile}, {self.nbytes:,} bytes)"
        )


Weight = Tensor | QuantizedTensor
"""A matrix, or a stack of them, as numbers or as codes."""
X = TypeVar("X", Tensor, QuantizedTensor)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight's numbers in dtype."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def matrix_of(w: Weight, i: int) -> Weight:
    """Return matrix i of a stack."""
    if isinstance(w, Tensor):
        return w[i]
    return replace(w, codes=w.codes[i], scales=w.scales[i], shape=w.shape[1:])


def rows_of(x: X, rows: Int[Tensor, " rows"]) -> X:
    """Return some rows of a matrix in tiles of one row, with their gradient."""
    if isinstance(x, Tensor):
        return x.index_select(0, rows)
    codes = x.codes.view(torch.uint8).index_select(0, rows).view(x.codes.dtype)
    source = None if x.source is None else x.source.index_select(0, rows)
    shape = torch.Size((len(rows), x.shape[1]))
    return replace(x, codes=codes, scales=x.scales.index_select(0, rows), shape=shape, source=source)


def quantize(
    x: Float[Tensor, "*any"],
    tile: Tile = ACTIVATION_TILE,
    scale: Scale = "ue8m0",
    format: FormatName = "e4m3",
    amax_min: float = AMAX_MIN,
) -> QuantizedTensor:
    """Quantize x, of FP32, BF16 or FP16 and at least one dimension. The top of this file defines codes and scales.

    Args:
        tile: rows and columns that share a scale, of the last two dimensions.
        scale: "fp32", or "ue8m0", a power of two.
        format: "e4m3", "e5m2", "e5m6" or "e2m1".
        amax_min: lower bound of a tile's largest magnitude. AMAX_MIN suits activations and weights. Gradients want
            SMALLEST_AMAX, else whole tiles of them get a scale that is far too large.

    A tile with an infinity or NaN becomes NaN as a whole.

    Raises: ValueError for other dtypes (FP64, integers), tiles, formats and scales; for an amax_min outside 2^-100 to
        FP32's largest number; for forward-mode derivatives (torch.func.jvp).

    Source: DeepSeek-V3 report, section 3.3.2.
    """
    check_source(x, "x")
    check_options(scale, format=format)
    if not SMALLEST_AMAX <= amax_min <= torch.finfo(torch.float32).max:
        raise ValueError(f"amax_min={amax_min}; want a finite number, 2^-100 or more, such as {AMAX_MIN}")
    pair = isinstance(tile, Sequence) and len(tile) == 2
    if not pair or not all(type(n) is int and n > 0 for n in tile) or (x.dim() == 1 and tile[0] > 1):
        raise ValueError(f"tile={tile!r} is not a tile of {list(x.shape)}; want rows and columns, such as (1, 128)")
    cut = tile[0], tile[1]
    source = cast(Tensor, _Source.apply(x)) if x.requires_grad and torch.is_grad_enabled() else None
    codes, scales = quantize_tiles(x.detach() if x.dim() > 1 else x.detach()[None], cut, scale, format, amax_min)
    return QuantizedTensor(
        codes=codes.view(*x.shape[:-1], codes.shape[-1]),
        scales=scales.view(*scales.shape[-x.dim() :]),
        shape=x.shape,
        tile=cut,
        scale=scale,
        format=format,
        dtype=x.dtype,
        source=source,
    )


def check_source(x: Tensor, what: str) -> None:
    """Refuse dtypes without 8-bit codes (FP64, integers), single numbers, and forward-mode derivatives.

    Codes are integers and carry no tangent, so that a forward-mode derivative would be zero without a word.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{what} is {x.dtype}; want float32, bfloat16 or float16: use {what}.float()")
    if not x.dim():
        raise ValueError(f"{what} is a single number; want a dimension or more: use {what}[None]")
    if _has_tangent(x):
        raise ValueError(f"{what} has a forward-mode tangent, as in torch.func.jvp; want reverse mode: use backward()")


def _has_tangent(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_batchedtensor(x):  # pyright: ignore[reportAttributeAccessIssue]
        x = torch._C._functorch.get_unwrapped(x)  # pyright: ignore[reportAttributeAccessIssue]
    return forward_ad.unpack_dual(x).tangent is not None


def check_options(scale: str, **formats: str) -> None:
    """Refuse unknown scales and formats."""
    for name, value in {"scale": scale, **formats}.items():
        known = ("ue8m0", "fp32") if name == "scale" else tuple(FORMATS)
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")


class _Source(torch.autograd.Function):
    """A tensor of x's shape and dtype in the graph, of one element in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(torch.autograd.Function):
    """The values, at the source's place in the graph: the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
