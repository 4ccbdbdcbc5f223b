"""Forecasts: factors of classes, cost of calls, more work takes longer, no rates no forecast, stored rates."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsmini import TrainConfig, Transformer
from dsmini.measure import step_rates
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.forecast import forecast, forecast_decode, forecast_prefill, forecast_training
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.rates import Curve, Roofs
from dsmini.measure.step_rates import OTHERS, MeasuredStep, Rates, StepRates, rates_beyond, rates_of
from dsmini.measure.workloads import StepShape
from tests.helpers.questions import TINY, made_up_roofs

CPU = torch.device("cpu")


def roofs() -> Roofs:
    """Return a machine that moves a byte in 1 ns and multiplies at 1 GFLOP/s."""
    point, product = Curve(sizes=(1.0, 1e9), costs=(1e-9, 1.0)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e9))
    return made_up_roofs(point, product, peak={"float32": 1e9, "bfloat16": 1e9}, bandwidth=1e9, copy=1e9, call=1e-3)


def rates(call: float = 0.0, **factors: float) -> Rates:
    each = StepRates(factors={OTHERS: 1.0, **factors}, call=call)
    names = [f"{work} {dtype}" for work in ("training", "prefill", "decode") for dtype in ("float32", "bfloat16")]
    return Rates(roofs=roofs(), steps=dict.fromkeys(names, each), process=1000)


def operations() -> list[CountedOperation]:
    x = torch.rand(64, 64)
    return count(lambda: (x @ x + x).sum(-1)).operations


def test_rates_of_steps_are_measured_over_predicted() -> None:
    machine = roofs()
    ran = operations()
    alone = [operation_seconds(op, machine) for op in ran]
    taken = [dataclasses.replace(op, seconds=f * s) for op, f, s in zip(ran, (2.0, 3.0, 5.0), alone, strict=True)]
    slow = [dataclasses.replace(op, seconds=9 * op.seconds) for op in taken]  # something else ran
    whole = sum(op.seconds for op in taken) + 0.4
    found = rates_of([MeasuredStep(passes=[slow, taken], views=1, seconds=whole)], machine)
    mean = sum(op.seconds for op in taken) / sum(alone)
    assert found.factors == pytest.approx({"product": 2.0, "pointwise": 3.0, "reduction": 5.0, OTHERS: mean})
    assert found.call == pytest.approx(0.1), "three operations and a view share what is left"
    assert sum(found.seconds(ran, 1, machine).values()) == pytest.approx(whole)


def test_operations_longer_than_the_step_are_shrunk_to_it() -> None:
    machine, ran = roofs(), operations()
    twice = [dataclasses.replace(op, seconds=2 * operation_seconds(op, machine)) for op in ran]
    whole = sum(op.seconds for op in twice) / 4
    found = rates_of([MeasuredStep(passes=[twice], views=0, seconds=whole)], machine)
    assert found.call == 0 and set(found.factors.values()) == {0.5}


@pytest.mark.parametrize(
    ("delays", "kept", "runs"), [([0.02], 0, 1), ([0.9, 0.4, 0.05], 2, 3), ([0.9, 0.3, 0.5, 0.8], 1, 4)]
)
def test_step_is_measured_again_while_others_have_the_cores(
    delays: list[float], kept: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the first quiet attempt counts, and where none is quiet, the quietest."""
    seconds, moments = iter(range(1, 9)), iter(range(9))
    shape = StepShape(work="prefill", config=TINY, dtype="float32", batch=1, tokens=8)
    monkeypatch.setattr(step_rates, "times", lambda *_: [float(next(seconds))])
    monkeypatch.setattr(step_rates, "count", lambda *_: SimpleNamespace(operations=[], views=0))

    class Times:
        def __init__(self, number: int) -> None:
            self.number = number

        @classmethod
        def now(cls) -> "Times":
            return cls(next(moments))

        def rates_since(self, before: "Times") -> SimpleNamespace:
            return SimpleNamespace(delayed=delays[before.number // 2])

    monkeypatch.setattr(step_rates, "CpuTimes", Times)
    assert step_rates._measured(shape, roofs(), CPU).seconds == kept + 1.0
    assert next(seconds) == runs + 1


def test_small_classes_share_a_factor() -> None:
    machine, ran = roofs(), operations()
    taken = [dataclasses.replace(op, seconds=4 * operation_seconds(op, machine)) for op in ran]
    large = dataclasses.replace(taken[0], flops=taken[0].flops * 10_000, seconds=20_000 * taken[0].seconds)
    found = rates_of([MeasuredStep(passes=[[large, *taken[1:]]], views=0, seconds=1e9)], machine)
    assert found.factors.keys() == {"product", OTHERS}
    assert found.factors[OTHERS] == pytest.approx(4.0)


def test_forecast_sums_operations_with_factors_and_calls() -> None:
    shape = StepShape(work="training", config=TINY, dtype="float32", batch=2, tokens=32)
    plain = forecast(shape, rates())
    assert plain.seconds == pytest.approx(sum(plain.by_class.values())) and plain.by_class["calls"] == 0
    assert list(plain.by_class.values()) == sorted(plain.by_class.values(), reverse=True)
    products = plain.by_class["product"]
    numbers = sum(p.numel() for p in Transformer(TINY).parameters())
    assert forecast(shape, rates(product=3.0)).seconds == pytest.approx(plain.seconds + 2 * products)
    assert forecast(shape, rates(call=1e-3)).seconds == pytest.approx(plain.seconds + 1e-3 * plain.calls)
    assert plain.process == plain.peak + 1000 and plain.peak > plain.held > 2 * 4 * numbers, "weights and moments"


def test_more_work_is_forecast_to_take_longer() -> None:
    here, train = rates(), TrainConfig(optimizer="adamw")
    for few, many in (
        [forecast_training(TINY, train, "float32", b, 64, here) for b in (1, 4)],
        [forecast_prefill(TINY, "float32", 1, n, here) for n in (16, 64)],
        [forecast_decode(TINY, "bfloat16", b, 32, here) for b in (1, 8)],
    ):
        assert few.seconds < many.seconds
        assert few.flops < many.flops


def test_forecast_without_rates_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no rates of decode fp8 here; have training float32, .*decode bfloat16"):
        forecast_decode(TINY, "fp8", 1, 16, rates())


def test_rates_of_steps_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, measured = tmp_path / "roofs.json", list[int]()

    def measure(*_: object) -> dict[str, StepRates]:
        measured.append(1)
        return dict(rates(product=2.0).steps)

    monkeypatch.setattr(step_rates, "measure_steps", measure)
    monkeypatch.setattr(step_rates, "measure_process", lambda: 77)
    first, second = (rates_beyond(roofs(), CPU, keep) for _ in range(2))
    assert first == second and first.process == 77 and len(measured) == 1
    rates_beyond(roofs(), CPU, keep, fresh=True)
    assert len(measured) == 2
