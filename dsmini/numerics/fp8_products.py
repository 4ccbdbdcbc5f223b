"""The three products of an FP8 layer as operations: fprop, dgrad and wgrad (DeepSeek-V3 report, figure 6).

    fprop   y  = Q(x) Q(W)^T       x in 1x128 tiles, W in 128x128 blocks: both along k, which is summed over
    dgrad   dx = Q(dy) Q(W)        dy in 1x128 tiles along o
    wgrad   dW = Q(dy)^T Q(x)      summed over tokens, so both in 128x1 tiles

The plain version of each multiplies in FP32 and adds 128 terms at a time, expert by expert. The tuned one is the same
function with `recipe.tuned`: one product, or one grouped product, of operands in BF16 where that is exact. gemm.py
calls the operations with gradients off, in forward and in backward, so that a kernel can serve them in training too.

Arguments of all of them:
    codes, scales   as `quantize_tiles` returns them, of matrices; w_codes is [o, k], or [e, o, k] with ends
    ends            row after each expert's last; None: one matrix for all rows
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics.accumulation import Accumulator
from dsmini.numerics.products import grouped_linear, grouped_outer
from dsmini.numerics.quantization import ACTIVATION_TILE, AMAX_MIN, SMALLEST_AMAX, TOKEN_TILE, WEIGHT_TILE
from dsmini.numerics.tiles import FormatName, Scale, dequantize_tiles, listed_sizes, round_tiles

BLOCK = 128
"""Terms of a sum that are added before the sum so far: N_C of the report, section 3.3.2."""


class Recipe(NamedTuple):
    """Options of one product and its gradients."""

    scale: Scale
    weight_scale: Scale
    grad_format: FormatName
    saved_format: FormatName
    """Format in which x is kept for wgrad."""
    out_dtype: torch.dtype
    """Dtype of the result and of both gradients."""
    accumulator: Accumulator | None
    """Emulated accumulator of all three products; None: FP32."""
    backend: str | None
    """Backend of the forward, which backward uses too."""
    tuned: bool = False
    """Run one product of whole operands; False: FP32 products of 128 terms at a time, expert by expert."""

    @property
    def operands(self) -> torch.dtype:
        """Dtype of dequantized operands: BF16, where that holds them exactly and the result is BF16."""
        exact = self.scale == self.weight_scale == "ue8m0" and self.accumulator is None
        return torch.bfloat16 if self.tuned and exact and self.out_dtype == torch.bfloat16 else torch.float32


def tuned(product: ops.Operation[..., Tensor]) -> ops.Operation[..., Tensor]:
    """Declare the tuned version of a product, whose last argument is the recipe."""

    def run(*args: Any) -> Tensor:
        return product.reference(*args[:-1], args[-1]._replace(tuned=True))

    ops.eager(product.name)(run)
    return product


@tuned
@ops.operation("fp8_fprop")
def fp8_fprop(
    x_codes: Tensor,
    x_scales: Float[Tensor, "rows kt"],
    w_codes: Tensor,
    w_scales: Float[Tensor, "*e ot kt"],
    ends: Int[Tensor, " e"] | None,
    recipe: Recipe,
) -> Float[Tensor, "rows o"]:
    """Return x W^T of E4M3 codes.

    Source: DeepSeek-V3 report, section 3.3.
    """
    x = dequantize_tiles(x_codes, x_scales, ACTIVATION_TILE, "e4m3", recipe.operands)
    w = dequantize_tiles(w_codes, w_scales, WEIGHT_TILE, "e4m3", recipe.operands)
    return _times_transposed(x, w, ends, recipe)


@tuned
@ops.operation("fp8_swiglu_fprop")
def fp8_swiglu_fprop(
    gate: Float[Tensor, "rows k"],
    up: Float[Tensor, "rows k"],
    w_codes: Tensor,
    w_scales: Float[Tensor, "*e ot kt"],
    ends: Int[Tensor, " e"] | None,
    recipe: Recipe,
) -> Float[Tensor, "rows o"]:
    """Return Q(silu(gate) * up) W^T."""
    hidden = F.silu(gate).mul_(up)
    x = round_tiles(hidden, ACTIVATION_TILE, recipe.scale, "e4m3", AMAX_MIN, recipe.operands)
    w = dequantize_tiles(w_codes, w_scales, WEIGHT_TILE, "e4m3", recipe.operands)
    return _times_transposed(x, w, ends, recipe)


@tuned
@ops.operation("fp8_dgrad")
def fp8_dgrad(
    dy: Float[Tensor, "rows o"],
    w_codes: Tensor,
    w_scales: Float[Tensor, "*e ot kt"],
    ends: Int[Tensor, " e"] | None,
    recipe: Recipe,
) -> Float[Tensor, "rows k"]:
    """Return the gradient of x: Q(dy) W, with dy rounded in 1x128 tiles."""
    w = dequantize_tiles(w_codes, w_scales, WEIGHT_TILE, "e4m3", recipe.operands)
    g = round_tiles(dy, ACTIVATION_TILE, recipe.scale, recipe.grad_format, SMALLEST_AMAX, recipe.operands)
    return _times_transposed(g, w.mT, ends, recipe)


@tuned
@ops.operation("fp8_wgrad")
def fp8_wgrad(
    dy: Float[Tensor, "rows o"],
    x: Tensor,
    x_scales: Float[Tensor, "rows kt"] | None,
    columns: int,
    ends: Int[Tensor, " e"] | None,
    recipe: Recipe,
) -> Float[Tensor, "*e o k"]:
    """Return the gradient of W: Q(dy)^T Q(x), both rounded in tiles of 128 tokens of one expert; zeros without tokens.

    Args:
        x: codes in the format that x is kept in, or, without scales, its values [rows, k].
        columns: k, which packed codes do not tell.
    """
    if x_scales is not None:
        x = dequantize_tiles(x, x_scales, ACTIVATION_TILE, recipe.saved_format, recipe.operands, columns)
    g = round_tiles(dy, TOKEN_TILE, recipe.scale, recipe.grad_format, SMALLEST_AMAX, recipe.operands, ends)
    x = round_tiles(x, TOKEN_TILE, recipe.scale, "e4m3", AMAX_MIN, recipe.operands, ends)
    if ends is None:
        return _times_transposed(g.T, x.T, None, recipe)
    if recipe.tuned:
        return grouped_outer(g, x, ends).to(recipe.out_dtype)
    sizes = listed_sizes(ends, x.shape[0])
    groups = zip(g.split(sizes), x.split(sizes), strict=True)
    return torch.stack([_add_blocks(a.T, b.T) for a, b in groups]).to(recipe.out_dtype)


def _times_transposed(
    a: Float[Tensor, "n k"], b: Float[Tensor, "*e m k"], ends: Tensor | None, recipe: Recipe
) -> Float[Tensor, "n m"]:
    """Return a b^T in the result's dtype, for each expert's rows of a with its matrix b."""
    if recipe.accumulator is not None:
        y = recipe.accumulator.matmul(a, b)
    elif recipe.tuned:
        y = F.linear(a, b) if ends is None else grouped_linear(a, b, ends)
    elif ends is None:
        y = _add_blocks(a, b)
    else:
        rows = a.split(listed_sizes(ends, a.shape[0]))
        y = torch.cat([_add_blocks(part, matrix) for part, matrix in zip(rows, b.unbind(0), strict=True)])
    return y.to(recipe.out_dtype)


def _add_blocks(a: Float[Tensor, "n k"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n m"]:
    """Return a b^T in FP32: products of 128 terms, added one block after the other."""
    y = a.new_zeros(a.shape[0], b.shape[0])
    for start in range(0, a.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        y = y + a[:, block] @ b[:, block].T
    return y
