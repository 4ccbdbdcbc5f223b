"""The routed experts of a layer, stacked."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.functional.experts import experts
from dsmini.nn.initialization import draw_normal


class Experts(nn.Module):
    """All routed experts of a layer: w1, w3 [e, f, m], w2 [e, m, f]; each is a SwiGLU. No token is dropped."""

    reads_codes = False
    """True if x may be quantized already."""

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        e, f, m = c.n_routed_experts, c.moe_inter_dim, c.dim
        self.w1 = nn.Parameter(torch.empty(e, f, m))
        self.w2 = nn.Parameter(torch.empty(e, m, f))
        self.w3 = nn.Parameter(torch.empty(e, f, m))
        self.init_std, self.output_init_std = c.init_std, c.output_init_std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights from a normal distribution."""
        for weight, std in ((self.w1, self.init_std), (self.w2, self.output_init_std), (self.w3, self.init_std)):
            draw_normal(weight, std, generator)

    def forward(
        self,
        x: Float[Tensor, "n m"],
        indices: Int[Tensor, "n k"],
        weights: Float[Tensor, "n k"],
        counts: Int[Tensor, " e"],
    ) -> Float[Tensor, "n m"]:
        """Return the sum of each token's chosen experts' outputs times their weights; `counts` as in Routing."""
        return experts(x, indices, weights, counts, self.w1, self.w2, self.w3)

    def extra_repr(self) -> str:
        e, f, m = self.w1.shape
        return f"{m}, {f}, {e} experts"

    def expert(self, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return w1, w2 and w3 of expert i in that dtype."""
        return self.w1[i].to(dtype), self.w2[i].to(dtype), self.w3[i].to(dtype)
