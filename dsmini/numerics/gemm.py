"""Multiply matrices in the FP8 of DeepSeek-V3, simulated: forward, input gradient and weight gradient.

For y = x W^T with x [n, k] and W [o, k], all operands are E4M3 with a scale for every tile (report, figure 6). The
three products are in fp8_products.py. wgrad takes dy from its own values and x from the codes that forward saved; with
power-of-two scales normal numbers lose nothing.

Tensors for backward are saved as FP8 codes and scales: W, and x once, however many products read it.

Simulated: with power-of-two scales a dequantized E4M3 value is a BF16 value. So a BF16 product of the dequantized
operands, which sums in FP32, is the FP8 product, except for the order of its sums and the rounding of its result. With
FP32 scales, or results other than BF16, an FP32 product runs. The weight's gradient is rounded to the result's dtype
before it is added to that of an FP32 parameter.

An infinity or NaN makes NaN of its whole tile, and of the results that the tile takes part in.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsmini import ops
from dsmini.numerics.accumulation import Accumulator
from dsmini.numerics.fp8_products import Recipe, fp8_dgrad, fp8_fprop, fp8_swiglu_fprop, fp8_wgrad
from dsmini.numerics.quantization import (
    ACTIVATION_TILE,
    AMAX_MIN,
    WEIGHT_TILE,
    QuantizedTensor,
    check_options,
    check_source,
    quantize,
)
from dsmini.numerics.tiles import FormatName, Scale, dequantize_tiles, quantize_tiles


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
        w: of the same kinds; a quantized weight has no gradient.
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
    check_options(scale, AMAX_MIN, grad_format=grad_format, saved_format=saved_format)
    _check_operands(x, w, ends)
    if not isinstance(accumulator, Accumulator | None):
        raise ValueError(f"accumulator={accumulator!r}; want dsmini.Accumulator(bits=14, promote_every=128) or None")
    if ends is not None and accumulator is not None:
        raise ValueError("an accumulator is emulated for one matrix, not with ends; multiply expert by expert")
    q, saved = _operand(x, scale, saved_format)
    trained, weight = _weight_operand(w, scale)
    recipe = Recipe(q.scale, weight.scale, grad_format, saved.format, _result(x, out_dtype), accumulator, ops.chosen())
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
) -> Float[Tensor, "*batch o"]:
    """Compute fp8_matmul(silu(gate) * up, w); save gate and up as FP8, and compute the rest again in backward.

    Forward uses gate and up as they are. Backward uses the saved FP8 values, also for the derivative of silu.

    Source: DeepSeek-V3 report, section 3.3.3.
    """
    check_options(scale, AMAX_MIN, grad_format=grad_format)
    for x, name in ((gate, "gate"), (up, "up")):
        check_source(x, name)
    _check_operands(up, w, ends)
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        got = ", ".join(f"{n} is {t.dtype} {list(t.shape)} on {t.device}" for t, n in ((gate, "gate"), (up, "up")))
        raise ValueError(f"{got}; want them alike")
    trained, weight = _weight_operand(w, scale)
    recipe = Recipe(scale, weight.scale, grad_format, "e4m3", _result(up, None), None, ops.chosen())
    return cast(Tensor, _SwiGLUMatmul.apply(gate, up, trained, *weight.parts, ends, recipe))


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
        ctx.recipe, ctx.k = recipe, codes.shape[-1]
        ctx.dtypes = None if source is None else source.dtype, None if w is None else w.dtype
        y = fp8_fprop(_rows(codes), _rows(scales), w_codes, w_scales, ends, recipe)
        return y.view(*codes.shape[:-1], y.shape[-1])

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved_codes, saved_scales, w_codes, w_scales, ends = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dx = dw = None
        with ops.use(recipe.backend):
            dy = _rows(grad)
            if ctx.needs_input_grad[0]:
                dx = fp8_dgrad(dy, w_codes, w_scales, ends, recipe)
                dx = dx.view(*grad.shape[:-1], dx.shape[-1]).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                dw = fp8_wgrad(dy, _rows(saved_codes), _rows(saved_scales), ctx.k, ends, recipe).to(ctx.dtypes[1])
        return dx, dw, *[None] * 8


class _SwiGLUMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        w: Tensor | None,
        w_codes: Tensor,
        w_scales: Tensor,
        ends: Tensor | None,
        recipe: Recipe,
    ) -> Tensor:
        if any(ctx.needs_input_grad):
            kept = [quantize_tiles(_rows(t), ACTIVATION_TILE, recipe.scale, "e4m3", AMAX_MIN) for t in (gate, up)]
            ctx.save_for_backward(*kept[0], *kept[1], w_codes, w_scales, ends)
        ctx.recipe, ctx.dtypes = recipe, (gate.dtype, None if w is None else w.dtype)
        y = fp8_swiglu_fprop(_rows(gate), _rows(up), w_codes, w_scales, ends, recipe)
        return y.view(*gate.shape[:-1], y.shape[-1])

    @staticmethod
    @ops.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *kept, w_codes, w_scales, ends = ctx.saved_tensors
        recipe: Recipe = ctx.recipe
        dgate = dup = dw = None
        with ops.use(recipe.backend):
            dy = _rows(grad)
            k = w_codes.shape[-1]
            gate, up = (
                dequantize_tiles(kept[i], kept[i + 1], ACTIVATION_TILE, "e4m3", recipe.out_dtype, k) for i in (0, 2)
            )
            activated = F.silu(gate)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                dh = fp8_dgrad(dy, w_codes, w_scales, ends, recipe)
                dgate = torch.ops.aten.silu_backward(dh * up, gate).view(*grad.shape[:-1], k).to(ctx.dtypes[0])
                dup = (dh * activated).view(*grad.shape[:-1], k).to(ctx.dtypes[0])
            if ctx.needs_input_grad[2]:
                dw = fp8_wgrad(dy, activated.mul_(up), None, k, ends, recipe).to(ctx.dtypes[1])
        return dgate, dup, dw, *[None] * 4


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _result(x: Tensor | QuantizedTensor, out_dtype: torch.dtype | None) -> torch.dtype:
    out = x.dtype if out_dtype is None else out_dtype
    if out not in (torch.bfloat16, torch.float32, torch.float16):
        raise ValueError(f"out_dtype={out}; use torch.bfloat16, torch.float32 or torch.float16")
    return out


def _check_operands(x: Tensor | QuantizedTensor, w: Tensor | QuantizedTensor, ends: Tensor | None) -> None:
    for value, name in ((x, "x"), (w, "w")):
        if not isinstance(value, QuantizedTensor):
            check_source(value, name)
    if isinstance(x, QuantizedTensor) and x.tile != ACTIVATION_TILE:
        got = f"x is quantized in tiles of {x.tile[0]}x{x.tile[1]}"
        raise ValueError(f"{got}; want 1x128, along the contraction: quantize(x, tile=(1, 128))")
    if isinstance(w, QuantizedTensor) and (w.tile != WEIGHT_TILE or w.format != "e4m3"):
        got = f"w is quantized in {w.format} tiles of {w.tile[0]}x{w.tile[1]}"
        raise ValueError(f"{got}; want e4m3 blocks of 128x128: quantize(w, tile=(128, 128))")
    grouped = ends is not None
    if len(w.shape) != 2 + grouped or (grouped and (len(x.shape) != 2 or ends.shape != w.shape[:1])):
        raise ValueError(
            f"x is {list(x.shape)}, w {list(w.shape)}, ends {None if ends is None else list(ends.shape)}; "
            "want x [..., k] and w [o, k], or, with ends [e], x [rows, k] and w [e, o, k]"
        )
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x is {x.shape[-1]} wide and w {w.shape[-1]}; both are summed over and must be equal")
    for other, name in ((w, "w"), (ends, "ends")):
        if other is not None and x.device != other.device:
            raise ValueError(f"x is on {x.device} and {name} on {other.device}; move one of them")
    if ops.is_transformed():
        raise ValueError("FP8 products do not work inside torch.func; use backward(), or a model without FP8")
    if ends is not None and ops.can_read_values(ends):
        cuts = [0, *ends.tolist()]
        if ends.is_floating_point() or cuts != sorted(cuts) or cuts[-1] != x.shape[0]:
            raise ValueError(
                f"ends={cuts[1:]} do not cut {x.shape[0]} rows; want rising integers, the last {x.shape[0]}"
            )
