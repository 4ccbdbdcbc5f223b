"""The small layers: linear maps, norms and the embedding, and what keeps some of them in FP32."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsmini import ops
from dsmini.config import ModelConfig
from dsmini.nn.first_values import draw_first, draw_normal
from dsmini.numerics import QuantizedTensor, at_least_fp32, quantize

M = TypeVar("M", bound=nn.Module)


class FP32Module(nn.Module):
    """Base of the norms and the gate. `.to(torch.bfloat16)` and `.half()` leave their tensors in FP32.

    A router in BF16 ties scores and chooses other experts on other devices; a bias rounded to BF16 no longer
    moves by its update speed. `.double()` and moves between devices work as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FP32Module":
        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return tensor.to(out.device, torch.float32) if out.dtype in (torch.bfloat16, torch.float16) else out

        return super()._apply(keep, recurse)


class Matrix(nn.Module):
    """Base of the layers whose weight is one matrix, drawn from a normal distribution."""

    def __init__(self, rows: int, columns: int, init_std: float, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.weight: Tensor = nn.Parameter(torch.empty(rows, columns, dtype=dtype))
        self.init_std = init_std
        draw_first(self)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        draw_normal(self.weight, self.init_std, generator)

    def extra_repr(self) -> str:
        return "{1}, {0}".format(*self.weight.shape)


@ops.operation("linear")
def linear(x: Float[Tensor, "*batch i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*batch o"]:
    """Return x W^T for x [*batch, i] and W [o, i], computed in x's dtype. The weight may have another dtype."""
    return F.linear(x, weight.to(x.dtype))


class Projection(Matrix):
    """Base of the layers y = x W^T without a bias, whose weight is numbers or FP8 codes (fp8.py).

    Any of them may be replaced: by nn.Linear, by a wrapper that adds a low-rank product (LoRA), or by a subclass with a
    forward of its own. So whoever reads a weight, or calls another method than forward, asks `is_plain` before.
    """

    precision = "native"

    def __init__(self, in_features: int, out_features: int, *, init_std: float = 0.02) -> None:
        Matrix.__init__(self, out_features, in_features, init_std)
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.register_parameter("bias", None)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """Return the whole weight in that dtype, as the products see it."""
        return self.weight.to(dtype)


class Linear(Projection, nn.Linear):
    """y = x W^T without a bias. The product runs in x's dtype, whatever dtype the weight is stored in.

    It is torch's nn.Linear, so that tools find it. Layers in FP8 are not: a tool would take codes for numbers.
    """

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return linear(x, self.weight)


class FP32Product(Linear):
    """A Linear whose product and result are FP32, whatever dtypes x and the weight have: V4's head."""

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        with ops.without_autocast(x):
            return linear(at_least_fp32(x), self.weight)


def in_precision(c: ModelConfig, plain: type[M]) -> type[M]:
    """Return the class that multiplies in config.precision: `plain`, or what fp8.py derives from it."""
    if c.precision == "native":
        return plain
    from dsmini.nn.fp8 import DERIVED  # whose layers are subclasses of plain ones

    return DERIVED[plain]


def make_linear(
    c: ModelConfig, in_features: int, out_features: int, init_std: float | None = None, **options: Any
) -> Projection:
    """Make the linear layer of attention and feed-forwards that config.precision asks for.

    Args:
        init_std: None: the config's.
        options: of the class of that precision; Linear has none.
    """
    std = c.init_std if init_std is None else init_std
    layer: Any = in_precision(c, Linear)
    return layer(in_features, out_features, init_std=std, **({} if layer is Linear else options))


def output_linear(c: ModelConfig, width: int) -> Projection:
    """Make the linear layer after attention.

    FP8 training saves its input in E5M6, with more bits: the backward of attention reads it too (report, section
    3.3.3).
    """
    return make_linear(c, width, c.dim, c.output_init_std, saved_format="e5m6")


def is_plain(module: nn.Module) -> bool:
    """Return True for a layer of exactly a class of dsmini.nn, with its own forward and without hooks.

    Return False for a module of another class, such as a wrapper, a subclass, a layer whose weight is computed
    (torch.nn.utils.parametrize makes a subclass), and hooks, as of FSDP on this module alone.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module).__module__.startswith("dsmini.nn.") and not any(hooks) and "forward" not in module.__dict__


def in_fp8(*modules: nn.Module | None) -> bool:
    """Return True if each module, but for None, is a plain layer that multiplies in simulated FP8."""
    return all(getattr(m, "precision", None) == "fp8" and is_plain(m) for m in modules if m is not None)


def quantize_once(x: Tensor | QuantizedTensor, *readers: nn.Module | None) -> Any:
    """Return x quantized for all that read it, if each of them multiplies codes; else as it is.

    FP8 training then saves one copy of x for backward. Where another module takes the place of a reader, all get x
    itself, and the others quantize it on their own, to the same codes.
    """
    return quantize(x) if isinstance(x, Tensor) and in_fp8(*readers) else x


class FP32Linear(FP32Module, Matrix):
    """y = x W^T without a bias. Weight, product and result are FP32, whatever dtype x has."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float = 0.02) -> None:
        Matrix.__init__(self, out_features, in_features, init_std, torch.float32)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        with ops.without_autocast(x):
            return linear(at_least_fp32(x), self.weight)


@ops.operation("rms_norm")
def rms_norm(x: Float[Tensor, "*batch m"], weight: Float[Tensor, " m"], eps: float) -> Float[Tensor, "*batch m"]:
    """Return x / sqrt(mean(x^2) + eps) * weight, computed in FP32, in x's dtype.

    In training on a CPU the eager version has first derivatives only.

    Source: Zhang and Sennrich 2019.
    """
    y = at_least_fp32(x)
    return (y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


class Norm(FP32Module):
    """Base of the norms: a weight for each number of x."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight: nn.Parameter = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the weight to 1, and a bias to 0; nothing is drawn."""
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight, computed in FP32, returned in x's dtype.

    Source: Zhang and Sennrich 2019; DeepSeek-V3 adds one after each compressed latent (report, section 4.2).
    """

    def forward(self, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return rms_norm(x, self.weight, self.eps)


def normed(norm: nn.Module | None, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
    """Return norm(x); x itself in a model without this norm."""
    return x if norm is None else norm(x)


class LayerNorm(Norm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, computed in FP32, returned in x's dtype.

    Source: Ba et al. 2016; DeepSeek-V3.2 has it on the indexer's key alone.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        y = at_least_fp32(x)
        weight, bias = self.weight.to(y.dtype), self.bias.to(y.dtype)
        return F.layer_norm(y, weight.shape, weight, bias, self.eps).to(x.dtype)


class Embedding(Matrix):
    """One row of the weight for each token id."""

    def __init__(self, vocab_size: int, dim: int, *, init_std: float = 0.02) -> None:
        super().__init__(vocab_size, dim, init_std)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch m"]:
        """Return a row for each id.

        Raises: ValueError for ids that check_ids refuses.
        """
        check_ids("token", tokens, self.weight.shape[0])
        return F.embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


def check_ids(what: str, ids: Int[Tensor, "*batch"], vocab_size: int) -> None:
    """Raise ValueError for an id outside the vocabulary, in eager mode on a CPU.

    On an accelerator the check would wait for the device in every step. There the commands check their data once.
    """
    if ops.can_read_values(ids) and ids.numel():
        low, high = (int(i) for i in ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{what} id {wrong} is outside the vocabulary; want 0 to {vocab_size - 1}")
