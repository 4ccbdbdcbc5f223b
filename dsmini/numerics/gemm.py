"""Multiply matrices in the FP8 of DeepSeek-V3, simulated: forward, input gradient and weight gradient.

For y = x W^T with x [n, k] and W [o, k], all operands are E4M3 with a scale for every tile (report, figure 6):

    fprop   y  = Q(x) Q(W)^T       x in 1x128 tiles, W in 128x128 blocks: both along k, which is summed over
    dgrad   dx = Q(dy) Q(W)        dy in 1x128 tiles along o
    wgrad   dW = Q(dy)^T Q(x)      summed over tokens, so both in 128x1 tiles

wgrad takes dy from its own values and x from the codes that forward saved; with power-of-two scales normal numbers lose
nothing. Tensors for backward are saved as FP8 codes and scales: W, and x once, however many products read it.

The reference backend multiplies operands in FP32. Others take BF16 where that is exact. Products are computed with
gradients off, in forward and in backward, so that kernels round and dequantize in training too. `ends` is the row after
each expert's last; None: there is one matrix for all rows.

Simulated: with power-of-two scales a dequantized E4M3 value is a BF16 value. So a BF16 product of the dequantized
operands, which sums in FP32, is the FP8 product, except for the order of its sums and the rounding of its result. With
FP32 scales, or results other than BF16, an FP32 product runs. The weight's gradient is rounded to the result's dtype
before it is added to that of an FP32 parameter.

An infinity or NaN makes NaN of its whole tile, and of the results that the tile takes part in.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics.dispatch import grouped_linear, grouped_outer
from dsmini.numerics.quantization import (
    ACTIVATION_TILE,
    AMAX_MIN,
    SMALLEST_AMAX,
    TOKEN_TILE,
    WEIGHT_TILE,
    FormatName,
    QuantizedTensor,
    Scale,
    Tile,
    check_options,
    check_source,
    dequantize_tiles,
    quantize,
    quantize_tiles,
    round_tiles,
)
from dsmini.numerics.swiglu import swiglu, swiglu_gradients


class Recipe(NamedTuple):
    """Options of one product and its gradients."""

    scale: Scale
    """Kind of scale of x, and of the gradients."""
    k: int
    """Columns of x and W, over which the product sums."""
    weight_tile: Tile
    weight_scale: Scale
    weight_format: FormatName
    grad_format: FormatName
    saved_format: FormatName
    """Format in which x is kept for wgrad."""
    out_dtype: torch.dtype
    """Dtype of the result and of both gradients."""
    backend: str | None
    """Backend of the forward, which backward uses too."""
    swiglu: bool = False
    """Rows are the SwiGLU of two tensors that are saved."""
    limit: float | None = None
    """Limit of that SwiGLU."""

    @property
    def operands(self) -> torch.dtype:
        """Dtype of dequantized operands: BF16, where that holds them exactly and the result is BF16."""
        exact = self.scale == self.weight_scale == "ue8m0" and self.out_dtype == torch.bfloat16
        return torch.bfloat16 if exact and self.backend != "reference" else torch.float32

    def weight(self, codes: Tensor, scales: Float[Tensor, "*e ot kt"]) -> Float[Tensor, "*e o k"]:
        """Return the values of a weight's codes."""
        return dequantize_tiles(codes, scales, self.weight_tile, self.weight_format, self.operands, self.k)

    def saved(self, codes: Tensor, scales: Float[Tensor, "*batch kt"]) -> Float[Tensor, "rows k"]:
        """Return the values of what backward reads: x, or gate or up."""
        dtype = self.out_dtype if self.swiglu else self.operands
        return dequantize_tiles(_rows(codes), _rows(scales), ACTIVATION_TILE, self.saved_format, dtype, self.k)


def fp8_fprop(
    x: Float[Tensor, "rows k"], w: Float[Tensor, "*e o k"], ends: Int[Tensor, " e"] | None, recipe: Recipe
) -> Float[Tensor, "rows o"]:
    """Return x W^T of values that E4M3 holds, in the result's dtype; for each expert's rows with its matrix.

    Source: DeepSeek-V3 report, section 3.3.
    """
    with ops.without_autocast(x):
        y = F.linear(x, w) if ends is None else grouped_linear(x, w, ends)
    return y.to(recipe.out_dtype)


def fp8_dgrad(
    dy: Float[Tensor, "rows o"], w: Float[Tensor, "*e o k"], ends: Int[Tensor, " e"] | None, recipe: Recipe
) -> Float[Tensor, "rows k"]:
    """Return the gradient of x: Q(dy) W, with dy rounded in 1x128 tiles."""
    g = round_tiles(dy, ACTIVATION_TILE, recipe.scale, recipe.grad_format, SMALLEST_AMAX, recipe.operands)
    return fp8_fprop(g, w.mT, ends, recipe)


def fp8_wgrad(
    dy: Float[Tensor, "rows o"], x: Float[Tensor, "rows k"], ends: Int[Tensor, " e"] | None, recipe: Recipe
) -> Float[Tensor, "*e o k"]:
    """Return the gradient of W: Q(dy)^T Q(x), both rounded in tiles of 128 tokens of one expert, or zeros."""
    g = round_tiles(dy, TOKEN_TILE, recipe.scale, recipe.grad_format, SMALLEST_AMAX, recipe.operands, ends)
    x = round_tiles(x, TOKEN_TILE, recipe.scale, "e4m3", AMAX_MIN, recipe.operands, ends)
    if ends is None:
        return fp8_fprop(g.T, x.T, None, recipe)
    with ops.without_autocast(x):
        return grouped_outer(g, x, ends).to(recipe.out_dtype)


def fp8_matmul(
    x: Float[Tensor, "*batch k"] | QuantizedTensor,
    w: Float[Tensor, "*e o k"] | QuantizedTensor,
    *,
    scale: Scale = "ue8m0",
    grad_format: Literal["e4m3", "e5m2"] = "e4m3",
    out_dtype: torch.dtype | None = None,
    ends: Int[Tensor, " e"] | None = None,
    saved_format: Literal["e4m3", "e5m6"] = "e4m3",
) -> Float[Tensor, "*batch o"]:
    """Multiply x W^T in simulated FP8, with its gradients.

    Args:
        x: FP32, BF16 or FP16, or the result of `quantize(x)`, which several products may share. Then it is saved as
            it is, and gradients are rounded with its kind of scale. E5M2 and E5M6 are multiplied in E4M3.
        w: of the same kinds; a quantized weight may have any tile and format, and has no gradient.
        out_dtype: BF16, FP32 or FP16; None: x's.
        ends: the row after each expert's last, for x [rows, k] and w [e, o, k]. The last is the number of rows; an
            expert may have none.
        saved_format: format in which x is saved for backward: e5m6 for the Linear after attention (report, section
            3.3.3).

    First derivatives only.

    Raises: ValueError for FP64 and integers, devices or widths that differ, x in tiles other than 1x128, forward-mode
        derivatives, and on a CPU for ends that do not cut the rows into groups.

    Source: DeepSeek-V3 report, section 3.3.
    """
    check_options(scale, grad_format=grad_format, saved_format=saved_format)
    _check_operands(x, w, ends)
    trained, weight = _weight_operand(w, scale)
    wants_dw = trained is not None and trained.requires_grad and torch.is_grad_enabled()
    q, saved = _operand(x, scale, saved_format if wants_dw else "e4m3")
    of_weight = (weight.shape[-1], weight.tile, weight.scale, weight.format)
    recipe = Recipe(q.scale, *of_weight, grad_format, saved.format, out_dtype or x.dtype, ops.chosen())
    rows = dequantize_tiles(_rows(q.codes), _rows(q.scales), ACTIVATION_TILE, "e4m3", recipe.operands).view(q.shape)
    return _multiply(recipe, rows, weight, ends, saved.parts if wants_dw else (), trained, q.source, None, None)


def fp8_swiglu_matmul(
    gate: Float[Tensor, "*batch k"],
    up: Float[Tensor, "*batch k"],
    w: Float[Tensor, "*e o k"] | QuantizedTensor,
    *,
    scale: Scale = "ue8m0",
    grad_format: Literal["e4m3", "e5m2"] = "e4m3",
    ends: Int[Tensor, " e"] | None = None,
    limit: float | None = None,
    weights: Float[Tensor, "*batch 1"] | None = None,
) -> Float[Tensor, "*batch o"]:
    """Compute fp8_matmul(swiglu(gate, up, limit, weights), w), of which gate and up are saved, as FP8.

    The rest is computed again in backward.

    Forward uses gate and up as they are. Backward uses the saved FP8 values, also for the derivative of silu.

    Source: DeepSeek-V3 report, section 3.3.3.
    """
    check_options(scale, grad_format=grad_format)
    check_source(gate, "gate")
    _check_operands(up, w, ends)
    if gate.shape != up.shape or gate.device != up.device:
        gate_is, up_is = (f"{list(t.shape)} on {t.device}" for t in (gate, up))
        raise ValueError(f"gate is {gate_is}, up {up_is}; want equal shapes on one device")
    trained, weight = _weight_operand(w, scale)
    of_weight = (weight.shape[-1], weight.tile, weight.scale, weight.format)
    recipe = Recipe(scale, *of_weight, grad_format, "e4m3", up.dtype, ops.chosen(), swiglu=True, limit=limit)
    tiles = (ACTIVATION_TILE, scale, "e4m3", AMAX_MIN)
    with torch.no_grad():
        hidden = swiglu(gate, up, limit, weights)
        rows = round_tiles(_rows(hidden), *tiles, recipe.operands).view(gate.shape)
    inputs, kept = (trained, gate, up, weights), []
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        kept = [part for t in (gate, up) for part in quantize_tiles(_rows(t.detach()), *tiles)]
    return _multiply(recipe, rows, weight, ends, kept, *inputs)


def _operand(
    x: Tensor | QuantizedTensor, scale: Scale, saved_format: FormatName
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Return x as it is multiplied, and as it is saved for backward."""
    if isinstance(x, Tensor):
        q = quantize(x, ACTIVATION_TILE, scale)
        return q, q if saved_format == "e4m3" else quantize(x.detach(), ACTIVATION_TILE, "ue8m0", saved_format)
    return (x if x.format == "e4m3" else quantize(x.dequantize(), ACTIVATION_TILE, scale)), x


def _weight_operand(w: Tensor | QuantizedTensor, scale: Scale) -> tuple[Tensor | None, QuantizedTensor]:
    """Return the tensor that gets the gradient, and w as it is multiplied."""
    return (None, w) if isinstance(w, QuantizedTensor) else (w, quantize(w.detach(), WEIGHT_TILE, scale))


def _multiply(
    recipe: Recipe, rows: Tensor, weight: QuantizedTensor, ends: Tensor | None, kept: Sequence[Tensor], *inputs: Any
) -> Tensor:
    """Return the product of rows [*batch, k] and of the weight, with gradients of what both are made of.

    Args:
        kept: codes and scales that backward makes the rows of again: of the source, and of up if there is one.
        inputs: W, source, up and weights, or None. Rows are the values of the source; with an up they are those of
            swiglu(source, up, limit, weights).
    """
    wants_dw, *wanted = (x is not None and x.requires_grad for x in inputs)
    dtypes = [None if x is None else x.dtype for x in inputs]

    def forward(*inputs: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y = fp8_fprop(_rows(rows), recipe.weight(*weight.parts), ends, recipe)
        return y.view(*rows.shape[:-1], y.shape[-1]), (*kept, *weight.parts, ends, inputs[-1])

    def gradients(grad: Tensor, *saved: Any) -> list[Tensor | None]:
        *kept, w_codes, w_scales, ends, weights = saved
        dy, lead = _rows(grad), grad.shape[:-1]
        dx = fp8_dgrad(dy, recipe.weight(w_codes, w_scales), ends, recipe) if any(wanted) else None
        made_of = [recipe.saved(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
        if recipe.swiglu:
            gate, up, share = *made_of, None if weights is None else _rows(weights)
            dw = fp8_wgrad(dy, swiglu(gate, up, recipe.limit, share), ends, recipe) if wants_dw else None
            of_inputs = (None,) * 3 if dx is None else swiglu_gradients(dx, gate, up, recipe.limit, share)
        else:
            dw = fp8_wgrad(dy, made_of[0], ends, recipe) if wants_dw else None
            of_inputs = dx, None, None
        found = [dw, *(None if g is None else g.view(*lead, g.shape[-1]) for g in of_inputs)]
        return [None if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]

    return ops.trained(forward, gradients, *inputs)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _check_operands(x: Tensor | QuantizedTensor, w: Tensor | QuantizedTensor, ends: Tensor | None) -> None:
    for value, name in ((x, "x"), (w, "w")):
        if not isinstance(value, QuantizedTensor):
            check_source(value, name)
    devices = dict.fromkeys(value.device for value in (x, w, ends) if value is not None)
    if len(devices) > 1:
        raise ValueError(f"x, w and ends are on {', '.join(map(str, devices))}; want one device: move them by .to()")
    if isinstance(x, QuantizedTensor) and x.tile != ACTIVATION_TILE:
        raise ValueError(f"x is quantized in tiles of {x.tile[0]}x{x.tile[1]}; want 1x128: quantize(x)")
    grouped = ends is not None
    shapes = len(w.shape) == 2 + grouped and (not grouped or (len(x.shape) == 2 and ends.shape == w.shape[:1]))
    if not shapes or x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"x is {list(x.shape)}, w {list(w.shape)}, ends {None if ends is None else list(ends.shape)}; "
            "want x [..., k] and w [o, k], or, with ends [e], x [rows, k] and w [e, o, k]"
        )
    if ends is not None and ops.can_read_values(ends):
        cuts = [0, *ends.tolist()]
        if cuts != sorted(cuts) or cuts[-1] != x.shape[0]:
            raise ValueError(f"ends={cuts[1:]} do not cut {x.shape[0]} rows; want rising integers up to that")
