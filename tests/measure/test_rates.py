"""Measure rates within a budget of time on invented machines with their own clock."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import machine
from dsmini.machine import matmul_rate, pick_dtype, slow_bf16
from dsmini.measure import calibration, timing
from dsmini.measure.calibration import seconds_of
from dsmini.measure.rates import Curve
from tests.helpers.questions import made_up_roofs

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
Rates = dict[torch.dtype, float]


class Clock:
    """Clock that moves only by the cost of a product or of other work."""

    def __init__(self) -> None:
        self.now = 0.0
        self.largest = 0

    def perf_counter(self) -> float:
        return self.now

    def pay(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def machine_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Clock]]:
    """Yield the maker of a machine that multiplies at the given FLOP/s, with a wait in each product."""
    slow_bf16.cache_clear()

    def make(rates: Rates, wait: float = 0.0) -> Clock:
        clock = Clock()

        def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
            if a.dtype not in rates:
                raise RuntimeError("not implemented for 'BFloat16'")
            clock.pay(wait + 2 * len(a) ** 3 / rates[a.dtype])
            clock.largest = max(clock.largest, len(a))
            return out

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
        return clock

    yield make
    slow_bf16.cache_clear()


@pytest.mark.parametrize("flops", [3e6, 3e8, 3e9, 1e11, 1e13])
def test_matmul_rate_ends_within_budget(machine_of: Callable[..., Clock], flops: float) -> None:
    clock = machine_of({BF16: flops})
    assert matmul_rate(CPU, BF16, seconds=0.5) == pytest.approx(flops)
    # every machine measures the smallest size, after a warm-up
    assert clock.now < max(2 * 0.5, 4 * 2 * 64**3 / flops + 4 * 2 * 128**3 / flops)


@pytest.mark.parametrize(("flops", "largest"), [(3e8, 128), (3e9, 512), (1e11, 1024), (1e13, 2048)])
def test_matmul_rate_takes_the_largest_size_in_time(
    machine_of: Callable[..., Clock], flops: float, largest: int
) -> None:
    clock = machine_of({FP32: flops})
    matmul_rate(CPU, FP32, seconds=0.5)
    assert clock.largest == largest


def test_matmul_rate_outgrows_a_wait_in_each_product(machine_of: Callable[..., Clock]) -> None:
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
    machine_of: Callable[..., Clock], rates: Rates, dtype: torch.dtype, slow: bool
) -> None:
    clock = machine_of(rates)
    assert pick_dtype("auto", CPU) == dtype
    assert slow_bf16(CPU) == slow
    before = clock.now
    assert slow_bf16(CPU) == slow and clock.now == before, "measured once"
    assert clock.now < 2 * 12 * 0.06


def test_clear_loss_of_bf16_ends_the_trial(machine_of: Callable[..., Clock]) -> None:
    clock = machine_of({FP32: 1.7e11, BF16: 3e8})
    assert pick_dtype("auto", CPU) == FP32
    assert clock.now < 0.02 + 4 * 2 * 64**3 / 3e8, "one turn each, BF16 with four products of the smallest size"


def test_measuring_keeps_threads_and_draws_no_numbers() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    machine.product_rates(CPU)
    matmul_rate(CPU, FP32, seconds=0.01)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_seconds_of_begins_no_round_beyond_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(calibration.time, "perf_counter", clock.perf_counter)
    for most, rounds in ((0.0, 1), (2.5, 3), (100.0, 5)):
        before = clock.now
        assert seconds_of(lambda: clock.pay(1.0), CPU, rounds=5, most=most) == 1.0
        assert clock.now - before == 1 + rounds, "the first is for warming up"


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calibrate a machine with 0.1 ms for each operation and a time for each element; return the seconds too."""

    def measure(per_element: float, seconds: float) -> tuple[Any, float]:
        clock = Clock()

        def make(n: int, dtype: torch.dtype, device: torch.device) -> Any:
            x = torch.zeros(1)
            return lambda *_: clock.pay(1e-4 + per_element * n), (x,), n

        monkeypatch.setattr(calibration, "POINTS", dict.fromkeys(calibration.POINTS, make))
        monkeypatch.setattr(calibration, "PRODUCTS", dict.fromkeys(calibration.PRODUCTS, make))
        monkeypatch.setattr(calibration, "_kernel_jobs", lambda device: [])
        monkeypatch.setattr(calibration, "_rotating", lambda run, inputs: run)
        monkeypatch.setattr(calibration, "matmul_rate", lambda device, dtype, seconds: 1.0)
        for name in ("read_bandwidth", "_copy", "_call"):
            monkeypatch.setattr(calibration, name, lambda device: 1.0)
        monkeypatch.setattr(calibration, "probes", lambda device: {})
        monkeypatch.setattr(calibration.time, "perf_counter", clock.perf_counter)
        return calibration.measure(CPU, seconds=seconds), clock.now

    return measure


def test_a_fast_machine_gets_curves_of_every_size(calibrated: Callable[..., Any]) -> None:
    roofs, _ = calibrated(1e-10, 60.0)
    assert len(roofs.curves) == 2 * 2 * len((*calibration.POINTS, *calibration.PRODUCTS))
    for name, curve in roofs.curves.items():
        is_product = any(kind in name for kind in calibration.PRODUCTS)
        assert len(curve.sizes) == len(calibration.ROWS if is_product else calibration.BYTES), name
        assert all(a < b for a, b in itertools.pairwise(curve.sizes))


@pytest.mark.parametrize("per_element", [1e-7, 1e-5])
def test_a_slow_machine_gets_shorter_curves_in_time(calibrated: Callable[..., Any], per_element: float) -> None:
    roofs, took = calibrated(per_element, 60.0)
    assert took < 2 * 60.0
    lengths = [len(curve.sizes) for curve in roofs.curves.values()]
    assert min(lengths) >= 1 and sum(lengths) < 2 * 13 * 2 * 6


def test_quick_bandwidth_is_the_stored_roof_unless_something_was_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu, keep, asked = torch.device("cpu"), tmp_path / "roofs.json", []

    def read(device: torch.device, size: int, rounds: int) -> float:
        asked.append((size, rounds))
        if len(asked) == 2:
            raise RuntimeError("not enough memory")
        return 5e10

    monkeypatch.setattr(calibration, "read_bandwidth", read)
    assert calibration.quick_bandwidth(cpu, 1e9, keep) == 5e10
    assert calibration.quick_bandwidth(cpu, 1e9, keep) is None and not keep.exists()
    curve = Curve(sizes=(1.0,), costs=(1.0,))
    monkeypatch.setattr(calibration, "measure", lambda *_: made_up_roofs(curve, curve))
    calibration.load_or_measure(cpu, keep)
    assert calibration.quick_bandwidth(cpu, 2e10, keep) == 2e10 and len(asked) == 2
    assert calibration.quick_bandwidth(cpu, 2.1e10, keep) == 5e10
    assert all(1 << 26 <= size <= 1 << 28 and not size % 16384 and rounds == 2 for size, rounds in asked)
