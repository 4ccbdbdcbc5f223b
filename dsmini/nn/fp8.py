"""Modules whose matrices may be held in FP8: E4M3 codes with an FP32 scale for each 128x128 block."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from dsmini.numerics import WEIGHT_TILE, QuantizedTensor, dequantize_tiles, quantize

Precision = Literal["native", "fp8"]
"""Of matrix products: in the compute dtype, or in simulated FP8."""


class FP8Module(nn.Module):
    """Base of Linear and Experts. A parameter is an ordinary one until hold_fp8 puts codes in its place.

    Codes and scales keep their dtypes under `.to(torch.bfloat16)`, which would make numbers of the codes and lose the
    scales; moves between devices work as usual. Codes are read only: they have no gradient, and a module that
    holds some refuses to be trained.
    """

    scale_names: ClassVar[Mapping[str, str]]
    """For each parameter that may be FP8 the buffer of its scales, which is None until then."""
    precision: Precision = "native"

    def hold_fp8(self, name: str, codes: Tensor, scales: Tensor) -> None:
        """Let the parameter `name` be these E4M3 codes, with FP32 scales of its last two dimensions' blocks."""
        setattr(self, name, nn.Parameter(codes, requires_grad=False))
        setattr(self, self.scale_names[name], scales)

    @property
    def holds_fp8(self) -> bool:
        return any(getattr(self, name) is not None for name in self.scale_names.values())

    def dequantized(self, name: str, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """The parameter `name` in that dtype, of a stacked one the matrix `index`: dequantised if it is held in FP8,
        rounded to FP8 with precision "fp8"."""
        weight, scales = self._stored(name, index)
        if scales is not None:
            return dequantize_tiles(weight, scales, WEIGHT_TILE, "e4m3", dtype)
        return quantize(weight, WEIGHT_TILE).dequantize(dtype) if self.precision == "fp8" else weight.to(dtype)

    def operand(self, name: str, index: int | None = None) -> Tensor | QuantizedTensor:
        """The parameter `name`, of a stacked one the matrix `index`, for an FP8 product: itself, or its codes."""
        weight, scales = self._stored(name, index)
        if scales is None:
            return weight
        return QuantizedTensor(
            codes=weight,
            scales=scales.float(),
            shape=weight.shape,
            tile=WEIGHT_TILE,
            scale="fp32",
            format="e4m3",
            dtype=torch.float32,
        )

    def _stored(self, name: str, index: int | None) -> tuple[Tensor, Tensor | None]:
        weight, scales = self._parameters[name], self._buffers[self.scale_names[name]]  # faster than getattr
        assert weight is not None
        if index is None:
            return weight, scales
        return weight[index], None if scales is None else scales[index]

    def train(self, mode: bool = True) -> "FP8Module":
        if mode and self.holds_fp8:
            raise ValueError(REFUSAL)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FP8Module":
        scales = {id(getattr(self, name)) for name in self.scale_names.values()}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float8_e4m3fn:
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)  # whole numbers are moved, never cast
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in scales and out.dtype != tensor.dtype else out

        return super()._apply(keep, recurse)


REFUSAL = "FP8 weights are codes that no gradient can move; load the model with fp8='dequantize' to train it"


class _Untrainable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError(REFUSAL)


Operand = TypeVar("Operand", bound=Tensor | QuantizedTensor)


def untrainable(x: Operand) -> Operand:
    """x, whose gradient is refused with the reason."""
    if isinstance(x, QuantizedTensor):
        refused: Any = x if x.source is None else replace(x, source=untrainable(x.source))
    else:
        refused = _Untrainable.apply(x) if x.requires_grad and torch.is_grad_enabled() else x
    return refused
