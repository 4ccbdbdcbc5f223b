"""y = x W^T, in the compute dtype. nn/fp8.py has the same in simulated FP8, and with a weight held in FP8.

Linear is torch's nn.Linear, so that tools find it. Layers in FP8 are not: a tool would take codes for numbers.

Any of them may be replaced: by nn.Linear, by a wrapper that adds a low-rank product (LoRA), or by a subclass
with a forward of its own. So whoever reads a weight, or calls another method than forward, asks `is_direct` before.
"""

from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsmini.functional.fp32 import at_least_fp32, without_autocast
from dsmini.functional.linear import linear
from dsmini.functional.swiglu import swiglu
from dsmini.nn.fp32 import FP32Module
from dsmini.nn.initialization import draw_normal


class Projection(nn.Module):
    """Base of the layers y = x W^T without a bias, whose weight is numbers or FP8 codes.

    A subclass has `forward` and `dense`.
    """

    direct = True
    """True if `swiglu`, `dense` and the weight may stand in for forward: the same class says what they all do."""
    reads_codes = False
    """True if x may be quantized already."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__ and "dense" not in cls.__dict__:
            cls.direct = cls.reads_codes = False

    def __init__(self, in_features: int, out_features: int, *, init_std: float = 0.02) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", None)
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        draw_normal(self.weight, self.init_std, generator)

    def swiglu(self, gate: Float[Tensor, "*batch i"], up: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Return forward(silu(gate) * up)."""
        return self(swiglu(gate, up))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """Return the whole weight in that dtype, as the products see it."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class Linear(Projection, nn.Linear):
    """y = x W^T without a bias. The product runs in x's dtype, whatever dtype the weight is stored in."""

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return linear(x, self.weight)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        return self.weight.to(dtype)


class FP32Linear(FP32Module):
    """y = x W^T without a bias. Weight, product and result are FP32, whatever dtype x has."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from a normal distribution with the standard deviation init_std."""
        draw_normal(self.weight, self.init_std, generator)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        with without_autocast(x):
            return linear(at_least_fp32(x), self.weight)


def is_direct(module: nn.Module) -> TypeGuard[Projection]:
    """Return True for a Projection that does nothing but multiply by its own weight.

    Return False for a module of another class, a subclass with a forward of its own, hooks (as of FSDP on this module
    alone), and a weight that is computed (torch.nn.utils.parametrize).
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    replaced = any(hooks) or "forward" in module.__dict__
    return isinstance(module, Projection) and module.direct and not replaced and "weight" in module._parameters


def dense_weight(module: nn.Module, in_features: int, dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """Return the matrix by which a module multiplies, in that dtype.

    It is the output for the identity, which is exact: each sum has one term that is not zero.

    Raises: ValueError for a module that adds a bias.
    """
    if is_direct(module):
        return module.dense(dtype)
    identity = torch.eye(in_features, dtype=dtype, device=next(module.parameters()).device)
    if module(torch.zeros_like(identity[:1])).any():
        raise ValueError(
            f"a {type(module).__name__} adds a bias, which absorbed weights cannot hold; use form='expanded'"
        )
    return module(identity).T.to(dtype)
