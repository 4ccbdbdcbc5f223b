"""DeepSeekMoE: many small routed experts, of which a token visits a few, and shared experts that all tokens visit."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config
from dsmini.nn.fp8 import make_experts, make_linear
from dsmini.nn.gate import Gate, Routing
from dsmini.numerics import QuantizedTensor


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). The dense layers' feed-forward, and the shared experts."""

    def __init__(self, config: ModelConfig | None = None, /, inter_dim: int | None = None, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        hidden = c.inter_dim if inter_dim is None else inter_dim
        self.w1 = make_linear(c, c.dim, hidden)
        self.w2 = make_linear(c, hidden, c.dim, c.output_init_std)
        self.w3 = make_linear(c, c.dim, hidden)

    def forward(self, x: Float[Tensor, "*batch m"] | QuantizedTensor) -> Float[Tensor, "*batch m"]:
        x = self.w1.prepare(x)
        return self.w2.swiglu(self.w1(x), self.w3(x))


class MoE(nn.Module):
    """A DeepSeekMoE layer: the gate, its routed experts, and the shared experts. From a config or plain arguments.

    Source: DeepSeek-V3 report, section 2.1.2, equation 12.
    """

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        self.gate = Gate(c)
        self.experts = make_experts(c)
        shared = c.n_shared_experts * c.moe_inter_dim
        self.shared_experts = FeedForward(c, inter_dim=shared) if shared else None

    def forward(self, x: Float[Tensor, "*batch m"]) -> tuple[Float[Tensor, "*batch m"], Routing]:
        # 1. experts and their weights for each token: [n, k]
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        # 2. the routed experts' weighted sum, and the shared experts: [n, m]
        tokens = self.experts.prepare(tokens)
        y = self.experts(tokens, routing.indices, routing.weights, routing.counts)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.view(x.shape), routing
