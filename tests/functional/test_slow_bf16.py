"""On CPUs without BF16 units, rows of BF16 numbers are multiplied in FP32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmini import ops
from dsmini.nn.attention import causal_attention
from dsmini.nn.hyper_connections import read_streams, stream_mixes, write_streams
from dsmini.nn.layers import linear, rms_norm
from dsmini.nn.moe import experts
from dsmini.nn.transformer import linear_cross_entropy
from dsmini.numerics import QuantizedTensor
from tests.functional.conftest import held
from tests.helpers.operations import Case, cases, exact, run
from tests.helpers.tolerances import BF16_UNIT, relative_error
from tests.helpers.watching import Operations, saved_for_backward

UNITS = "dsmini.machine.multiplies_bf16"
"""Where dsmini asks whether this CPU has units for products of BF16 numbers."""
EITHER = pytest.mark.parametrize("units", [True, False])


def watched(call: Callable[[], Any]) -> tuple[Any, set[torch.dtype]]:
    """Return a result of plain PyTorch, and the dtypes in which matrices are multiplied."""
    with ops.use("eager"), Operations() as seen:
        result = call()
    products = ("bmm", "baddbmm", "mm", "_grouped_mm")
    return result, {each.dtype for each in seen.results if each.operation in products}


def products() -> list[Case]:
    without = (rms_norm, read_streams, write_streams, stream_mixes)  # all of them FP32
    return [case for case in cases(200, torch.bfloat16) if case.operation not in without]


def plain(case: Case) -> Case:
    """Return the case with the values of codes, rounded as they are multiplied."""
    values = {i: q.dequantize(torch.bfloat16) for i, q in enumerate(case.arguments) if isinstance(q, QuantizedTensor)}
    return case.changed(values)


@EITHER
def test_products_are_in_bf16_only_where_a_cpu_has_units_for_it(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(UNITS, lambda: units)
    every = [case for case in products() if case.operation is not linear_cross_entropy]
    with_codes = [held(case) for case in every if case.operation in (linear, experts)]
    for case in (*every, *with_codes):
        with torch.no_grad():
            got, dtypes = watched(lambda case=case: case.operation(*case.arguments))
        assert dtypes <= {torch.bfloat16 if units else torch.float32}, case.operation.name
        assert dtypes or case.operation is causal_attention, "torch's flash attention is one operation"
        assert relative_error(got, exact(plain(case))[0]) < (4 if units else 1) * BF16_UNIT, case.operation.name


@EITHER
def test_training_multiplies_bf16_only_where_a_cpu_has_units(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(UNITS, lambda: units)
    for case in products():
        (y, *grads), dtypes = watched(lambda case=case: run(case, case.operation))
        assert (torch.bfloat16 in dtypes) == units, case.operation.name
        want, *wanted = exact(case)
        assert relative_error(y, want) < (4 if units else 1) * BF16_UNIT
        for grad, exactly, place in zip(grads, wanted, case.floats, strict=True):
            assert grad.dtype == case.arguments[place].dtype
            assert relative_error(grad, exactly) < (12 if units else 3) * BF16_UNIT, case.operation.name


def test_few_rows_save_less_than_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNITS, lambda: False)
    x, weight = torch.randn(2, 24).bfloat16(), torch.randn(30, 24)
    with torch.no_grad():
        assert watched(lambda: linear(x, weight))[1] == {torch.bfloat16}


def test_operands_are_kept_as_they_came_and_autocast_multiplies_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNITS, lambda: False)
    x, frozen = torch.randn(40, 24).bfloat16().requires_grad_(), torch.randn(30, 24).bfloat16()
    for weight, kept in ((frozen.float().requires_grad_(), [x.shape, frozen.shape]), (frozen, [frozen.shape])):
        with ops.use("eager"), saved_for_backward() as saved:
            y = linear(x, weight)
        assert [t.shape for t in saved if t.dtype == torch.bfloat16] == kept and len(saved) == len(kept)
    with torch.autocast("cpu", torch.bfloat16):
        (grad,), dtypes = watched(lambda: torch.autograd.grad(y, x, torch.ones_like(y)))
        assert dtypes == {torch.float32}, "backward is as forward was"
        assert relative_error(grad, frozen.double().sum(0).expand(40, 24)) < 2 * BF16_UNIT
        assert watched(lambda: linear(x, frozen))[1] == {torch.bfloat16}
