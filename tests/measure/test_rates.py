"""Rates of invented machines: measured within a budget of time, taken in turns, and stored."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import machine
from dsmini.machine import matmul_rate, pick_dtype, slow_bf16
from dsmini.measure import calibration, step_rates
from dsmini.measure.calibration import load_or_measure, seconds_of
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.kernels import Kernel
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.rates import Roofs
from dsmini.measure.step_rates import OTHERS, MeasuredStep, StepRates, rates_beyond, rates_of
from dsmini.measure.turns import Turns
from dsmini.measure.workloads import StepShape
from tests.conftest import Clock
from tests.helpers.questions import TINY, plain_roofs

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
Rates = dict[torch.dtype, float]

# --- one call


def test_seconds_of_begins_no_round_beyond_its_budget(clock: Clock) -> None:
    for most, rounds in ((0.0, 1), (4.5, 2), (100.0, 5)):
        before = clock.now
        assert seconds_of(lambda: clock.pay(1.0), CPU, rounds=5, most=most) == 1.0
        assert clock.now - before == 2 + rounds, "the first two are for warming up"


def test_seconds_of_is_the_second_fastest_round(clock: Clock) -> None:
    assert seconds_of(clock.work("a", 9.0, 0.1, 1.0, 3.0, 2.0, 5.0, 4.0), CPU, rounds=5) == 2.0


# --- products


@pytest.fixture
def machine_of(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Yield the maker of a machine of this many FLOP/s, with a wait in each product; it returns the sizes seen."""
    slow_bf16.cache_clear()

    def make(rates: Rates, wait: float = 0.0) -> list[int]:
        sizes: list[int] = []

        def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
            if a.dtype not in rates:
                raise RuntimeError("not implemented for 'BFloat16'")
            clock.pay(wait + 2 * len(a) ** 3 / rates[a.dtype])
            sizes.append(len(a))
            return out

        monkeypatch.setattr(torch, "mm", mm)
        return sizes

    yield make
    slow_bf16.cache_clear()


@pytest.mark.parametrize(
    ("flops", "largest"), [(3e6, 64), (3e8, 128), (3e9, 512), (1e11, 1024), (1e13, 2048)]
)  # fmt: skip
def test_matmul_rate_takes_the_largest_size_within_budget(
    clock: Clock, machine_of: Callable[..., list[int]], flops: float, largest: int
) -> None:
    sizes = machine_of({FP32: flops})
    assert matmul_rate(CPU, FP32, seconds=0.5) == pytest.approx(flops)
    assert max(sizes) == largest
    # every machine measures the smallest size, after a warm-up
    assert clock.now < max(2 * 0.5, 4 * 2 * 64**3 / flops + 4 * 2 * 128**3 / flops)


def test_matmul_rate_outgrows_a_wait_in_each_product(machine_of: Callable[..., list[int]]) -> None:
    """Simulate threads that wait for each other, where small products do not show the rate."""
    machine_of({FP32: 1e11}, wait=0.01)
    assert matmul_rate(CPU, FP32) > 0.3e11


@pytest.mark.parametrize(
    ("rates", "dtype", "slow"),
    [
        ({FP32: 1e11, BF16: 2.1e11}, BF16, False),
        ({FP32: 1e11, BF16: 1.1e11}, FP32, False),
        ({FP32: 1e11, BF16: 0.25e11}, FP32, False),
        ({FP32: 1e11, BF16: 0.19e11}, FP32, True),
        ({FP32: 1.7e11, BF16: 3e8}, FP32, True),
        ({FP32: 1e11}, FP32, True),
    ],
)
def test_dtype_and_slow_bf16_follow_the_rates(
    clock: Clock, machine_of: Callable[..., list[int]], rates: Rates, dtype: torch.dtype, slow: bool
) -> None:
    machine_of(rates)
    assert pick_dtype("auto", CPU) == dtype
    if rates.get(BF16) == 3e8:  # a clear loss ends the trial: one turn each, with four products of the smallest size
        assert clock.now < 0.02 + 4 * 2 * 64**3 / 3e8
    assert slow_bf16(CPU) == slow
    before = clock.now
    assert slow_bf16(CPU) == slow and clock.now == before, "measured once"
    assert clock.now < 2 * 12 * 0.06


def test_measuring_keeps_threads_and_draws_no_numbers() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    machine.product_rates(CPU)
    matmul_rate(CPU, FP32, seconds=0.01)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


# --- curves


@pytest.fixture
def calibrated(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Roofs]:
    """Calibrate in 60 s a machine with 0.1 ms for each operation and a time for each element."""

    def measure(per_element: float) -> Roofs:
        def make(n: int, dtype: torch.dtype, device: torch.device) -> Any:
            return lambda *_: clock.pay(1e-4 + per_element * n), (torch.zeros(1),), n

        for name, value in {
            "TORCH": {kind: kernel._replace(make=make) for kind, kernel in calibration.TORCH.items()},
            "KERNELS": {},
            "rotating": lambda run, inputs: run,
            "matmul_rate": lambda device, dtype, seconds: 1.0,
            "probes": lambda device: {},
            **dict.fromkeys(("read_bandwidth", "_copy", "_call"), lambda device: 1.0),
        }.items():
            monkeypatch.setattr(calibration, name, value)
        return calibration.measure(CPU, seconds=60.0)

    return measure


def test_a_fast_machine_gets_curves_of_every_size(calibrated: Callable[[float], Roofs]) -> None:
    roofs = calibrated(1e-10)
    assert len(roofs.curves) == 2 * 2 * len(calibration.TORCH)
    for name, curve in roofs.curves.items():
        _, kind, _ = re.split(r"^(?:warm|cold) | (?=\w+$)", name)
        assert len(curve.sizes) == len(calibration.TORCH[kind].sizes), name
        assert all(a < b for a, b in itertools.pairwise(curve.sizes))


@pytest.mark.parametrize("per_element", [1e-7, 1e-5])
def test_a_slow_machine_gets_shorter_curves_in_time(
    clock: Clock, calibrated: Callable[[float], Roofs], per_element: float
) -> None:
    lengths = [len(curve.sizes) for curve in calibrated(per_element).curves.values()]
    assert clock.now < 2 * 60.0
    assert min(lengths) >= 1 and sum(lengths) < 2 * 13 * 2 * 6


def test_a_smaller_call_takes_no_longer_than_a_larger_one(clock: Clock) -> None:
    """Check calls on 1, 4 and 16 numbers, of a millisecond each, where something else ran during those on 4."""

    def make(n: int, dtype: torch.dtype, device: torch.device) -> Any:
        return lambda *_: clock.pay(5.0 if n == 4 else 1e-3 * n), (torch.zeros(1),), n

    curve = calibration.curve_of(Kernel(make, (4, 16, 64), (), is_product=False), FP32, CPU, False, 2e-4, 1e3)
    assert curve.costs == pytest.approx([0.001, 0.016, 0.016])


# --- stored rates


def test_stored_rates_are_those_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list[str]()
    here = {"processor": "a"}

    def measure(device: torch.device, on_part: object, seconds: float) -> Roofs:
        measured.append(here["processor"])
        return plain_roofs(card=dict(here))

    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(calibration, "card", lambda device: dict(here))
    keep = tmp_path / "cache" / "roofs.json"
    assert load_or_measure(CPU, keep).card == load_or_measure(CPU, keep).card == here and measured == ["a"]
    here["processor"] = "b"
    assert load_or_measure(CPU, keep).card == here and measured == ["a", "b"]
    load_or_measure(CPU, keep, fresh=True)
    here["processor"] = "a"
    load_or_measure(CPU, keep)
    assert measured == ["a", "b", "b"], "the other machine's are still there"
    for damaged in ("5", '{"x"', keep.read_text().replace('"probes"', '"prob"')):
        keep.write_text(damaged)
        assert load_or_measure(CPU, keep).card == here
    assert len(measured) == 6
    monkeypatch.setattr(calibration, "VERSION", 0)
    assert load_or_measure(CPU, keep).card == here and len(measured) == 7, "another version measures again"


def test_rates_of_steps_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, measured = tmp_path / "roofs.json", list[int]()
    each = StepRates(factors={"product": 2.0, OTHERS: 1.0}, call=0.0)
    monkeypatch.setattr(step_rates, "measure_steps", lambda *_: measured.append(1) or {"training float32": each})
    monkeypatch.setattr(step_rates, "measure_process", lambda: 77)
    monkeypatch.setattr(step_rates, "watched", lambda run: (run(), 0.0))
    first, second = (rates_beyond(plain_roofs(), CPU, keep) for _ in range(2))
    assert first == second == step_rates.Rates(roofs=plain_roofs(), steps={"training float32": each}, process=77)
    assert len(measured) == 1 and json.loads(keep.read_text())
    rates_beyond(plain_roofs(), CPU, keep, fresh=True)
    assert len(measured) == 2


def test_rates_of_a_busy_machine_are_marked_and_not_stored(
    calibrated: Callable[[float], Roofs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check roofs that were measured while threads missed 0.3 cores, and rates of steps on them, and of 0.2 cores."""
    keep, each = tmp_path / "roofs.json", StepRates(factors={OTHERS: 1.0}, call=0.0)
    monkeypatch.setattr(calibration, "watched", lambda run: (run(), 0.3))
    roofs = calibrated(1e-10)
    assert roofs.busy == 0.3
    monkeypatch.setattr(calibration, "measure", lambda *_: roofs)
    monkeypatch.setattr(step_rates, "measure_steps", lambda *_: {"training float32": each})
    monkeypatch.setattr(step_rates, "measure_process", lambda: 77)
    monkeypatch.setattr(step_rates, "watched", lambda run: (run(), 0.2))
    with pytest.warns(UserWarning, match="other programs had the cores .*30%"):
        assert load_or_measure(CPU, keep).busy == 0.3
    for on, busy in ((roofs, 0.3), (plain_roofs(), 0.2)):
        with pytest.warns(UserWarning, match="not stored"):
            assert rates_beyond(on, CPU, keep).busy == busy
    assert not keep.exists() and step_rates.stored_rates(CPU, keep) is None


def test_rate_is_the_same_from_the_same_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check recorded seconds of rounds of three sizes, in which something else ran twice."""
    recorded = iter([[3e-6, 2e-6, 9e-3, 2.5e-6, 4e-6], [2.2e-6, 2.4e-6, 2.1e-6, 8e-6, 7e-6], [5e-5, 6e-5, 7e-5]])
    monkeypatch.setattr(calibration, "in_turns", lambda *_, **__: Turns({"run": next(recorded)}))

    def make(n: int, dtype: torch.dtype, device: torch.device) -> Any:
        return lambda *_: None, (), 1000 * n

    curve = calibration.curve_of(Kernel(make, (1, 4, 64), ()), FP32, CPU, False, 2e-4, 1e3)
    # the second fastest round of each; no call takes longer than a larger one
    assert curve.costs == pytest.approx([1000 / 2.2e-6, 4000 / 2.2e-6, 64_000 / 6e-5], rel=1e-12)


# --- rates of steps


def operations() -> list[CountedOperation]:
    x = torch.rand(64, 64)
    return count(lambda: (x @ x + x).sum(-1)).operations


def slower(ran: list[CountedOperation], *factors: float) -> list[CountedOperation]:
    """Return the operations with a multiple of the seconds that each takes alone."""
    pairs = zip(ran, factors, strict=True)
    return [dataclasses.replace(op, seconds=f * operation_seconds(op, plain_roofs())) for op, f in pairs]


def test_rates_of_steps_are_measured_over_predicted() -> None:
    ran = operations()
    taken, slow = slower(ran, 2.0, 3.0, 5.0), slower(ran, 18.0, 27.0, 45.0)  # something else ran
    whole = sum(op.seconds for op in taken) + 0.4
    found = rates_of([MeasuredStep(passes=[slow, taken], views=1, seconds=whole)], plain_roofs())
    mean = sum(op.seconds for op in taken) / sum(op.seconds for op in slower(ran, 1, 1, 1))
    assert found.factors == pytest.approx({"product": 2.0, "pointwise": 3.0, "reduction": 5.0, OTHERS: mean})
    assert found.call == pytest.approx(0.1), "three operations and a view share what is left"
    assert sum(found.seconds(ran, 1, plain_roofs()).values()) == pytest.approx(whole)


def test_operations_longer_than_the_step_are_shrunk_to_it() -> None:
    twice = slower(operations(), 2.0, 2.0, 2.0)
    whole = sum(op.seconds for op in twice) / 4
    found = rates_of([MeasuredStep(passes=[twice], views=0, seconds=whole)], plain_roofs())
    assert found.call == 0 and set(found.factors.values()) == {0.5}


def test_small_classes_share_a_factor() -> None:
    taken = slower(operations(), 4.0, 4.0, 4.0)
    large = dataclasses.replace(taken[0], flops=taken[0].flops * 10_000, seconds=20_000 * taken[0].seconds)
    found = rates_of([MeasuredStep(passes=[[large, *taken[1:]]], views=0, seconds=1e9)], plain_roofs())
    assert found.factors.keys() == {"product", OTHERS}
    assert found.factors[OTHERS] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("delays", "kept", "runs"), [([0.02], 0, 1), ([0.9, 0.4, 0.05], 2, 3), ([0.9, 0.3, 0.5, 0.8], 1, 4)]
)
def test_step_is_measured_again_while_others_have_the_cores(
    delays: list[float], kept: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the first quiet attempt counts, and where none is quiet, the quietest."""
    seconds, missed = iter(range(1, 9)), iter(delays)
    shape = StepShape(work="prefill", config=TINY, dtype="float32", batch=1, tokens=8)
    monkeypatch.setattr(step_rates, "in_turns", lambda *_, **__: Turns({"step": [float(next(seconds))]}))
    monkeypatch.setattr(step_rates, "count", lambda *_: SimpleNamespace(operations=[], views=0))
    monkeypatch.setattr(step_rates, "watched", lambda run: (run(), next(missed)))
    assert step_rates._measured(shape, plain_roofs(), CPU).seconds == kept + 1.0
    assert next(seconds) == runs + 1
