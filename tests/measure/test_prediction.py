"""Predicted times: curves, calls, cold bytes, kernels, and forecasts of whole steps by factors of classes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dsmini import Transformer, ops
from dsmini.measure import counting, prediction
from dsmini.measure.costs import Cost
from dsmini.measure.counting import Count, CountedOperation, count
from dsmini.measure.forecast import forecast
from dsmini.measure.prediction import operation_seconds, predicted_seconds
from dsmini.measure.rates import Curve, Roofs, flops_rate, point_seconds, product_rate
from dsmini.measure.step_rates import OTHERS, Rates, StepRates
from dsmini.measure.workloads import StepShape
from tests.helpers.questions import TINY, made_up_roofs, plain_roofs


def roofs() -> Roofs:
    """Return a machine of growing rates, on which cold operations take four times as long."""
    point, product = Curve(sizes=(100.0, 1e8), costs=(1e-6, 1e-2)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e11))
    return made_up_roofs(point, product, cold=4.0)


def slower(machine: Roofs, words: str, by: float) -> Roofs:
    """Return the machine with higher costs, or rates, in curves with these words in their names."""
    changed = {
        n: dataclasses.replace(c, costs=[by * x for x in c.costs]) for n, c in machine.curves.items() if words in n
    }
    return dataclasses.replace(machine, curves={**machine.curves, **changed})


def only(run: Callable[[], object]) -> CountedOperation:
    (op,) = count(run).operations
    return op


# --- operations


def test_curves_are_followed_between_and_beyond_their_sizes() -> None:
    curve = Curve(sizes=(100.0, 10000.0), costs=(1.0, 100.0))
    assert [curve.at(size) for size in (10, 1000, 20000)] == pytest.approx([1.0, 10.0, 200.0])
    machine = roofs()
    assert point_seconds(machine, "move", "float32", 1e8, 0.0) == pytest.approx(1e-2)
    assert point_seconds(machine, "move", "float32", 1e8, 1.0) == pytest.approx(4e-2)
    assert flops_rate(machine, "product", "float32", 1e3, 0.0) == pytest.approx(1e11)
    assert flops_rate(machine, "product", "float32", 1e6, 1.0) == pytest.approx(1e11 / 4)
    assert flops_rate(machine, "product", "float32", 1e6, 0.5) == pytest.approx(1e11 / 2.5), "their seconds add up"


def test_products_go_by_matrix_size_softmax_by_its_curve() -> None:
    machine = slower(roofs(), "small product", 0.1)
    large_rate, small_rate = (product_rate(machine, "float32", 16, size, 0.0) for size in (1 << 20, 1 << 18))
    assert large_rate == pytest.approx(10 * small_rate)
    assert small_rate < product_rate(machine, "float32", 16, 1 << 19, 0.0) < large_rate
    x, w = torch.rand(16, 1024), torch.rand(1024, 1024)
    op = only(lambda: x @ w[:, :512])
    rate = product_rate(machine, "float32", 16, 1 << 19, op.cold_share)
    assert operation_seconds(op, machine) == pytest.approx(2 * 16 * 2**19 / rate + 1e-6)
    apart = slower(machine, "softmax", 100)
    op = only(lambda: w.softmax(-1))
    assert operation_seconds(op, apart) == pytest.approx(100 * operation_seconds(op, machine))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_dtype_without_rates_takes_those_of_fp32(dtype: torch.dtype) -> None:
    x = torch.ones(1000, dtype=dtype)
    assert operation_seconds(only(lambda: x + x), plain_roofs()) == pytest.approx(3 * x.nbytes * 1e-9, rel=0.01)


def test_slower_memory_takes_longer_only_where_bytes_are_cold() -> None:
    machine = plain_roofs()
    there = slower(machine, "cold", 10)
    x, y = torch.ones(1000), torch.ones(1000)
    op = only(lambda: x + y)
    warm = dataclasses.replace(op, cold=0)
    assert operation_seconds(warm, there) == operation_seconds(warm, machine)
    assert 0.6 < op.cold_share <= 1
    longer = operation_seconds(op, there) / operation_seconds(op, machine)
    assert longer == pytest.approx(1 + 9 * op.cold_share)


@pytest.mark.parametrize(("width", "hidden", "rate"), [(128, 16, 1e9), (512, 256, 9e9), (128, 128, 3e9), (8, 8, 1e9)])
def test_narrow_experts_are_slower_by_flop(width: int, hidden: int, rate: float) -> None:
    """Check matrices of 2,048 and 131,072 numbers, one in the middle of their logarithms, and one below both."""
    there = plain_roofs(kernels={"narrow trained experts": 1e9, "trained experts": 9e9})
    x, matrices = torch.ones(4, width), [torch.ones(2, *shape) for shape in ((hidden, width), (width, hidden)) * 2][:3]
    routing = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    counter = Count()
    counter.kernel_ran(ops.Call("trained_experts", (x, *routing, *matrices), {}, x, 1.0))
    (op,) = counter.operations
    assert op.flops == 6 * 4 * width * hidden
    assert operation_seconds(op, there) == pytest.approx(op.flops / rate)


def test_each_part_of_a_kernel_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"linear": 1e9, "cached attention": 2e9, "index scores": 5e8, "pick keys": 4e9}
    machine, x = plain_roofs(kernels=kinds), torch.ones(8)
    whole = Cost(32, 32, 7_000_000, attention=4_000_000, scores=1_000_000)
    for name, cost, want in (
        ("attention_step", whole, 2e6 / 1e9 + 4e6 / 2e9 + 1e6 / 5e8),
        ("topk_keys", Cost(32, 32, 8_000_000), 8e6 / 4e9),
    ):
        counter = Count()
        monkeypatch.setattr(counting, "cost_of", lambda *_, cost=cost: cost)
        counter.kernel_ran(ops.Call(name, (), {}, x, 1.0))
        (op,) = counter.operations
        assert operation_seconds(op, machine) == pytest.approx(want), name


# --- steps


def test_a_step_takes_what_its_operations_take() -> None:
    a, b = torch.rand(64, 64), torch.rand(64, 64)
    counted = count(lambda: F.silu(a @ b).view(8, 512).sum(-1))
    machine = roofs()
    parts = [operation_seconds(op, machine) for op in counted.operations]
    assert [op.kind for op in counted.operations] == ["product", "slow pointwise", "reduction"]
    assert all(seconds > 0 for seconds in parts)
    calls = len(parts) + counted.views
    least = sum(prediction.smallest_seconds(op, machine) for op in counted.operations)
    assert prediction.seconds(counted, machine) == pytest.approx(sum(parts) - least + calls * machine.call)
    assert counted.operations[0].flops == 2 * 64**3


def test_predicted_step_is_run_once_before_it_is_counted() -> None:
    runs = list[int]()

    def step() -> None:
        runs.append(len(runs))
        n = 64 if len(runs) > 1 else 512
        torch.ones(n, n) @ torch.ones(n, n)  # pyright: ignore[reportUnusedExpression]

    seconds = predicted_seconds(step, plain_roofs(call=1e-3))
    assert runs == [0, 1]
    assert seconds == pytest.approx(2 * 64**3 / 1e9 + 3e-3, rel=0.05), "twice ones and the product, a call each"


def test_views_cost_their_calls() -> None:
    x, machine = torch.ones(256, 256), plain_roofs(call=1e-3)
    one, two = (prediction.seconds(count(lambda n=n: [x.t() for _ in range(n)]), machine) for n in (1, 2))
    assert two == pytest.approx(2 * one) == pytest.approx(2e-3)


# --- forecasts


def rates(call: float = 0.0, **factors: float) -> Rates:
    each = StepRates(factors={OTHERS: 1.0, **factors}, call=call)
    names = [f"{work} {dtype}" for work in ("training", "prefill", "decode") for dtype in ("float32", "bfloat16")]
    return Rates(roofs=plain_roofs(call=1e-3), steps=dict.fromkeys(names, each), process=1000)


def test_forecast_sums_operations_with_factors_and_calls() -> None:
    config = dataclasses.replace(TINY, n_layers=1)
    shape = StepShape(work="training", config=config, dtype="float32", batch=2, tokens=32)
    plain = forecast(shape, rates())
    assert plain.seconds == pytest.approx(sum(plain.by_class.values())) and plain.by_class["calls"] == 0
    assert list(plain.by_class.values()) == sorted(plain.by_class.values(), reverse=True)
    longer = forecast(shape, rates(product=3.0, call=1e-3))
    assert longer.seconds == pytest.approx(plain.seconds + 2 * plain.by_class["product"] + 1e-3 * plain.calls)
    numbers = sum(p.numel() for p in Transformer(config).parameters())
    assert plain.process == plain.peak + 1000 and plain.peak > plain.held > 2 * 4 * numbers, "weights and moments"


def test_forecast_without_rates_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no rates of decode fp8 here; have training float32, .*decode bfloat16"):
        forecast(StepShape(work="decode", config=TINY, dtype="fp8", batch=1, tokens=16), rates())
