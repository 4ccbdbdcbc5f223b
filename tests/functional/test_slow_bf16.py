"""On CPUs without BF16 units, rows of BF16 numbers are multiplied in FP32."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmini import ops, quantize
from dsmini.nn import cached_attention
from dsmini.nn.attention import causal_attention
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.layers import linear
from dsmini.nn.mla import absorbed_attention
from dsmini.nn.moe import experts
from dsmini.nn.transformer import linear_cross_entropy
from dsmini.numerics import dense
from tests.helpers.tolerances import BF16_UNIT, relative_error

aten = torch.ops.aten


class Products(TorchDispatchMode):
    """The dtypes in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (aten.bmm, aten.baddbmm, aten.mm, aten._grouped_mm):
            self.dtypes.add(args[1].dtype)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("units", [True, False])
def test_attention_of_prompts_multiplies_bf16_only_where_a_cpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda: units)
    latent = torch.randn(2, 40, 3, 8), torch.randn(2, 40, 3, 4), torch.randn(2, 90, 24)
    operands = [x.bfloat16() for x in (*latent, torch.randn(3, 8, 20), torch.randn(3, 20, 6))]
    heads = [x.bfloat16() for x in (torch.randn(2, 4, 40, 8), torch.randn(2, 2, 90, 8), torch.randn(2, 2, 90, 6))]
    mask = torch.ones(1, 40, 90, dtype=torch.bool).triu(51)
    for call, given in ((absorbed_attention, operands), (cached_attention, heads)):
        with ops.use("eager"), Products() as seen:
            got = call(*given, 0.3, mask)
        assert seen.dtypes == {torch.bfloat16 if units else torch.float32}
        want = call.reference(*(x.float() for x in given), 0.3, mask)
        assert got.dtype == torch.bfloat16 and relative_error(got, want) < (4 if units else 1) * BF16_UNIT


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("name", ["linear", "experts"])
@pytest.mark.parametrize("held", [False, True])
def test_weights_multiply_bf16_only_where_a_cpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str, held: bool, units: bool
) -> None:
    monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda: units)
    x, weights = torch.randn(40, 24).bfloat16(), [torch.randn(30, 24)]
    routing: tuple[torch.Tensor, ...] = ()
    if name == "experts":
        routing = torch.arange(40)[:, None] % 3, torch.rand(40, 1)
        weights = [torch.randn(3, 16, 24), torch.randn(3, 24, 16), torch.randn(3, 16, 24)]
    operands: list[Any] = [quantize(w, tile=(128, 128), scale="fp32") for w in weights] if held else weights
    reference = {"linear": linear, "experts": experts}[name]
    call: Any = {"linear": quantized_linear, "experts": quantized_experts}[name] if held else reference
    with torch.no_grad(), ops.use("eager"), Products() as seen:
        got = call(x, *routing, *operands)
    assert (seen.dtypes <= {torch.bfloat16}) if units else (seen.dtypes == {torch.float32})
    want = reference.reference(x.float(), *routing, *(dense(w, torch.bfloat16).float() for w in operands))
    assert got.dtype == torch.bfloat16 and relative_error(got, want) < (4 if units else 1) * BF16_UNIT
    if (name, held) == ("linear", False):
        with torch.no_grad(), ops.use("eager"), Products() as seen:
            linear(x[:2], weights[0])
        assert seen.dtypes == {torch.bfloat16}, "few rows save less than a copy"


TRAINED: dict[str, tuple[Any, tuple[tuple[int, ...], ...], tuple[Any, ...]]] = {
    "linear": (linear, ((2, 40, 24), (30, 24)), ()),
    "experts": (experts, ((40, 24), (40, 1), (3, 16, 24), (3, 24, 16), (3, 16, 24)), (torch.arange(40)[:, None] % 3,)),
    "attention": (causal_attention, ((2, 3, 200, 24), (2, 3, 200, 24), (2, 3, 200, 16)), (0.3,)),
    "loss": (linear_cross_entropy, ((40, 24), (30, 24)), (torch.arange(40) % 30,)),
}
"""Operation, sizes of what learns, and other arguments, which come last, but after the first of experts."""


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("name", list(TRAINED))
def test_training_multiplies_bf16_only_where_a_cpu_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str, backend: str | None, units: bool
) -> None:
    monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda: units)
    operation, sizes, rest = TRAINED[name]

    def gradients(call: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = call(leaves[0], *rest, *leaves[1:]) if name == "experts" else call(*leaves, *rest)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if y.dim() else torch.ones(())
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    # weights are FP32 parameters, and attention has none
    whole, rounded = (3 if name == "attention" else 1), [torch.randn(size).bfloat16() for size in sizes]
    learned = [*rounded[:whole], *(t.float() for t in rounded[whole:])]
    kept: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with ops.use("eager"), keep, Products() as seen:
        gradients(operation, learned)
    assert (torch.bfloat16 in seen.dtypes) if units else (torch.bfloat16 not in seen.dtypes)
    if name == "linear":
        assert {t.dtype for t in kept} == {torch.bfloat16}, "operands are kept as they came"
    with ops.use(backend) if backend else nullcontext():  # kernels stand back while products are seen
        got = gradients(operation, learned)
    want = gradients(operation.reference, [t.double() for t in rounded])
    for each, wanted, leaf in zip(got[1:], want[1:], learned, strict=True):
        assert each.dtype == leaf.dtype and relative_error(each, wanted) < (12 if units else 3) * BF16_UNIT
    assert relative_error(got[0], want[0]) < (4 if units else 1) * BF16_UNIT


def test_frozen_weights_keep_no_rows_and_autocast_multiplies_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.machine.multiplies_bf16", lambda: False)
    x, weight, kept = torch.randn(40, 24).bfloat16().requires_grad_(), torch.randn(30, 24).bfloat16(), list[Tensor]()
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with ops.use("eager"), keep:
        y = linear(x, weight)
    assert [t.shape for t in kept] == [weight.shape]
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert relative_error(grad, weight.double().sum(0).expand(40, 24)) < 2 * BF16_UNIT
    with ops.use("eager"), torch.autocast("cpu", torch.bfloat16), Products() as seen:
        linear(x, weight)
    assert seen.dtypes == {torch.bfloat16}
