"""Predicted times: warm-up, dtypes without rates, cold bytes."""

import dataclasses

import pytest
import torch

from dsmini import ops
from dsmini.functional.trained_experts import trained_experts
from dsmini.measure import prediction
from dsmini.measure.counting import Count, count
from dsmini.measure.prediction import predicted_seconds
from dsmini.measure.rates import Curve, Roofs
from tests.helpers.questions import made_up_roofs


def roofs() -> Roofs:
    """Return a machine that moves a byte in 1 ns and multiplies at 1 GFLOP/s."""
    point, product = Curve(sizes=(1.0, 1e9), costs=(1e-9, 1.0)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e9))
    peak = {"float32": 1e9, "bfloat16": 1e9}
    return made_up_roofs(point, product, peak=peak, bandwidth=1e9, copy=1e9, call=1e-3)


def test_predicted_step_is_run_once_before_it_is_counted() -> None:
    runs = list[int]()

    def step() -> None:
        runs.append(len(runs))
        x = torch.ones(64, 64)
        x @ x if len(runs) > 1 else torch.ones(512, 512) @ torch.ones(512, 512)  # pyright: ignore[reportUnusedExpression]

    seconds = predicted_seconds(step, roofs())
    assert runs == [0, 1]
    assert seconds == pytest.approx(2 * 64**3 / 1e9 + 2e-3, rel=0.05), "ones and the product, a call each"


def test_more_work_and_more_calls_take_longer() -> None:
    x = torch.ones(256, 256)
    small, large = (prediction.seconds(count(lambda n=n: x[:n] @ x), roofs()) for n in (64, 256))
    assert small < large
    one, two = (prediction.seconds(count(lambda n=n: [x.t() for _ in range(n)]), roofs()) for n in (1, 2))
    assert two == pytest.approx(2 * one) == pytest.approx(2e-3), "views cost their calls"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_dtype_without_rates_takes_those_of_fp32(dtype: torch.dtype) -> None:
    x = torch.ones(1000, dtype=dtype)
    (op,) = count(lambda: x + x).operations
    assert prediction.operation_seconds(op, roofs()) == pytest.approx(3 * x.nbytes * 1e-9, rel=0.01)


def test_slower_memory_takes_longer_only_where_bytes_are_cold() -> None:
    machine = roofs()
    slow = {name: dataclasses.replace(c, costs=[10 * v for v in c.costs]) for name, c in machine.curves.items()}
    cold = {name: slow[name] if name.startswith("cold") else c for name, c in machine.curves.items()}
    x, y = torch.ones(1000), torch.ones(1000)
    (op,) = count(lambda: x + y).operations
    warm_op = dataclasses.replace(op, cold=0)
    there = dataclasses.replace(machine, curves=cold)
    assert prediction.operation_seconds(warm_op, there) == prediction.operation_seconds(warm_op, machine)
    longer = prediction.operation_seconds(op, there) / prediction.operation_seconds(op, machine)
    assert 0.6 < op.cold_share <= 1
    assert longer == pytest.approx(1 + 9 * op.cold_share)


@pytest.mark.parametrize(("width", "hidden", "rate"), [(128, 16, 1e9), (512, 256, 9e9), (128, 128, 3e9), (8, 8, 1e9)])
def test_narrow_experts_are_slower_by_flop(width: int, hidden: int, rate: float) -> None:
    """Check matrices of 2,048 and 131,072 numbers, one in the middle of their logarithms, and one below both."""
    machine = roofs()
    fast = {
        f"{where} kernel {narrow}trained experts float32": Curve(sizes=(1.0, 1e3), costs=(rate_, rate_))
        for where in ("warm", "cold")
        for narrow, rate_ in (("narrow ", 1e9), ("", 9e9))
    }
    there = dataclasses.replace(machine, curves={**machine.curves, **fast})
    x, matrices = torch.ones(4, width), [torch.ones(2, *shape) for shape in ((hidden, width), (width, hidden)) * 2][:3]
    routing = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), torch.tensor([4, 0])
    cost = trained_experts.cost(x, *routing, *matrices)
    counter = Count()
    counter.kernel_ran("trained_experts", cost, x, 1.0)
    (op,) = counter.operations
    assert op.flops == 6 * 4 * width * hidden
    assert prediction.operation_seconds(op, there) == pytest.approx(op.flops / rate)


def test_each_part_of_a_kernel_has_a_rate_of_its_own() -> None:
    rates = {"linear": 1e9, "cached attention": 2e9, "index scores": 5e8, "pick keys": 4e9}
    curves = {
        f"{where} kernel {kind} float32": Curve(sizes=(1.0, 1e5), costs=(rate, rate))
        for where in ("warm", "cold")
        for kind, rate in rates.items()
    }
    machine = dataclasses.replace(roofs(), curves={**roofs().curves, **curves})
    x = torch.ones(8)
    whole = ops.Cost(32, 32, 7_000_000, attention=4_000_000, scores=1_000_000)
    for name, cost, want in (
        ("attention_step", whole, 2e6 / 1e9 + 4e6 / 2e9 + 1e6 / 5e8),
        ("pick_keys", ops.Cost(32, 32, 8_000_000), 8e6 / 4e9),
    ):
        counter = Count()
        counter.kernel_ran(name, cost, x, 1.0)
        (op,) = counter.operations
        assert prediction.operation_seconds(op, machine) == pytest.approx(want), name
