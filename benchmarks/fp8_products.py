"""Products of a training step, and their errors in FP8.

A Linear y = x w^T takes part in three matrix products. FP8 training rounds the operands of each:

    fprop  y  = x  w^T     x in tiles of a row and 128 columns, w in blocks of 128 x 128
    dgrad  dx = dy w       dy in tiles of a row and 128 columns
    wgrad  dw = dy^T x     both in tiles of 128 rows and a column, because the sum runs over tokens

`capture` collects x, w and dy of every Linear and expert in one step without rounding. `rounded_products` multiplies
them as FP8 training would. Simulated: rounded values are multiplied and summed in FP32. Simplified: the input of w2 is
rounded itself, not its two factors.

Source: DeepSeek-V3 report, section 3.3.
"""

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

from dsmini import Experts, Transformer
from dsmini.nn import Projection
from dsmini.nn.fp8 import FP8Linear, fp8_weights
from dsmini.numerics import (
    ACTIVATION_TILE,
    AMAX_MIN,
    SMALLEST_AMAX,
    TOKEN_TILE,
    WEIGHT_TILE,
    Format,
    round_tiles,
)
from dsmini.numerics.tiles import FormatName, Scale, Tile

PRODUCTS = ("fprop", "dgrad", "wgrad")


def operand_error(format: Format) -> float:
    """Return the expected relative error (RMS) of rounding to a format, within its normal numbers.

    A value with fraction f, 1 <= f < 2, has a uniform error of at most half a step of 2^-m. Its relative RMS error is
    2^-m / sqrt(12) / f. With arbitrary scales log f is uniform, and the mean of 1 / f^2 is 3 / (8 ln 2).
    """
    return 2.0**-format.mantissa_bits / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))


def product_error(a: Format, b: Format) -> float:
    """Return the expected relative error of a product of two rounded matrices.

    It does not depend on the length of the sums: with terms of either sign, errors add up as the terms do.
    """
    return math.hypot(operand_error(a), operand_error(b))


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """Product y = x w^T of a training step, in FP32: x [n, k], w [o, k], and the gradient dy [n, o]."""

    block: str
    linear: str
    x: Tensor
    w: Tensor
    dy: Tensor
    saved_format: FormatName = "e4m3"
    """Format in which x is saved for wgrad."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """Way to round operands."""

    scale: Scale = "ue8m0"
    grad_format: FormatName = "e4m3"
    tiles: bool = True
    """True: a scale for each tile. False: one for the whole matrix."""

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
"""DeepSeek-V3's way to round, and alternatives."""


def exact_products(g: Gemm) -> dict[str, Tensor]:
    """Compute fprop, dgrad and wgrad without rounding."""
    return {"fprop": g.x @ g.w.T, "dgrad": g.dy @ g.w, "wgrad": g.dy.T @ g.x}


def rounded_products(g: Gemm, way: Way) -> dict[str, Tensor]:
    """Compute fprop, dgrad and wgrad of rounded operands, multiplied and summed in FP32."""
    x, w = way.round(g.x, ACTIVATION_TILE), way.round(g.w, WEIGHT_TILE)
    if g.saved_format == "e4m3":
        saved = x
    else:  # its scales are always powers of two
        saved = dataclasses.replace(way, scale="ue8m0").round(g.x, ACTIVATION_TILE, g.saved_format)
    dy, dy_by_token = way.gradient(g.dy, ACTIVATION_TILE), way.gradient(g.dy, TOKEN_TILE)
    return {"fprop": x @ w.T, "dgrad": dy @ w, "wgrad": dy_by_token.T @ way.round(saved, TOKEN_TILE)}


def capture(model: Transformer, tokens: Tensor, targets: Tensor) -> list[Gemm]:
    """Return every product that precision "fp8" rounds, in one step of a native model.

    Hooks catch the matrices of Linears. Experts expose no activations between their matrices, so these are computed
    again for each expert.
    """
    seen: dict[str, tuple[Any, ...]] = {}
    grads: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[name] = tuple(t.detach() for t in inputs)
        output.register_hook(lambda grad: grads.__setitem__(name, grad.detach()))

    modules = {name.rsplit(".", 1)[0]: module for name, module in fp8_weights(model).items()}
    with torch.device("meta"):
        rounding = Transformer(dataclasses.replace(model.config, precision="fp8"))
    formats = {name: m.saved_format for name, m in rounding.named_modules() if isinstance(m, FP8Linear)}
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


@torch.no_grad()
def _gemms(
    name: str, module: nn.Module, saved_format: FormatName, inputs: tuple[Any, ...], grad: Tensor
) -> Iterator[Gemm]:
    block, _, linear = name.partition(".attn." if ".attn." in name else ".ffn")
    number = int(block.split(".")[1])
    block = f"MTP {number + 1}" if block.startswith("mtp") else f"block {number}"
    linear = linear.strip(".").replace("shared_experts", "shared")
    if isinstance(module, Projection):
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


Shares = dict[tuple[str, ...], Tensor]
"""Sums of a part and of the whole, by key."""


@torch.no_grad()
def losses(gemms: Iterable[Gemm]) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
    """Compute the errors of the products of a step with each of WAYS.

    Returns:
        The relative error of the result by way, block, linear and product; experts of a block count together.
        The share of the values that become zero by way, linear and operand; all blocks count together.
    """
    errors: Shares = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    underflow: Shares = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    for g in gemms:
        exact = exact_products(g)
        operands = {  # each rounded matrix, its tile and its least amax
            "input": (g.x, ACTIVATION_TILE, AMAX_MIN),
            "weight": (g.w, WEIGHT_TILE, AMAX_MIN),
            "gradient": (g.dy, ACTIVATION_TILE, SMALLEST_AMAX),
            "gradient by token": (g.dy, TOKEN_TILE, SMALLEST_AMAX),
        }
        for name, way in WAYS.items():
            for product, y in rounded_products(g, way).items():
                off = (y - exact[product]).square().sum(), exact[product].square().sum()
                errors[name, g.block, g.linear, product] += torch.stack(off).cpu()
            for operand, (t, tile, amax_min) in operands.items() if name in ("tiles", "one scale") else ():
                zeros = ((way.round(t, tile, "e4m3", amax_min) == 0) & (t != 0)).sum(), (t != 0).sum()
                underflow[name, g.linear, operand] += torch.stack(zeros).cpu()
    return {key: math.sqrt(_share(sums)) for key, sums in errors.items()}, {k: _share(s) for k, s in underflow.items()}


def _share(sums: Tensor) -> float:
    part, whole = sums.tolist()
    return part / whole if whole else 0.0
