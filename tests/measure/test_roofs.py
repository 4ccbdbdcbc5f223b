"""Roofs of invented machines: measured within a budget of time, and stored."""

import subprocess
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsmini import machine
from dsmini.machine import matmul_rate, pick_dtype
from dsmini.measure import roofs
from dsmini.measure.roofs import Roofs, load_or_measure, seconds_of
from tests.conftest import Clock
from tests.helpers.questions import invented_roofs

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
Rates = dict[torch.dtype, float]
Machine = Callable[..., list[int]]

# --- one call


def test_seconds_of_begins_no_round_beyond_its_budget(clock: Clock) -> None:
    for most, rounds in ((0.0, 1), (4.5, 2), (100.0, 5)):
        before = clock.now
        assert seconds_of(lambda: clock.pay(1.0), CPU, rounds=5, most=most) == 1.0
        assert clock.now - before == 2 + rounds, "the first two are for warming up"


def test_seconds_of_is_the_median_of_its_rounds(clock: Clock) -> None:
    assert seconds_of(clock.work("a", 9.0, 0.1, 1.0, 3.0, 2.0, 5.0, 4.0), CPU, rounds=5) == 3.0


# --- products


@pytest.fixture
def machine_of(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return the maker of a machine of this many FLOP/s, with a wait in each product; it returns the sizes seen."""

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

    return make


@pytest.mark.parametrize(
    ("flops", "largest"), [(3e6, 64), (3e8, 128), (3e9, 512), (1e11, 1024), (1e13, 2048)]
)  # fmt: skip
def test_matmul_rate_takes_the_largest_size(clock: Clock, machine_of: Machine, flops: float, largest: int) -> None:
    sizes = machine_of({FP32: flops})
    assert matmul_rate(CPU, FP32, seconds=0.5) == pytest.approx(flops)
    assert max(sizes) == largest
    # every machine measures the smallest size, after a warm-up
    assert clock.now < max(2 * 0.5, 4 * 2 * 64**3 / flops + 4 * 2 * 128**3 / flops)


def test_matmul_rate_of_a_gpu_outgrows_the_start_of_a_product(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 800 TFLOP/s makes a product of size 2048 in 21 us, and starting it and waiting takes 12 us."""

    def product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
        return lambda: clock.pay(12e-6 + 2 * size**3 / 8e14)

    monkeypatch.setattr(machine, "_square_product", product)
    for seconds in (0.01, 1.0):  # to choose a dtype, and to know the peak
        assert matmul_rate(torch.device("meta"), BF16, seconds) == pytest.approx(8e14, rel=0.02)


def test_matmul_rate_outgrows_a_wait_in_each_product(machine_of: Machine) -> None:
    """Simulate threads that wait for each other, where small products do not show the rate."""
    machine_of({FP32: 1e11}, wait=0.01)
    assert matmul_rate(CPU, FP32) > 0.3e11


@pytest.mark.parametrize(
    ("rates", "dtype"),
    [
        ({FP32: 1e11, BF16: 2.1e11}, BF16),
        ({FP32: 1e11, BF16: 1.1e11}, FP32),
        ({FP32: 1.7e11, BF16: 3e8}, FP32),
        ({FP32: 1e11}, FP32),
    ],
)
def test_dtype_follows_the_rates(clock: Clock, machine_of: Machine, rates: Rates, dtype: torch.dtype) -> None:
    machine_of(rates)
    assert pick_dtype("auto", CPU) == dtype
    if rates.get(BF16) == 3e8:  # a clear loss ends the trial: one turn each, with four products of the smallest size
        assert clock.now < 0.02 + 4 * 2 * 64**3 / 3e8
    assert clock.now < 2 * 12 * 0.06


def test_measuring_keeps_threads_and_draws_no_numbers() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    machine.product_rates(CPU)
    matmul_rate(CPU, FP32, seconds=0.01)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


# --- stored rates


def test_stored_rates_are_those_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list[str]()
    here = {"processor": "a"}

    def measure(device: torch.device, on_part: object) -> Roofs:
        measured.append(here["processor"])
        return invented_roofs(card=dict(here))

    monkeypatch.setattr(roofs, "measure", measure)
    monkeypatch.setattr(roofs, "card", lambda device: dict(here))
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
    monkeypatch.setattr(roofs, "VERSION", 0)
    assert load_or_measure(CPU, keep).card == here and len(measured) == 7, "another version measures again"


@pytest.mark.parametrize(
    ("system", "cpuinfo", "want"),
    [
        ("linux", "processor\t: 0\nmodel name\t: AMD EPYC 9R14\n\nmodel name\t: another", "AMD EPYC 9R14"),
        ("linux", "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC, family 26, model 2"),
        ("linux", "CPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "aarch64, implementer 0x41, part 0xd40"),
        ("linux", "", "aarch64"),
        ("darwin", "", "Apple M2"),
    ],
)
def test_processors_are_told_apart(monkeypatch: pytest.MonkeyPatch, system: str, cpuinfo: str, want: str) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("platform.processor", str)
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo)
    said = subprocess.CompletedProcess([], 0, "Apple M2\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    assert machine.processor.__wrapped__() == want


def test_user_without_home_stores_no_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as a container's user may be
    monkeypatch.chdir(tmp_path)
    store = roofs.Store.at(None)
    store.write("here", lambda: {"rate": 1.0})
    assert store.contents() == {} and not [*tmp_path.iterdir()]


def test_key_names_the_instructions_that_torch_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    before = roofs.key_of(CPU)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert roofs.key_of(CPU) != before


def test_rates_that_two_processes_store_at_once_all_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second writer begin while the first one has read the file and not yet written it."""
    store, real = roofs.Store(tmp_path / "roofs.json"), roofs.write_text
    second = threading.Thread(target=lambda: store.write("b", lambda: {"rate": 2.0}))

    def write(path: Path, text: str) -> None:
        if second.ident is None:
            second.start()
            second.join(0.2)
        real(path, text)

    monkeypatch.setattr(roofs, "write_text", write)
    store.write("a", lambda: {"rate": 1.0})
    second.join()
    assert store.contents().keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("busy", "again", "words"),
    [(0.3, 1.0, "other programs kept 0.3 cores"), (0.0, 1.5, "ran at 67% of its usual rate"), (0.0, 1.1, "")],
)
def test_disturbed_roofs_are_marked_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: float, again: float, words: str
) -> None:
    """Measure while threads miss cores, and while a probe becomes slower by a half or by a tenth."""
    keep, times = tmp_path / "roofs.json", iter([1.0, again])
    for name in ("read_bandwidth", "_copy"):
        monkeypatch.setattr(roofs, name, lambda device: 1.0)
    monkeypatch.setattr(roofs, "matmul_rate", lambda device, dtype, seconds: 1.0)
    monkeypatch.setattr(roofs, "probes", lambda device: {"products": next(times)})
    monkeypatch.setattr(roofs, "watched", lambda run: (run(), busy))
    with pytest.warns(UserWarning, match=words) if words else nullcontext():
        found = load_or_measure(CPU, keep)
    assert words in found.disturbed and keep.exists() == (not words) == (not found.disturbed)
