"""Root mean square normalisation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
