"""The seam around whole models: the reference backend runs equations alone, and a kernel can replace any operation."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import Transformer, ops
from dsmini.functional import experts as functional_experts
from dsmini.measure.costs import COSTS
from dsmini.measure.counting import count
from dsmini.nn.fp8 import fp8_experts, hold_all_fp8
from dsmini.numerics import WEIGHT_TILE, quantize
from tests.functional.conftest import Unserved
from tests.helpers.configs import refusal
from tests.helpers.models import decoded
from tests.helpers.operations import routed
from tests.helpers.tolerances import E4M3_UNIT, FP32_UNIT, relative_error, rounding

Build = Callable[..., Transformer]
PRECISION = pytest.mark.parametrize("precision", ["native", "fp8"])
NEAR = {"native": rounding(FP32_UNIT, terms=40, chained=40), "fp8": E4M3_UNIT}
"""In FP8, sums of another order move a code to its neighbour here and there."""


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("an eager version ran")


def step(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Return the loss and the gradients."""
    loss = model.losses(tokens[:, :-1], tokens[:, 1:]).total
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@PRECISION
def test_reference_backend_trains_and_decodes_by_equations(
    monkeypatch: pytest.MonkeyPatch, small_model: Build, precision: str
) -> None:
    """No tuned version runs, nor a part of one."""
    model, tokens = small_model(precision=precision), torch.randint(0, 61, (2, 20))
    held = hold_all_fp8(copy.deepcopy(model)).eval()
    want, logits, of_codes = step(model, tokens), model(tokens), held(tokens)
    for operation in ops.Operation.declared.values():
        monkeypatch.setattr(operation, "plain", refuse)
    for name in ("grouped_linear", "sort_by_expert", "combine"):
        monkeypatch.setattr(functional_experts, name, refuse)
    monkeypatch.setenv(ops.VARIABLE, "reference")
    got = step(model, tokens)
    assert relative_error(got[0], want[0]) <= NEAR[precision] / 10
    wrong = torch.cat([(a - b).flatten() for a, b in zip(got, want, strict=True)]).norm()
    assert wrong <= NEAR[precision] * torch.cat([b.flatten() for b in want]).norm()
    assert relative_error(model(tokens), logits) <= NEAR[precision]
    assert relative_error(held(tokens), of_codes) <= NEAR[precision]
    for form in ("expanded", "absorbed") if precision == "native" else ():
        assert relative_error(decoded(model, tokens, (9, 1, 10), form=form), logits) <= NEAR[precision]


def stand_in(monkeypatch: pytest.MonkeyPatch, names: set[str]) -> list[str]:
    """Let a backend for this device have a kernel for each of these operations; return what ran, in order."""
    kernels: Any = ModuleType("stand-in")
    ran: list[str] = []
    kernels.OPERATIONS, kernels.Unserved, kernels.why_not = tuple(names), Unserved, lambda _: None
    for name, operation in ops.Operation.declared.items():

        def kernel(*args: Any, run: Any = operation.plain, name: str = name, **options: Any) -> Any:
            ran.append(name)
            with ops.use("eager"):
                return run(*args, **options)

        setattr(kernels, name, kernel)
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(ops, "_operations", lambda name: kernels.OPERATIONS if name == "cpu" else None)
    monkeypatch.setattr(ops, "_load", lambda name: kernels if name == "cpu" else "not here")
    return ran


@pytest.mark.parametrize(
    ("precision", "held", "served"),
    [
        ("native", False, {"experts", "linear"}),
        ("native", True, {"quantized_experts", "quantized_linear"}),
        ("fp8", False, {"fp8_experts"}),
    ],
)
@torch.no_grad()
def test_kernels_serve_inference_and_are_counted_by_cost(
    monkeypatch: pytest.MonkeyPatch, small_model: Build, precision: str, held: bool, served: set[str]
) -> None:
    model, tokens = small_model(precision=precision, n_mtp_layers=0), torch.randint(0, 61, (2, 20))
    model = hold_all_fp8(model).eval() if held else model.eval()
    with ops.use("eager"):  # which kernels would serve depends on the CPU
        want = model(tokens)
    ran = stand_in(monkeypatch, served)
    assert torch.equal(model(tokens), want)
    assert set(ran) == served
    ran.clear()
    if not served <= COSTS.keys():
        assert "has no cost, so it cannot be counted" in refusal(count, lambda: model(tokens))
        return
    counted = count(lambda: model(tokens))
    # kernels alone are counted under their names, each by the cost of its operation
    assert sorted(op.name for op in counted.operations if op.name in served) == sorted(ran)
    assert all(op.flops and op.read and op.written for op in counted.operations if op.name in served)


def test_gradient_of_quantized_input_keeps_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes have no gradient: the tensor that they stand for is asked."""
    x, (indices, weights) = torch.randn(5, 24, requires_grad=True), routed(5, 2, 4)
    held = [quantize(torch.randn(4, *size), WEIGHT_TILE, "fp32") for size in ((12, 24), (24, 12), (12, 24))]
    ran = stand_in(monkeypatch, {"fp8_experts"})
    y = fp8_experts(quantize(x), indices, weights, *held)
    assert not ran
    assert torch.autograd.grad(y.sum(), x)[0].norm() > 0
    fp8_experts(quantize(x.detach()), indices, weights, *held)
    assert ran == ["fp8_experts"]
