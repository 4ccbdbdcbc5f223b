"""y = x W^T, in the compute dtype or in simulated FP8."""

from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.nn.fp8 import FP8Module, Precision, untrainable
from dsmini.numerics import QuantizedTensor, fp8_matmul


class Linear(FP8Module):
    """y = x W^T without a bias. The product runs in x's dtype, whatever dtype the weight is stored in.

    With precision "fp8" it is the simulated FP8 product with its gradients, fp8_matmul, and x may be quantised already,
    for several Linears that read it. What backward needs of x is kept in `saved_format`. A weight held in FP8 is
    dequantised to x's dtype when it is used, or with precision "fp8" multiplied as it is.
    """

    scale_names = MappingProxyType({"weight": "scale"})
    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_std: float = 0.02,
        precision: Precision = "native",
        saved_format: Literal["e4m3", "e5m6"] = "e4m3",
    ) -> None:
        super().__init__()
        if precision not in ("native", "fp8"):
            raise ValueError(f"precision={precision!r} is unknown; use 'native' or 'fp8'")
        if saved_format not in ("e4m3", "e5m6"):
            raise ValueError(f"saved_format={saved_format!r} is unknown; use 'e4m3' or 'e5m6'")
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("scale", None)
        self.precision, self.init_std = precision, init_std
        self.saved_format: Literal["e4m3", "e5m6"] = saved_format
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, x: Float[Tensor, "*batch i"] | QuantizedTensor) -> Float[Tensor, "*batch o"]:
        if self.precision == "fp8":
            x = untrainable(x) if self.holds_fp8 else x
            return fp8_matmul(x, self.operand("weight"), saved_format=self.saved_format)
        if isinstance(x, QuantizedTensor):
            raise ValueError("a quantised input for a Linear of precision='native'; use precision='fp8'")
        if self.scale is None:
            return F.linear(x, self.weight.to(x.dtype))
        return F.linear(untrainable(x), self.dense(x.dtype))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """The whole weight in that dtype; with precision "fp8" as the products see it."""
        return self.dequantized("weight", dtype)

    def extra_repr(self) -> str:
        fp8 = ", precision='fp8'" if self.precision == "fp8" else ""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}{fp8}"
