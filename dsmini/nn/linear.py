"""y = x W^T, in the compute dtype. nn/fp8.py has the same in simulated FP8, and with a weight held in FP8."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.functional.linear import linear
from dsmini.functional.swiglu import swiglu
from dsmini.numerics import QuantizedTensor


class Linear(nn.Module):
    """y = x W^T without a bias. The product runs in x's dtype, whatever dtype the weight is stored in."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def prepare(self, x: Tensor | QuantizedTensor) -> Any:
        """Return an input that several Linears read in the form that they multiply: here as it is."""
        return x

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return linear(x, self.weight)

    def swiglu(self, gate: Float[Tensor, "*batch i"], up: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Return forward(silu(gate) * up)."""
        return self(swiglu(gate, up))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """Return the whole weight in that dtype, as the products see it."""
        return self.weight.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"
