"""Root mean square normalisation."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.nn.fp32 import FP32Module, at_least_fp32


class RMSNorm(FP32Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in FP32, returned in x's dtype.

    Source: Zhang and Sennrich 2019; DeepSeek-V3 adds one after each compressed latent (report, section 4.2).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        y = at_least_fp32(x)
        return F.rms_norm(y, self.weight.shape, self.weight.to(y.dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
