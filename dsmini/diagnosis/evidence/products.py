"""Products in short formats: how far is each from FP32, and how far may rounding take it?

Rounding to a format of unit roundoff u moves a number by a share d of itself, |d| <= u: 2^-4 for E4M3, 2^-8 for BF16.
A number is m times a power of two, 1 <= m < 2, and moves by up to u times that power, each distance alike likely. With
log m alike likely too, the mean square of d is

    s^2 = u^2 / 3 * mean of 1 / m^2 = u^2 / 3 * 3 / (8 ln 2),        s = u / sqrt(8 ln 2) = 0.42 u

A product y = sum over k of x_k w_k moves by sum over k of x_k w_k (d_k + e_k), to first order. Independent d and e with
mean zero add up as their squares do. Over all results of a product the relative error is then expected to be

    expected = sqrt(2) s r,        r = |sqrt(sum over k of x_k^2 w_k^2)| / |y|

r says how the terms add up. Terms of random signs have r = 1, however many there are: sums and errors both grow with
the root of their number. Then 3.8 % are expected for E4M3, and 0.23 % for BF16, 0.29 % with the rounding of the result.
Terms of one sign average the errors, r < 1. Terms that cancel leave them, r > 1.

The d are not independent where a value repeats. If all are equal, so are the errors, and y moves by 2u + u^2 at most.

    limit = 2u + u^2 + 4 expected

A right product stays below it, also one that cancels. A scale that is wrong by a factor of 2 moves y by about itself.

Rounding to E4M3 is dsmini's own, as in FP8 training: weights in blocks of 128 x 128, activations and gradients in tiles
of 1 x 128, for the weight's gradient 128 x 1, with power-of-two scales. Numbers below 2^-14 of their tile's largest
lose more bits. They add next to nothing to a sum. Simulated: products of rounded values are added in FP32.

A step has three products of each matrix: y = x W^T forward, dx = dy W and dW = dy^T x backward.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmini.diagnosis.subject import Subject
from dsmini.nn import Experts, Projection, Transformer
from dsmini.numerics import fp8_matmul

UNITS = {"fp8": 2.0**-4, "bfloat16": 2.0**-8}
"""Unit roundoff by format."""
SPREAD = 1 / math.sqrt(8 * math.log(2))
"""Root mean square of rounding errors, in units."""
FAR = 4.0
ROWS, TOKENS = 128, 1024
"""Rows of a product, and tokens of a step, that are enough."""
PASSES = ("forward", "input's gradient", "weight's gradient")
GROUPS = (
    (".attn.", "attention"),
    (".experts", "experts"),
    (".shared_experts.", "shared experts"),
    (".ffn.", "dense feed-forward"),
    (".eh_proj", "input of guesses"),
    (".head", "head"),
)
"""Classes of products by a part of the parameter's name; the first that fits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix of a step, the rows that it multiplies, and the gradients of the results."""

    name: str
    """Parameter, such as layers.0.attn.wo."""
    x: Tensor
    """[n, k]."""
    w: Tensor
    """[o, k]."""
    dy: Tensor
    """[n, o]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductError:
    """Error of one product in one format, as shares of the product's size."""

    name: str
    group: str
    part: str
    """One of PASSES."""
    format: str
    error: float
    expected: float
    finite: bool
    """All of its operands and results are finite."""

    @property
    def limit(self) -> float:
        unit = UNITS[self.format]
        return 2 * unit + unit**2 + FAR * self.expected

    @property
    def wrong(self) -> str:
        """Fault in words; "" for none."""
        if not self.finite:
            return f"{self.name}, {self.part}, in {self.format}: not all numbers are finite"
        if self.error > self.limit:
            return (
                f"{self.name}, {self.part}, in {self.format} errs by {self.error:.1%}; rounding allows {self.limit:.1%}"
            )
        return ""


def errors_of(product: Product) -> Iterator[ProductError]:
    """Yield the errors of three products in each format; nothing for a product that is zero."""
    x, w, dy = (operand.detach().float() for operand in (product.x, product.w, product.dy))
    group = next((group for part, group in GROUPS if part in f".{product.name}"), "others")
    operands = ((x, w), (dy, w.T), (dy.T, x.T))
    for part, (a, b), rounded in zip(PASSES, operands, _in_fp8(x, w, dy), strict=True):
        exact = F.linear(a, b)
        if not exact.any():
            continue
        size = exact.norm().item()
        terms = F.linear(a.square(), b.square()).sum().sqrt().item() / size
        for format, unit in UNITS.items():
            got = rounded if format == "fp8" else _in_bf16(a, b)
            expected = math.sqrt(2) * SPREAD * unit * terms
            if format == "bfloat16":  # its result is rounded too
                expected = math.hypot(expected, SPREAD * unit)
            error = (got - exact).norm().item() / size
            finite = math.isfinite(error) and math.isfinite(size)
            yield ProductError(
                name=product.name,
                group=group,
                part=part,
                format=format,
                error=error,
                expected=expected,
                finite=finite,
            )


def _in_fp8(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dx and dW of simulated FP8."""
    with torch.enable_grad():
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = fp8_matmul(x, w, out_dtype=torch.float32)
        dx, dw = torch.autograd.grad(y, (x, w), dy)
    return y.detach(), dx, dw


def _in_bf16(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T in BF16, added in FP32, as BF16 units do it; also quick where a machine has none."""
    return F.linear(a.bfloat16().float(), b.bfloat16().float()).bfloat16().float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductErrors:
    """Errors of a step's products."""

    errors: Sequence[ProductError]
    left_out: int
    """Number of matrices for which there was no time."""

    @property
    def wrong(self) -> list[str]:
        """Faults in words."""
        return [words for each in self.errors if (words := each.wrong)]


def product_errors(subject: Subject, seconds: float) -> ProductErrors:
    """Run a forward and backward in FP32, and compute its products again with rounded operands.

    Args:
        seconds: time after which products are left out; at least one is computed.
    """
    end = time.perf_counter() + seconds
    products = collected(subject)
    found: list[ProductError] = []
    order = np.random.default_rng(0).permutation(len(products)).tolist()  # so that every class has its share
    for done, number in enumerate(order):
        if done and time.perf_counter() > end:
            return ProductErrors(errors=found, left_out=len(products) - done)
        found += errors_of(products[number])
    return ProductErrors(errors=found, left_out=0)


def collected(subject: Subject) -> list[Product]:
    """Return the products of a step on a part of the subject's batch, in FP32, with some rows of each."""
    model, found = shared_twin(subject), list[Product]()
    tokens, targets = (t[: max(1, TOKENS // t.shape[1])].to(subject.trainer.device) for t in subject.one_batch)

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        def collect(dy: Tensor) -> None:
            if isinstance(module, Experts):
                found.extend(_of_experts(name, module, dy, *args))
            elif isinstance(module, Projection):
                x, dy = _some(args[0].flatten(0, -2)), _some(dy.flatten(0, -2))
                found.append(Product(name=name, x=x, w=module.weight, dy=dy))

        if out.requires_grad:  # the head's first forward has none: it is computed again in backward
            out.register_hook(collect)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Projection | Experts):
                hook = module.register_forward_hook(lambda m, args, out, name=name: watch(name, m, args, out))
                stack.callback(hook.remove)
        model.losses(tokens, targets).total.backward()
    return found


@torch.no_grad()
def _of_experts(
    name: str, experts: Experts, dy: Tensor, x: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> Iterator[Product]:
    """Yield the products of each expert that has rows. Gradients are those of trained_experts.py."""
    for i in counts.nonzero().flatten().tolist():
        rows = (indices == i).any(1)
        w1, w2, w3 = experts.expert(i, torch.float32)
        mine, out = _some(x[rows]), _some(weights[indices == i][:, None] * dy[rows])
        gate, up = F.linear(mine, w1), F.linear(mine, w3)
        sigmoid, hidden = gate.sigmoid(), out @ w2
        yield Product(name=f"{name}.w2[{i}]", x=F.silu(gate) * up, w=w2, dy=out)
        yield Product(name=f"{name}.w3[{i}]", x=mine, w=w3, dy=hidden * F.silu(gate))
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        yield Product(name=f"{name}.w1[{i}]", x=mine, w=w1, dy=hidden * up * slope)


def _some(x: Tensor) -> Tensor:
    """Return at most ROWS rows, spread evenly."""
    n = x.shape[0]
    return x if n <= ROWS else x[torch.linspace(0, n - 1, ROWS, device=x.device).long()]


def shared_twin(subject: Subject) -> Transformer:
    """Return a model with the subject's own parameters that multiplies in FP32, for looking only."""
    config = dataclasses.replace(subject.config.model, precision="native")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = Transformer(config, compute_dtype=torch.float32)
    twin.load_state_dict(subject.trainer.model.state_dict(), assign=True)
    return twin.eval()
