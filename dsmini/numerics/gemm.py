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
before it is added to that of an FP32 parameter. `Accumulator` emulates the narrow sums of Hopper's tensor cores.

An infinity or NaN makes NaN of its whole tile, and of the results that the tile takes part in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

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

GROUP = 32
"""Number of products that an emulated accumulator adds at once."""
AT_A_TIME = 1 << 22
"""Maximum number of products in memory."""


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """Precision of a sum of products: the narrow accumulator of Hopper's tensor cores, emulated.

    H800 tensor cores add FP8 products at about 14 bits, not in FP32 (report, section 3.5.2). They shift 32 products at
    a time to the exponent of the largest and drop the bits that fall off the end. A growing sum loses bits in the same
    way. At K = 4096 DeepSeek saw errors of nearly 2 %. Their cure is to move the partial sum into an FP32 register
    every N_C = 128 products (section 3.3.2, figure 7b).

    Simulated: the hardware is not documented to the bit. This code truncates where the report says that bits are lost,
    and reproduces the errors that it reports. It is slow, and only for looking at errors.
    """

    bits: int = 14
    """Bits of the significand of a partial sum."""
    promote_every: int | None = 128
    """Number of products after which the partial sum moves into FP32 (N_C), a multiple of 32; None: only at the end."""

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 24:
            raise ValueError(f"bits={self.bits} is not a width of an accumulator; use 2 to 24")
        if self.promote_every is not None and (self.promote_every < GROUP or self.promote_every % GROUP):
            raise ValueError(
                f"promote_every={self.promote_every} is not a multiple of {GROUP}, in which products are added"
            )

    def matmul(self, a: Float[Tensor, "n k"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n m"]:
        """Return a b^T in FP32, each sum computed in this accumulator."""
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
            raise ValueError(f"a is {list(a.shape)}, b is {list(b.shape)}; want [n, k] and [m, k]")
        rows = max(1, AT_A_TIME // max(1, b.shape[0] * GROUP))
        parts = [self._matmul(part.float(), b.float()) for part in a.split(rows)]
        return torch.cat(parts) if parts else a.new_zeros(0, b.shape[0], dtype=torch.float32)

    def _matmul(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], b.shape[0])
        partial = torch.zeros_like(total, dtype=torch.float64)
        for start in range(0, a.shape[1], GROUP):
            products = a[:, None, start : start + GROUP].double() * b[None, :, start : start + GROUP].double()
            exponent = _exponent(products.abs().amax(-1).maximum(partial.abs()))
            aligned = _cut(products, exponent[..., None], self.bits).sum(-1) + _cut(partial, exponent, self.bits)
            partial = _cut(aligned, _exponent(aligned.abs()), self.bits)
            if self.promote_every is not None and (start + GROUP) % self.promote_every == 0:
                total += partial.float()
                partial.zero_()
        return total + partial.float()


def _exponent(magnitude: Tensor) -> Tensor:
    """Return floor(log2), exactly; -1 for zero, of which nothing is cut."""
    return torch.frexp(magnitude).exponent - 1


def _cut(x: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """Truncate x below the last of `bits` bits of a number with that exponent."""
    step = (exponent.long() - bits + 1 + 1023 << 52).view(torch.float64)  # a power of two, by its exponent field
    return (x / step).trunc() * step


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
    accumulator: Accumulator | None
    """Emulated accumulator of all three products; None: FP32."""
    backend: str | None
    """Backend of the forward, which backward uses too."""

    @property
    def operands(self) -> torch.dtype:
        """Dtype of dequantized operands: BF16, where that holds them exactly and the result is BF16."""
        exact = self.scale == self.weight_scale == "ue8m0" and self.accumulator is None
        exact = exact and self.out_dtype == torch.bfloat16
        return torch.bfloat16 if exact and self.backend != "reference" else torch.float32

    def weight(self, codes: Tensor, scales: Float[Tensor, "*e ot kt"]) -> Float[Tensor, "*e o k"]:
        """Return the values of a weight's codes."""
        return dequantize_tiles(codes, scales, self.weight_tile, self.weight_format, self.operands, self.k)


def fp8_fprop(
    x: Float[Tensor, "rows k"], w: Float[Tensor, "*e o k"], ends: Int[Tensor, " e"] | None, recipe: Recipe
) -> Float[Tensor, "rows o"]:
    """Return x W^T of values that E4M3 holds, in the result's dtype; for each expert's rows with its matrix.

    Source: DeepSeek-V3 report, section 3.3.
    """
    with ops.without_autocast(x):
        if recipe.accumulator is not None:
            y = recipe.accumulator.matmul(x, w)
        else:
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
    accumulator: Accumulator | None = None,
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
        accumulator: emulate an accumulator of few bits, in all three products. Slow, and not with `ends`.

    First derivatives only.

    Raises: ValueError for FP64 and integers, devices or widths that differ, x in tiles other than 1x128, forward-mode
        derivatives, and on a CPU for ends that do not cut the rows into groups.

    Source: DeepSeek-V3 report, section 3.3.
    """
    check_options(scale, grad_format=grad_format, saved_format=saved_format)
    _check_operands(x, w, ends)
    if ends is not None and accumulator is not None:
        raise ValueError("an accumulator is emulated for one matrix, not with ends; multiply expert by expert")
    trained, weight = _weight_operand(w, scale)
    wants_dw = trained is not None and trained.requires_grad and torch.is_grad_enabled()
    q, saved = _operand(x, scale, saved_format if wants_dw else "e4m3")
    recipe = Recipe(
        q.scale,
        weight.shape[-1],
        weight.tile,
        weight.scale,
        weight.format,
        grad_format,
        saved.format,
        out_dtype or x.dtype,
        accumulator,
        ops.chosen(),
    )
    kept = (None, None) if saved is q else saved.parts  # torch.compile wants no tensor twice
    y = _Matmul.apply(q.source, trained, *q.parts, *kept, *weight.parts, ends, recipe)
    return cast(Tensor, y)


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
    recipe = Recipe(scale, *of_weight, grad_format, "e4m3", up.dtype, None, ops.chosen())
    return cast(Tensor, _SwiGLUMatmul.apply(gate, up, weights, trained, *weight.parts, ends, recipe, limit))


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


class _Matmul(torch.autograd.Function):
    """The product of codes x [*batch, k], which `saved` replaces for backward, and of the codes of W."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor | None,
        w: Tensor | None,
        codes: Tensor,
        scales: Tensor,
        saved_codes: Tensor | None,
        saved_scales: Tensor | None,
        w_codes: Tensor,
        w_scales: Tensor,
        ends: Tensor | None,
        recipe: Recipe,
    ) -> Tensor:
        saved = (codes, scales) if saved_codes is None else (saved_codes, saved_scales)
        ctx.save_for_backward(*saved, w_codes, w_scales, ends)
        ctx.recipe, ctx.dtypes = recipe, (None if source is None else source.dtype, None if w is None else w.dtype)
        x = dequantize_tiles(_rows(codes), _rows(scales), ACTIVATION_TILE, "e4m3", recipe.operands)
        y = fp8_fprop(x, recipe.weight(w_codes, w_scales), ends, recipe)
        return y.view(*codes.shape[:-1], y.shape[-1])

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codes, scales, *weight = ctx.saved_tensors
        recipe: Recipe = ctx.recipe

        def saved() -> Tensor:
            tiles = (_rows(codes), _rows(scales), ACTIVATION_TILE, recipe.saved_format)
            return dequantize_tiles(*tiles, recipe.operands, recipe.k)

        with ops.use(recipe.backend):
            dx, dw = _gradients(ctx, grad, ctx.needs_input_grad[:2], saved, *weight)
        return None if dx is None else dx.view(*grad.shape[:-1], recipe.k).to(ctx.dtypes[0]), dw, *[None] * 8


class _SwiGLUMatmul(torch.autograd.Function):
    """The product of swiglu(gate, up), both [*batch, k], and of the codes of W."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weights: Tensor | None,
        w: Tensor | None,
        w_codes: Tensor,
        w_scales: Tensor,
        ends: Tensor | None,
        recipe: Recipe,
        limit: float | None,
    ) -> Tensor:
        if any(ctx.needs_input_grad):
            kept = [quantize_tiles(_rows(t), ACTIVATION_TILE, recipe.scale, "e4m3", AMAX_MIN) for t in (gate, up)]
            ctx.save_for_backward(*kept[0], *kept[1], weights, w_codes, w_scales, ends)
        ctx.recipe, ctx.limit, ctx.dtypes = recipe, limit, (gate.dtype, None if w is None else w.dtype)
        hidden = swiglu(_rows(gate), _rows(up), limit, None if weights is None else _rows(weights))
        x = round_tiles(hidden, ACTIVATION_TILE, recipe.scale, "e4m3", AMAX_MIN, recipe.operands)
        y = fp8_fprop(x, recipe.weight(w_codes, w_scales), ends, recipe)
        return y.view(*gate.shape[:-1], y.shape[-1])

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *kept, weights, w_codes, w_scales, ends = ctx.saved_tensors
        recipe, wanted = ctx.recipe, (any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3])
        weights = None if weights is None else _rows(weights)
        with ops.use(recipe.backend):
            gate, up = (
                dequantize_tiles(kept[i], kept[i + 1], ACTIVATION_TILE, "e4m3", recipe.out_dtype, recipe.k)
                for i in (0, 2)
            )
            hidden = lambda: swiglu(gate, up, ctx.limit, weights)  # noqa: E731
            dh, dw = _gradients(ctx, grad, wanted, hidden, w_codes, w_scales, ends)
            d_weights = None
            if dh is not None and weights is not None:
                d_weights = (dh * swiglu(gate, up, ctx.limit)).sum(-1, dtype=weights.dtype).view(*grad.shape[:-1], 1)
                dh = (dh * weights).to(dh.dtype)
            grads = [None, None] if dh is None else swiglu_gradients(dh, gate, up, ctx.limit)
        shape = (*grad.shape[:-1], recipe.k)
        of_inputs = (None if g is None else g.view(shape).to(ctx.dtypes[0]) for g in grads)
        return *of_inputs, d_weights, dw, *[None] * 5


def _gradients(
    ctx: Any,
    grad: Tensor,
    wanted: Sequence[bool],
    x: Callable[[], Tensor],
    w_codes: Tensor,
    w_scales: Tensor,
    ends: Tensor | None,
) -> tuple[Float[Tensor, "rows k"] | None, Float[Tensor, "*e o k"] | None]:
    """Return the gradients of the rows that W multiplies, and of W, where they are wanted.

    Args:
        x: makes the rows, for W's gradient alone.
    """
    dy, recipe = _rows(grad), ctx.recipe
    dx = fp8_dgrad(dy, recipe.weight(w_codes, w_scales), ends, recipe) if wanted[0] else None
    return dx, fp8_wgrad(dy, x(), ends, recipe).to(ctx.dtypes[1]) if wanted[1] else None


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
