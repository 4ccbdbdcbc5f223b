"""Losses to FP8: the error of weights that are held in it, and of the products of a training step.

A Linear y = x w^T takes part in three matrix products, and FP8 training rounds the operands of each:

    fprop  y  = x  w^T     x in tiles of a row and 128 columns, w in blocks of 128 x 128
    dgrad  dx = dy w       dy in tiles of a row and 128 columns
    wgrad  dw = dy^T x     both in tiles of 128 rows and a column, the other way round: the sum runs over tokens

`capture` catches x, w and dy of every Linear and expert in one step of a model that rounds nothing; `rounded_products`
multiplies them as FP8 training would; `losses` compares. Simulated: rounded values are multiplied and summed in FP32.
Simplified: the input of w2 is rounded itself, not its two factors.

Source: DeepSeek-V3 report, section 3.3.
"""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmini.checkpoint.slots import fp8_weights
from dsmini.nn import Experts, Linear, Transformer
from dsmini.nn.fp8 import FP8Linear, hold_fp8
from dsmini.numerics import (
    ACTIVATION_TILE,
    AMAX_MIN,
    E4M3,
    SMALLEST_AMAX,
    TOKEN_TILE,
    WEIGHT_TILE,
    Format,
    dequantize_tiles,
    quantize,
    round_tiles,
    tile_scales,
)
from dsmini.numerics.tiles import FormatName, Scale, Tile

PRODUCTS = ("fprop", "dgrad", "wgrad")


def operand_error(format: Format) -> float:
    """Return the expected relative error (RMS) of rounding to a format, within its normal numbers.

    A value with fraction f, 1 <= f < 2, is off by at most half a step of 2^-m, uniformly, so by 2^-m / sqrt(12) / f of
    itself. Where scales are arbitrary, fractions are spread evenly by logarithm: the mean of 1 / f^2 is 3 / (8 ln 2).
    """
    return 2.0**-format.mantissa_bits / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))


def product_error(a: Format, b: Format) -> float:
    """Return the expected relative error of a product of two rounded matrices, however long its sums are.

    Where terms have either sign, their errors add up as the terms do.
    """
    return math.hypot(operand_error(a), operand_error(b))


@torch.no_grad()
def hold_in_fp8(model: Transformer) -> tuple[Transformer, float]:
    """Return a copy of a model that holds the matrices that DeepSeek has in FP8 so, and their relative error together.

    Held are E4M3 codes and an FP32 scale for each 128 x 128 block. The error is the norm of what is off over the norm.
    """
    held = copy.deepcopy(model)
    off = size = 0.0
    for module, name in fp8_weights(held).values():
        weight = getattr(module, name).detach()
        q = quantize(weight, WEIGHT_TILE, "fp32")
        # one expert after the other: a block lies in one matrix
        stacks = [t if t.dim() == 3 else t[None] for t in (weight, q.codes, q.scales)]
        for w, codes, scales in zip(*stacks, strict=True):
            off += (dequantize_tiles(codes, scales, WEIGHT_TILE) - w.float()).square().sum().item()
            size += w.float().square().sum().item()
        hold_fp8(module, name, q.codes, q.scales)
    return held, (off / size) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """y = x w^T of a training step, in FP32: x [n, k], w [o, k], and the gradient dy [n, o]."""

    block: str
    linear: str
    x: Tensor
    w: Tensor
    dy: Tensor
    saved_format: FormatName = "e4m3"
    """Format in which x is saved for wgrad."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to round operands."""

    scale: Scale = "ue8m0"
    grad_format: FormatName = "e4m3"
    tiles: bool = True
    """A scale for each tile, or one for the whole matrix."""

    def round(self, t: Tensor, tile: Tile, format: FormatName = "e4m3", amax_min: float = AMAX_MIN) -> Tensor:
        tile = tile if self.tiles else (t.shape[0], t.shape[1])
        return round_tiles(t, tile, self.scale, format, amax_min, torch.float32)

    def gradient(self, dy: Tensor, tile: Tile) -> Tensor:
        return self.round(dy, tile, self.grad_format, SMALLEST_AMAX)


WAYS = {
    "tiles": Way(),
    "one scale": Way(tiles=False),
    "e5m2 gradients": Way(grad_format="e5m2"),
    "fp32 scales": Way(scale="fp32"),
}
"""DeepSeek-V3's way, and what one would do instead."""


def exact_products(g: Gemm) -> dict[str, Tensor]:
    """Compute fprop, dgrad and wgrad of what was not rounded."""
    return {"fprop": g.x @ g.w.T, "dgrad": g.dy @ g.w, "wgrad": g.dy.T @ g.x}


def rounded_products(g: Gemm, way: Way) -> dict[str, Tensor]:
    """Compute fprop, dgrad and wgrad of rounded operands, multiplied and summed in FP32."""
    x, w = way.round(g.x, ACTIVATION_TILE), way.round(g.w, WEIGHT_TILE)
    if g.saved_format == "e4m3":
        kept = x
    else:  # scales are powers of two then, whatever the others
        kept = dataclasses.replace(way, scale="ue8m0").round(g.x, ACTIVATION_TILE, g.saved_format)
    dy, dy_by_token = way.gradient(g.dy, ACTIVATION_TILE), way.gradient(g.dy, TOKEN_TILE)
    return {"fprop": x @ w.T, "dgrad": dy @ w, "wgrad": dy_by_token.T @ way.round(kept, TOKEN_TILE)}


def capture(model: Transformer, tokens: Tensor, targets: Tensor) -> list[Gemm]:
    """Return every product that precision "fp8" rounds, in one step of a native model.

    Hooks catch the matrices of Linears. Experts hide what lies between their matrices, so theirs are computed again,
    one expert after the other.
    """
    seen: dict[str, tuple[Any, ...]] = {}
    grads: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[name] = tuple(t.detach() for t in inputs)
        output.register_hook(lambda grad: grads.__setitem__(name, grad.detach()))

    modules = {name.rsplit(".", 1)[0]: module for name, (module, _) in fp8_weights(model).items()}
    formats = _saved_formats(model)
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in modules.items()]
    model.losses(tokens, targets).total.backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return [
        gemm
        for name, module in modules.items()
        for gemm in _gemms(name, module, formats.get(name, "e4m3"), seen[name], grads[name])
    ]


def _saved_formats(model: Transformer) -> dict[str, FormatName]:
    """Return the format in which FP8 training would save the input of each Linear, by the Linear's name."""
    with torch.device("meta"):
        twin = Transformer(dataclasses.replace(model.config, precision="fp8"))
    return {name: module.saved_format for name, module in twin.named_modules() if isinstance(module, FP8Linear)}


@torch.no_grad()
def _gemms(
    name: str, module: nn.Module, saved_format: FormatName, inputs: tuple[Any, ...], grad: Tensor
) -> Iterator[Gemm]:
    block, _, linear = name.partition(".attn.") if ".attn." in name else name.partition(".ffn")
    block, linear = _block(block), linear.strip(".").replace("shared_experts", "shared")
    if isinstance(module, Linear):
        x, dy = (t.float().flatten(0, -2) for t in (inputs[0], grad))
        yield Gemm(block=block, linear=linear, x=x, w=module.weight.detach(), dy=dy, saved_format=saved_format)
        return
    assert isinstance(module, Experts)
    rows, indices, weights, _ = inputs
    for j, (w1, w2, w3) in enumerate(zip(module.w1, module.w2, module.w3, strict=True)):
        token, choice = (indices == j).nonzero(as_tuple=True)
        if not len(token):
            continue
        x, dy = rows[token].float(), grad[token].float() * weights[token, choice, None]
        gate, up = x @ w1.T, x @ w3.T
        dh = dy @ w2
        yield Gemm(block=block, linear="experts.w2", x=F.silu(gate) * up, w=w2.detach(), dy=dy)
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
        yield Gemm(block=block, linear="experts.w1", x=x, w=w1.detach(), dy=dgate)
        yield Gemm(block=block, linear="experts.w3", x=x, w=w3.detach(), dy=dh * F.silu(gate))


def _block(path: str) -> str:
    """Name a block for people: layers.2 is block 2, mtp.0.block is MTP 1."""
    number = int(path.split(".")[1])
    return f"MTP {number + 1}" if path.startswith("mtp") else f"block {number}"


@dataclass(frozen=True, kw_only=True)
class RoundingLosses:
    """Losses of the products of a step to rounding."""

    errors: dict[tuple[str, str, str, str], float]
    """Relative error of the result by way, block, linear and product; the experts of a block together."""
    underflow: dict[tuple[str, str, str], float]
    """Share of the values that become zero by way, linear and operand; all blocks together."""
    clamped: dict[str, int]
    """Number of values beyond the largest code by operand."""


@torch.no_grad()
def losses(gemms: Iterable[Gemm]) -> RoundingLosses:
    """Compute the losses of the products of a step, in every way of WAYS."""
    # two sums each, of a part and of the whole
    errors: dict[tuple[str, str, str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    underflow: dict[tuple[str, str, str], Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    clamped: dict[str, int] = defaultdict(int)
    for g in gemms:
        exact = exact_products(g)
        for name, way in WAYS.items():
            for product, y in rounded_products(g, way).items():
                off = (y - exact[product]).square().sum(), exact[product].square().sum()
                errors[name, g.block, g.linear, product] += torch.stack(off).cpu()
        for operand, (t, tile, amax_min) in _operands(g).items():
            for name in ("tiles", "one scale"):
                r = WAYS[name].round(t, tile, "e4m3", amax_min)
                zeros = ((r == 0) & (t != 0)).sum(), (t != 0).sum()
                underflow[name, g.linear, operand] += torch.stack(zeros).cpu()
            clamped[operand] += _clamped(t, tile, amax_min)
    return RoundingLosses(
        errors={key: math.sqrt(_share(sums)) for key, sums in errors.items()},
        underflow={key: _share(sums) for key, sums in underflow.items()},
        clamped=dict(clamped),
    )


def _share(sums: Tensor) -> float:
    part, whole = sums.tolist()
    return part / whole if whole else 0.0


def _operands(g: Gemm) -> dict[str, tuple[Tensor, Tile, float]]:
    """Return each matrix that is rounded, with its tile and its least amax; the gradient comes in both its tiles."""
    return {
        "input": (g.x, ACTIVATION_TILE, AMAX_MIN),
        "weight": (g.w, WEIGHT_TILE, AMAX_MIN),
        "gradient": (g.dy, ACTIVATION_TILE, SMALLEST_AMAX),
        "gradient by token": (g.dy, TOKEN_TILE, SMALLEST_AMAX),
    }


def _clamped(t: Tensor, tile: Tile, amax_min: float) -> int:
    """Count the values beyond E4M3's largest code."""
    scales = tile_scales(t, tile, "ue8m0", "e4m3", amax_min)
    spread_out = scales.repeat_interleave(tile[0], 0)[: t.shape[0]].repeat_interleave(tile[1], 1)[:, : t.shape[1]]
    return int((t.abs() > spread_out * E4M3.max).sum())
