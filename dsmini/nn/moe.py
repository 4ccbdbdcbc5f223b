"""DeepSeekMoE: many small routed experts, of which a token visits a few, and shared experts that all tokens visit."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dsmini.config import ModelConfig, layer_config, require_subclass
from dsmini.functional.linear import quantize_once
from dsmini.functional.swiglu import swiglu
from dsmini.nn.fp8 import make_experts, make_linear
from dsmini.nn.gate import Gate, Routing
from dsmini.nn.linear import is_direct
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
        x = quantize_once(x, self.w1, self.w3)
        gate, up = self.w1(x), self.w3(x)
        return self.w2.swiglu(gate, up) if is_direct(self.w2) else self.w2(swiglu(gate, up))


class MoE(nn.Module):
    """A DeepSeekMoE layer: the gate, its routed experts, and the shared experts. From a config or plain arguments.

    Args:
        gate_class: makes the gate from a config: a subclass of Gate, whose forward returns a Routing.

    Source: DeepSeek-V3 report, section 2.1.2, equation 12.
    """

    exchange: Callable[..., Tensor] | None = None
    """Computes step 2 where the experts are divided among several processes, called with (experts, shared experts,
    tokens, routing). None: all experts are here."""

    def __init__(
        self, config: ModelConfig | None = None, /, *, gate_class: Callable[..., Gate] = Gate, **arguments: Any
    ) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        require_subclass("gate_class", gate_class, Gate)
        self.gate = gate_class(c)
        if not isinstance(self.gate, Gate):
            kind = type(self.gate).__name__
            raise ValueError(f"gate_class makes a {kind}, want a Gate, whose bias training moves; derive it from Gate")
        self.experts = make_experts(c)
        shared = c.n_shared_experts * c.moe_inter_dim
        self.shared_experts = FeedForward(c, inter_dim=shared) if shared else None

    def forward(self, x: Float[Tensor, "*batch m"]) -> tuple[Float[Tensor, "*batch m"], Routing]:
        # 1. experts and their weights for each token: [n, k]
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        # 2. the routed experts' weighted sum, and the shared experts: [n, m]
        shared = self.shared_experts
        readers = (shared.w1, shared.w3) if isinstance(shared, FeedForward) else (shared,)
        tokens = quantize_once(tokens, self.experts, *readers)
        if self.exchange is not None:
            return self.exchange(self.experts, shared, tokens, routing).view(x.shape), routing
        y = self.experts(tokens, routing.indices, routing.weights, routing.counts)
        if shared is not None:
            y = y + shared(tokens)
        return y.view(x.shape), routing
