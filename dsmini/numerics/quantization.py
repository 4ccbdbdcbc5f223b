"""Quantize a tensor: codes in a short format, and a scale for each tile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics.formats import FORMATS
from dsmini.numerics.tiles import FormatName, Scale, Tile, dequantize_tiles, quantize_tiles

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

SOURCES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor as codes and scales, the result of `quantize`.

    Its gradient is the straight-through estimator: quantization counts as the identity. If the original tensor wants a
    gradient, so does the result of dequantize or fp8_matmul. Codes and scales have none.
    """

    codes: Tensor
    """Codes in the format's dtype and the original shape; e5m6 as uint8, [..., 12 ceil(c / 8)]."""
    scales: Float[Tensor, "*tiles"]
    """Scales of tiles, FP32, [..., rt, ct]."""
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
        codes, scales = _matrices(self.codes, self.scales)
        values = dequantize_tiles(codes, scales, self.tile, self.format, dtype, self.shape[-1]).view(self.shape)
        return values if self.source is None else cast(Tensor, _Standing.apply(self.source, values))

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "QuantizedTensor":
        """Return some rows of a matrix, without a gradient. Its tiles must be one row high."""
        if len(self.shape) != 2 or self.tile[0] != 1:
            raise ValueError(
                f"rows of {list(self.shape)} in tiles {self.tile[0]} rows high; want a matrix in tiles of one"
            )
        codes = self.codes.view(torch.uint8).index_select(0, rows).view(self.codes.dtype)
        scales = self.scales.index_select(0, rows)
        return replace(self, codes=codes, scales=scales, shape=torch.Size((len(rows), self.shape[1])), source=None)

    def detach(self) -> "QuantizedTensor":
        """Return the same tensor without a gradient."""
        return replace(self, source=None)

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """Return the same tensor on another device, without a gradient. Codes have one dtype.

        Raises: ValueError for a dtype; use dequantize(dtype).
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"to({device}): codes cannot be cast; use dequantize({device}), or a device")
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), source=None)

    def __copy__(self) -> "QuantizedTensor":
        return replace(self)

    def __reduce__(self) -> tuple[Callable[..., "QuantizedTensor"], tuple[Any, ...]]:
        """Return the parts for pickle and deepcopy, which give the same without a gradient."""
        # as bytes: torch pickles no FP8 tensors
        return _restore, (vars(self) | {"codes": self.codes.view(torch.uint8), "source": None}, self.codes.dtype)

    def __repr__(self) -> str:
        seen = self.scales.numel() and self.scales.device.type != "meta"
        low, high = (self.scales.min().item(), self.scales.max().item()) if seen else (0.0, 0.0)
        share = self.nbytes / max(1, 2 * self.shape.numel())
        return (
            f"QuantizedTensor({self.format} {list(self.shape)} in tiles of {self.tile[0]}x{self.tile[1]}, {self.scale} "
            f"scales {list(self.scales.shape)} from {low:.3g} to {high:.3g}, {self.nbytes:,} bytes, {share:.2f} of "
            f"bfloat16, from {str(self.dtype).removeprefix('torch.')}, on {self.device})"
        )


Weight = Tensor | QuantizedTensor
"""A matrix, or a stack of them, as numbers or as codes."""
X = TypeVar("X", Tensor, QuantizedTensor)


def number_dtype(x: Tensor | QuantizedTensor) -> torch.dtype:
    """Return the dtype of the numbers in memory: the tensor's, or that of the codes."""
    return x.dtype if isinstance(x, Tensor) else x.codes.dtype


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight's numbers in dtype."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def matrix_of(w: Weight, i: int) -> Weight:
    """Return matrix i of a stack."""
    if isinstance(w, Tensor):
        return w[i]
    codes = w.codes[i]
    return replace(w, codes=codes, scales=w.scales[i], shape=codes.shape)


def rows_of(x: X, rows: Int[Tensor, " rows"]) -> X:
    """Return some rows of a matrix, with their gradient."""
    if isinstance(x, Tensor):
        return x.index_select(0, rows)
    return replace(x.select_rows(rows), source=None if x.source is None else x.source.index_select(0, rows))


def quantize(
    x: Float[Tensor, "*any"],
    tile: Tile | Literal["row", "tensor"] = ACTIVATION_TILE,
    scale: Scale = "ue8m0",
    format: FormatName = "e4m3",
    amax_min: float = AMAX_MIN,
) -> QuantizedTensor:
    """Quantize x, of FP32, BF16 or FP16 and at least one dimension. `tiles.py` defines codes and scales.

    Args:
        tile: rows and columns that share a scale, of the last two dimensions; or "row", or "tensor" for one scale.
        scale: "fp32", or "ue8m0", a power of two.
        format: "e4m3", "e5m2" or "e5m6".
        amax_min: lower bound of a tile's largest magnitude. AMAX_MIN suits activations and weights. Gradients want
            SMALLEST_AMAX, else whole tiles of them get a scale that is far too large.

    A tile with an infinity or NaN becomes NaN as a whole.

    Raises: ValueError for other dtypes (FP64, integers), tiles, formats and scales; for an amax_min outside 2^-100 to
        FP32's largest number; for forward-mode derivatives (torch.func.jvp).

    Source: DeepSeek-V3 report, section 3.3.2.
    """
    check_source(x, "x")
    check_options(scale, amax_min, format=format)
    tile = "row" if tile == "tensor" and not x.numel() else tile  # no elements, no scale
    cut = _cut(x, tile)
    trained = x.requires_grad and torch.is_grad_enabled()
    if trained and ops.is_transformed():
        raise ValueError("FP8 gradients do not work inside torch.func; use backward(), or a model without FP8")
    source = cast(Tensor, _Source.apply(x)) if trained else None
    matrix = x.detach() if x.dim() > 1 else x.detach().unsqueeze(0)
    matrix = matrix.flatten(0, -2) if tile == "tensor" else matrix
    codes, scales = quantize_tiles(matrix, cut, scale, format, amax_min)
    return QuantizedTensor(
        codes=codes.view(*x.shape[:-1], codes.shape[-1]),
        scales=scales.view([1] * x.dim()) if tile == "tensor" else scales.view(*scales.shape[-x.dim() :]),
        shape=x.shape,
        tile=cut,
        scale=scale,
        format=format,
        dtype=x.dtype,
        source=source,
    )


def _restore(fields: dict[str, Any], dtype: torch.dtype) -> QuantizedTensor:
    return QuantizedTensor(**fields | {"codes": fields["codes"].view(dtype)})


def check_source(x: Any, what: str) -> None:
    """Refuse tensors without 8-bit codes (FP64, integers, numbers without a dimension), and forward-mode derivatives.

    Codes are integers and carry no tangent, so that a forward-mode derivative would be zero without a word.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{what} is a {type(x).__name__}; want a tensor of float32, bfloat16 or float16")
    if x.dtype not in SOURCES:
        raise ValueError(f"{what} is {x.dtype}; want float32, bfloat16 or float16: use {what}.float()")
    if not x.dim():
        raise ValueError(f"{what} has no dimensions; want at least one, which tiles cut")
    if _has_tangent(x):
        raise ValueError(f"{what} has a forward-mode tangent, as in torch.func.jvp; want reverse mode: use backward()")


def _has_tangent(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_batchedtensor(x):  # pyright: ignore[reportAttributeAccessIssue]
        x = torch._C._functorch.get_unwrapped(x)  # pyright: ignore[reportAttributeAccessIssue]
    return forward_ad.unpack_dual(x).tangent is not None


def check_options(scale: str, amax_min: float, **formats: str) -> None:
    """Refuse unknown scales and formats, and an amax_min that FP32 scales cannot follow."""
    named = [("scale", scale, ("ue8m0", "fp32")), *((name, value, tuple(FORMATS)) for name, value in formats.items())]
    for name, value, known in named:
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
    number = isinstance(amax_min, int | float)
    if not number or not SMALLEST_AMAX <= amax_min <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"amax_min={amax_min!r}; want a finite number, 2^-100 or more: use {AMAX_MIN} or, for gradients, 2**-100"
        )


def _pair(tile: Any) -> Tile:
    pair = isinstance(tile, Sequence) and not isinstance(tile, str) and len(tile) == 2
    if not pair or not all(type(n) is int and 0 < n < 2**31 for n in tile):
        raise ValueError(f"tile={tile!r} is not a tile; want rows and columns such as (1, 128), or 'row' or 'tensor'")
    return cast(Tile, tuple(tile))


def _cut(x: Tensor, tile: Any) -> Tile:
    """Return the tile in rows and columns."""
    c = x.shape[-1]
    if tile == "row":
        return 1, max(1, c)
    if tile == "tensor":
        return max(1, x.numel() // max(1, c)), max(1, c)
    rows, columns = _pair(tile)
    if x.dim() == 1 and rows > 1:
        raise ValueError(f"tile={tile!r} has {rows} rows, and a tensor of one dimension has one; use (1, 128)")
    return rows, columns


def _matrices(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales with at least two dimensions; with exactly two if there is a single scale."""
    if codes.dim() == 1:
        return codes.unsqueeze(0), scales.unsqueeze(0)
    one = scales.numel() == 1
    return (codes.flatten(0, -2), scales.flatten(0, -2)) if one else (codes, scales)


class _Source(torch.autograd.Function):
    """A tensor of x's shape and dtype in the graph, of one element in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Standing(torch.autograd.Function):
    """The values, at the source's place in the graph: the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
