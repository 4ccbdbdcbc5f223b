"""FP8 in the layers, by class: Linears and Experts that multiply in simulated FP8, or whose weights are FP8 codes.

    Linear, FeedForward, Experts             products in the compute dtype
    FP8Linear, FP8FeedForward, FP8Experts    precision "fp8": products in simulated FP8, forward and backward
    QuantizedLinear, QuantizedExperts        products in the compute dtype of weights that are held as FP8 codes

A layer is made of the class that config.precision names (`in_precision`). `hold_fp8` puts codes into a model's. They
are E4M3 with an FP32 scale for each 128x128 block, or have another layout.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.nn.attention import Context
from dsmini.nn.layers import Linear, Projection, in_fp8, linear, quantize_once
from dsmini.nn.moe import Experts, FeedForward, experts, sum_of_experts
from dsmini.numerics import (
    WEIGHT_TILE,
    QuantizedTensor,
    Weight,
    dense,
    fp8_matmul,
    fp8_swiglu_matmul,
    matrix_of,
    quantize,
    swiglu,
)
from dsmini.numerics.quantization import FormatName, Scale, Tile

SCALES = MappingProxyType({"weight": "scale", "w1": "w1_scale", "w2": "w2_scale", "w3": "w3_scale"})
"""Names of the buffers that hold the scales of matrices in FP8."""
M = TypeVar("M", bound=nn.Module)
REFUSAL = "FP8 weights are codes that no gradient can move; load the model with fp8='dequantize' to train it"


@ops.operation("quantized_linear")
def quantized_linear(x: Float[Tensor, "*batch i"], weight: QuantizedTensor) -> Float[Tensor, "*batch o"]:
    """Return x W^T for a weight that is held as codes: its values in x's dtype, multiplied in x's dtype."""
    return F.linear(x, weight.dequantize(x.dtype))


@ops.operation("quantized_experts")
def quantized_experts(
    x: Float[Tensor, "n m"],
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float | None = None,
) -> Float[Tensor, "n m"]:
    """Compute `experts` with stacked matrices that may be FP8 codes. Products take their values in x's dtype."""
    return experts.reference(x, indices, weights, *(dense(w, x.dtype) for w in (w1, w2, w3)), limit=limit)


@ops.for_transforms("fp8_experts")
@ops.for_transforms("quantized_experts")
def _refuse_transforms(*_: Any, **__: Any) -> Any:
    raise ValueError("experts in FP8 have no version for torch.func and torch.export; use a model without FP8")


@ops.operation("fp8_experts")
def fp8_experts(
    x: QuantizedTensor,
    indices: Int[Tensor, "n k"],
    weights: Float[Tensor, "n k"],
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float | None = None,
) -> Float[Tensor, "n m"]:
    """Compute `experts` with simulated FP8 products, forward and backward.

    Source: DeepSeek-V3 report, section 3.3.
    """

    def expert(i: int, rows: QuantizedTensor, share: Tensor | None) -> Tensor:
        gate, up = (fp8_matmul(rows, matrix_of(w, i)) for w in (w1, w3))
        return fp8_swiglu_matmul(gate, up, matrix_of(w2, i), limit=limit, weights=share)

    return sum_of_experts(expert, x, indices, weights, limit)


def fp8_weights(model: nn.Module) -> dict[str, "Projection | Experts"]:
    """Find the parameters that DeepSeek stores in FP8, by name, each with its layer.

    They are the matrices of attention and the feed-forwards, not embedding, head, norms, gates or MTP's eh_proj.
    """
    return {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        if isinstance(module, Projection | Experts) and path != "head" and not path.endswith("eh_proj")
        for name in SCALES
        if name in module._parameters
    }


def hold_fp8(
    model: nn.Module,
    name: str,
    codes: Tensor,
    scales: Tensor,
    *,
    tile: Tile = WEIGHT_TILE,
    format: FormatName = "e4m3",
) -> None:
    """Let the parameter of that name be these codes, with the scales of its last two dimensions' tiles.

    Scales are FP32 or, next to FP4 codes, E8M0, of which the chosen experts' alone are converted. Kernels want FP32.

    A layer of a class that holds codes takes the place of a plain one.

    Raises: ValueError for a subclass of Linear or Experts, whose own forward would be lost.
    """
    path, _, attribute = name.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, FP8Weights):
        holds = QuantizedLinear if isinstance(layer, Projection) else QuantizedExperts
        if type(layer) not in (Linear, Experts):
            raise ValueError(
                f"a {type(layer).__name__} has a forward of its own; to hold FP8 codes, derive it from {holds.__name__}"
            )
        plain, layer = vars(layer), holds.__new__(holds)  # the same parameters, sizes and hooks
        vars(layer).update(plain | {name: {**plain[name]} for name in ("_parameters", "_buffers")})
        model.set_submodule(path, layer)
    shape = layer.layouts[attribute][0] if attribute in layer.layouts else layer.get_parameter(attribute).shape
    setattr(layer, attribute, nn.Parameter(codes, requires_grad=False))
    layer.register_buffer(SCALES[attribute], scales)
    layer.layouts = {**layer.layouts, attribute: (shape, tile, format)}


@torch.no_grad()
def hold_all_fp8(model: M, scale: Scale = "fp32") -> M:
    """Let all `fp8_weights` of a model be the codes of their values, and return the model."""
    for name in fp8_weights(model):
        q = quantize(model.get_parameter(name).float(), WEIGHT_TILE, scale)
        hold_fp8(model, name, q.codes, q.scales)
    return model


class FP8Weights(nn.Module):
    """Base of layers whose parameters may be FP8 codes. A parameter is an ordinary one until hold_fp8 replaces it.

    Codes and scales keep their dtypes under `.to(torch.bfloat16)`, which would make numbers of the codes and lose the
    scales; moves between devices work as usual. Codes are read only: a layer that holds some refuses training mode, and
    gradients pass it to its input alone.
    """

    layouts: Mapping[str, tuple[torch.Size, Tile, FormatName]] = MappingProxyType({})
    """Shape, tile and format of each parameter that is codes."""

    @property
    def holds_fp8(self) -> bool:
        return bool(self.layouts)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.holds_fp8:
            raise ValueError("FP8 weights are codes that cannot be drawn; load them, or build the model again")
        super().reset_parameters(generator)  # pyright: ignore[reportAttributeAccessIssue]

    def operand(self, name: str) -> Tensor | QuantizedTensor:
        """Return the parameter `name` as products take it: itself, or its codes."""
        weight, scales = self._parameters.get(name), self._buffers.get(SCALES[name])  # faster than getattr
        if weight is None:  # it is computed, by a parametrization, or of a replica
            weight = getattr(self, name)
        if scales is None:
            return weight
        shape, tile, format = self.layouts[name]
        return QuantizedTensor(
            codes=weight,
            scales=scales,
            shape=shape,
            tile=tile,
            scale="fp32",  # a power of two is one too
            format=format,
            dtype=torch.float32,
        )

    def train(self, mode: bool = True) -> "FP8Weights":
        if mode and self.holds_fp8:
            raise ValueError(REFUSAL)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FP8Weights":
        codes = {id(self._parameters[name]) for name in self.layouts}
        scales = {id(self._buffers[SCALES[name]]) for name in self.layouts}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) in codes:
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)  # whole numbers are moved, never cast
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in scales and out.dtype != tensor.dtype else out

        return super()._apply(keep, recurse)


class QuantizedLinear(FP8Weights, Projection):
    """A Linear that holds its weight as FP8 codes, and dequantizes it to x's dtype when it is used."""

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        weight = self.operand("weight")
        multiply: Any = linear if isinstance(weight, Tensor) else quantized_linear
        return multiply(x, weight)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        return dense(self.operand("weight"), dtype)


class FP8Linear(FP8Weights, Projection):
    """A Linear whose products are simulated FP8, forward and backward. x may be quantized already.

    Args:
        saved_format: format in which x is kept for backward.

    Source: DeepSeek-V3 report, section 3.3.
    """

    precision = "fp8"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_std: float = 0.02,
        saved_format: Literal["e4m3", "e5m6"] = "e4m3",
    ) -> None:
        super().__init__(in_features, out_features, init_std=init_std)
        self.saved_format: Literal["e4m3", "e5m6"] = saved_format

    def forward(self, x: Float[Tensor, "*batch i"] | QuantizedTensor) -> Float[Tensor, "*batch o"]:
        return fp8_matmul(x, self.operand("weight"), saved_format=self.saved_format)

    def swiglu(
        self, gate: Float[Tensor, "*batch i"], up: Float[Tensor, "*batch i"], limit: float | None = None
    ) -> Float[Tensor, "*batch o"]:
        """Return forward(swiglu(gate, up, limit)), which saves gate and up alone for backward."""
        return fp8_swiglu_matmul(gate, up, self.operand("weight"), limit=limit)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        weight = self.operand("weight")
        return (quantize(weight, WEIGHT_TILE) if isinstance(weight, Tensor) else weight).dequantize(dtype)


class FP8FeedForward(FeedForward):
    """A feed-forward of FP8Linears. x is quantized once, and of SwiGLU its inputs alone are saved, as FP8.

    A module in the place of w1, w2 or w3 is called with numbers, as in FeedForward.

    Source: DeepSeek-V3 report, section 3.3.3.
    """

    def forward(
        self, x: Float[Tensor, "*batch m"] | QuantizedTensor, context: Context | None = None
    ) -> Float[Tensor, "*batch m"]:
        x = quantize_once(x, self.w1, self.w3)
        w2: Any = self.w2
        gate, up = self.w1(x), self.w3(x)
        return w2.swiglu(gate, up, self.limit) if in_fp8(w2) else w2(swiglu(gate, up, self.limit))


class QuantizedExperts(FP8Weights, Experts):
    """Experts that hold matrices as FP8 codes. Only those that a token chose are dequantized, one after the other."""

    def forward(
        self,
        x: Float[Tensor, "n m"],
        indices: Int[Tensor, "n k"],
        weights: Float[Tensor, "n k"],
    ) -> Float[Tensor, "n m"]:
        w1, w2, w3 = (self.operand(name) for name in ("w1", "w2", "w3"))
        return quantized_experts(x, indices, weights, w1, w2, w3, self.limit)


class FP8Experts(FP8Weights, Experts):
    """Experts whose products are simulated FP8, forward and backward.

    Source: DeepSeek-V3 report, section 3.3.
    """

    precision = "fp8"

    def forward(
        self,
        x: Float[Tensor, "n m"] | QuantizedTensor,
        indices: Int[Tensor, "n k"],
        weights: Float[Tensor, "n k"],
    ) -> Float[Tensor, "n m"]:
        codes = quantize(x) if isinstance(x, Tensor) else x
        w1, w2, w3 = (self.operand(name) for name in ("w1", "w2", "w3"))
        return fp8_experts(codes, indices, weights, w1, w2, w3, self.limit)


DERIVED: Mapping[Any, Any] = MappingProxyType({Linear: FP8Linear, FeedForward: FP8FeedForward, Experts: FP8Experts})
"""The class of precision "fp8" for each plain one."""
