"""DeepSeekMoE: many small routed experts, of which a token chooses a few, and shared experts that serve all tokens."""

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig, layer_config, require_subclass
from dsmini.nn.attention import Context
from dsmini.nn.first_values import draw_first, draw_normal
from dsmini.nn.gate import Gate, Routing
from dsmini.nn.layers import Projection, at_least_fp32, in_precision, is_plain, make_linear, quantize_once
from dsmini.numerics import QuantizedTensor, rows_of, swiglu
from dsmini.numerics.quantization import X


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). The dense layers' feed-forward, and the shared experts."""

    def __init__(self, config: ModelConfig | None = None, /, inter_dim: int | None = None, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        width = c.inter_dim if inter_dim is None else inter_dim
        self.w1: Projection = make_linear(c, c.dim, width)
        self.w2: Projection = make_linear(c, width, c.dim, c.output_init_std)
        self.w3: Projection = make_linear(c, c.dim, width)
        self.limit: float | None = c.swiglu_limit

    def forward(
        self, x: Float[Tensor, "*batch m"] | QuantizedTensor, context: Context | None = None
    ) -> Float[Tensor, "*batch m"]:
        """Return a row for each row of x. The context of a block, as attention gets it, is not needed."""
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit))


@ops.operation("experts")
def experts(
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    w1: Float[Tensor, "e f m"],
    w2: Float[Tensor, "e m f"],
    w3: Float[Tensor, "e f m"],
    limit: float | None = None,
) -> Float[Tensor, "n m"]:
    """Return the weighted sum of each token's chosen experts' outputs. The products run in x's dtype.

    y_n = sum over k of weights[n, k] * w2[i] swiglu(w1[i] x_n, w3[i] x_n, limit),  i = indices[n, k]

    Experts with a limit are V4's: the weight multiplies before w2, and results are added in FP32, which is returned.
    Without one they are V3's: results are weighted and added in x's dtype.

    Source: the released code of both; in FP32 they are the same.
    """

    def expert(i: int, rows: Tensor, share: Tensor | None) -> Tensor:
        gate, up = (rows @ w[i].to(x.dtype).T for w in (w1, w3))
        return swiglu(gate, up, limit, share) @ w2[i].to(x.dtype).T

    return sum_of_experts(expert, x, indices, weights, limit)


def sum_of_experts(
    run: Callable[..., Tensor],
    x: X,
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    limit: float | None,
) -> Float[Tensor, "n m"]:
    """Return the weighted sum of what each token's chosen experts make of it, one after the other.

    Args:
        run: run(i, rows, share) returns what expert i makes of some rows of x. With a limit, share [rows, 1] has their
            weights, by which it multiplies before w2.
    """
    summed = x.dtype if limit is None else torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=summed, device=x.device)
    for i in indices.unique().tolist():
        token, choice = (indices == i).nonzero(as_tuple=True)
        share = weights[token, choice, None]
        out = run(i, rows_of(x, token), None if limit is None else share)
        y = y.index_add(0, token, share.to(x.dtype) * out if limit is None else out.to(summed))
    return y


@ops.for_transforms("experts")
def experts_for_transforms(
    x: Tensor, indices: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float | None = None
) -> Tensor:
    w1, w2, w3 = (w.to(x.dtype) for w in (w1, w2, w3))
    # every expert runs every token, with weight 0 where it was not chosen: [n, e] and [n, e, f]
    share = weights.new_zeros(x.shape[0], w1.shape[0]).scatter(1, indices, weights).unsqueeze(-1)
    gate, up = (einsum(x, w, "n m, e f m -> n e f") for w in (w1, w3))
    if limit is None:
        return einsum(share.to(x.dtype) * swiglu(gate, up), w2, "n e f, e m f -> n m")
    return at_least_fp32(einsum(swiglu(gate, up, limit, share), w2, "n e f, e m f -> n m"))


class Experts(nn.Module):
    """All routed experts of a layer: w1, w3 [e, f, m], w2 [e, m, f]; each is a SwiGLU. No token is dropped."""

    precision = "native"

    def __init__(self, config: ModelConfig | None = None, /, **arguments: Any) -> None:
        super().__init__()
        c = layer_config(config, arguments)
        e, f, m = c.n_routed_experts, c.moe_inter_dim, c.dim
        self.w1: nn.Parameter = nn.Parameter(torch.empty(e, f, m))
        self.w2: nn.Parameter = nn.Parameter(torch.empty(e, m, f))
        self.w3: nn.Parameter = nn.Parameter(torch.empty(e, f, m))
        self.init_std: float = c.init_std
        self.output_init_std: float = c.output_init_std
        self.limit: float | None = c.swiglu_limit
        self.first: int = 0
        """Number of the first expert that is here, where processes share the layer's experts."""
        draw_first(self)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights from a normal distribution."""
        for weight, std in ((self.w1, self.init_std), (self.w2, self.output_init_std), (self.w3, self.init_std)):
            draw_normal(weight, std, generator, self.first)

    def forward(
        self,
        x: Float[Tensor, "n m"],
        indices: Int[Tensor, "n k"],
        weights: Float[Tensor, "n k"],
    ) -> Float[Tensor, "n m"]:
        """Return the sum of each token's chosen experts' outputs times their weights; with a limit in FP32."""
        return experts(x, indices, weights, self.w1, self.w2, self.w3, self.limit)

    def extra_repr(self) -> str:
        e, f, m = self.w1.shape
        return f"{m}, {f}, {e} experts"


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
        self.gate: Gate = gate_class(c)
        self.experts: Experts = in_precision(c, Experts)(c)
        shared = c.n_shared_experts * c.moe_inter_dim
        self.shared_experts: FeedForward | None = in_precision(c, FeedForward)(c, inter_dim=shared) if shared else None

    def forward(
        self, x: Float[Tensor, "*batch m"], context: Context | None = None
    ) -> tuple[Float[Tensor, "*batch m"], Routing]:
        """Return a row for each row of x, and the gate's decision.

        Args:
            context: of the block: a hash layer, or a subclass, chooses experts by the ids of the rows.

        Raises: ValueError for a gate that returns no Routing.
        """
        # 1. experts and their weights for each token: [n, k]
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens, *self.gate.asks(context))
        if not isinstance(routing, Routing):
            gate, got = type(self.gate).__name__, type(routing).__name__
            raise ValueError(
                f"{gate}.forward returned a {got}; a gate returns a Routing of indices and weights [n, k], scores "
                "[n, e] and counts [e], as dsmini.nn.route makes of logits [n, e]"
            )
        # 2. the routed experts' weighted sum, and the shared experts: [n, m]
        shared = self.shared_experts
        readers = (shared.w1, shared.w3) if isinstance(shared, FeedForward) and is_plain(shared) else (shared,)
        tokens = quantize_once(tokens, self.experts, *readers)
        if self.exchange is not None:
            y = self.exchange(self.experts, shared, tokens, routing)
        else:
            y = self.experts(tokens, routing.indices, routing.weights)
            y = y if shared is None else y + shared(tokens)
        return y.to(x.dtype).view(x.shape), routing
