"""Matrix products: one matrix, and one matrix for each expert."""

from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.nn.fp8 import FP8Module, untrainable


class Linear(FP8Module):
    """y = x W^T without a bias. The product runs in x's dtype, whatever dtype the weight is stored in.

    A weight held in FP8 is dequantised to x's dtype when it is used.
    """

    scale_names = MappingProxyType({"weight": "scale"})
    scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, init_std: float = 0.02, precision: Literal["native"] = "native"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("scale", None)
        self.precision, self.init_std = precision, init_std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        if self.scale is None:
            return F.linear(x, self.weight.to(x.dtype))
        return F.linear(untrainable(x), self.dense(x.dtype))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """The whole weight in that dtype."""
        return self.dequantized("weight", dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def grouped_linear(
    x: Float[Tensor, "rows i"], weight: Float[Tensor, "e o i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "rows o"]:
    """x_j W_j^T for each group of rows, in one grouped product where torch has one for this case, else one by one.

    Args:
        ends: the row after each group's last; the last of them is the number of rows. Groups may be empty.
    """
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return _outside_the_graph(x, weight, ends)  # pyright: ignore[reportCallIssue]
    weight = weight.to(x.dtype)
    if _grouped_mm_serves(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends.int())
    return grouped_linear_by_expert(x, weight, ends)


@torch.compiler.disable
def _outside_the_graph(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch cannot trace grouped_mm in FP32, nor products whose sizes are data: eager between two compiled graphs."""
    return grouped_linear(x, weight, ends)


def grouped_linear_by_expert(
    x: Float[Tensor, "rows i"], weight: Float[Tensor, "e o i"], ends: Int[Tensor, " e"]
) -> Float[Tensor, "rows o"]:
    """grouped_linear as a loop over the experts: any dtype, any stride. Waits for the device to tell the sizes."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), weight.unbind(0), strict=True)])


def _grouped_mm_serves(x: Tensor, weight: Tensor) -> bool:
    """grouped_mm wants 16-byte strides and BF16, on a CPU also FP32; it has no FP64."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    kinds = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}.get(x.device.type, ())
    return aligned and x.dtype in kinds and hasattr(F, "grouped_mm")
