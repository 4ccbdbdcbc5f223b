"""Root mean square normalisation, and layer normalisation for the indexer's key."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.functional.fp32 import at_least_fp32
from dsmini.functional.rms_norm import rms_norm
from dsmini.nn.fp32 import FP32Module


class RMSNorm(FP32Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in FP32, returned in x's dtype.

    Source: Zhang and Sennrich 2019; DeepSeek-V3 adds one after each compressed latent (report, section 4.2).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the weight to 1; nothing is drawn."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(FP32Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, computed in FP32, returned in x's dtype.

    Source: Ba et al. 2016; DeepSeek-V3.2 has it on the indexer's key alone.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the weight to 1 and the bias to 0; nothing is drawn."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        y = at_least_fp32(x)
        weight, bias = self.weight.to(y.dtype), self.bias.to(y.dtype)
        return F.layer_norm(y, weight.shape, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
