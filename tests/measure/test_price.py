"""Prices: calls of a step made again alone, the Python between them, what is kept, and forecasts of whole steps."""

import dataclasses
import gc
import subprocess
import threading
import tomllib
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, TrainConfig, Transformer, machine, ops
from dsmini.machine import matmul_rate, on_threads, pick_dtype
from dsmini.measure import price, roofs
from dsmini.measure.calls import BLOCKS, INDEX_DTYPES, Call, Operands
from dsmini.measure.dry import Dry, dry_count
from dsmini.measure.memory import reset_peak, saved_for_backward
from dsmini.measure.price import Prices, narrow
from dsmini.measure.roofs import Roofs, load_or_measure, seconds_of
from dsmini.measure.torch_operations import tensors_in
from dsmini.measure.turns import TimeOverError, in_turns
from dsmini.measure.workloads import StepDtype, StepShape, Work, random_cache, random_model, random_tokens
from tests.conftest import Clock
from tests.helpers.configs import V4
from tests.helpers.decoding import index_stores
from tests.helpers.questions import TINY, InventedPrices, invented_roofs

CPU = torch.device("cpu")
SPARSE = dataclasses.replace(TINY, attention="dsa", index_n_heads=2, index_head_dim=64, index_topk=16)
MHA = dataclasses.replace(TINY, attention="mha", q_lora_rank=None)
WIDE = dataclasses.replace(TINY, n_layers=1, n_dense_layers=0, dim=256, moe_inter_dim=128, n_mtp_layers=1)
"""Large enough for the kernels of experts."""


def shape_of(work: Work, config: ModelConfig, dtype: StepDtype = "float32", **more: Any) -> StepShape:
    return StepShape(**{"work": work, "config": config, "dtype": dtype, "batch": 2, "tokens": 48, **more})


def counted(shape: StepShape, cache_bytes: int = 1 << 20) -> Dry:
    return dry_count(lambda: shape.make(CPU), cache_bytes)


def call_of(run: Any, *tensors: torch.Tensor, cache_bytes: int = 1 << 20) -> Call:
    with Dry(cache_bytes) as dry:
        run(*tensors)
    ((call, number),) = dry.calls.values()
    assert number == 1
    return call


def arguments(call: Call, times: int) -> list[list[torch.Tensor]]:
    """Return the tensors that a call is made with, each time."""
    seen: list[list[torch.Tensor]] = []
    turn, _ = Operands(1 << 20).turn(call._replace(run=lambda *args: seen.append(tensors_in(args))))
    for _ in range(times):
        turn()
    return seen


# --- a call made again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize(
    ("work", "config"),
    [
        *(("training", config) for config in (TINY, WIDE, SPARSE)),
        *(("prefill", config) for config in (WIDE, MHA)),
        *(("decode", config) for config in (TINY, SPARSE, MHA)),
    ],
)
def test_every_call_of_a_step_can_be_made_again(work: Work, config: ModelConfig, dtype: StepDtype) -> None:
    """Check that each distinct call runs on its new operands, and that together they are all operations."""
    train = TrainConfig(optimizer="muon", grad_accum=2) if config is WIDE else TrainConfig(optimizer="adamw")
    found, operands = counted(shape_of(work, config, dtype, train=train)), Operands(1 << 16)
    assert sum(number for _, number in found.calls.values()) == len(found.operations)
    assert len(found.calls) <= len(found.operations)
    with torch.no_grad():
        for call, _ in found.calls.values():
            turn, _ = operands.turn(call)
            turn()


def test_operands_are_alike() -> None:
    """Check shapes, strides and dtypes; that one tensor is one again, and indices are those of the step."""
    a, index = torch.rand(300, 500).bfloat16().t(), torch.randint(0, 500, (7,))
    call = call_of(lambda a, index: a.index_select(0, index), a, index)
    ((made, same),) = arguments(call, 1)
    assert (made.shape, made.stride(), made.dtype) == (a.shape, a.stride(), a.dtype)
    assert torch.equal(same, index) and made.abs().min() >= 1 and made.abs().max() <= 2
    b = torch.rand(64, 64)
    ((one, other),) = arguments(call_of(torch.mul, b, b), 1)
    assert one.data_ptr() == other.data_ptr()
    ((one, other),) = arguments(call_of(torch.mul, b, b + 1), 1)
    assert one.data_ptr() != other.data_ptr()


def test_what_comes_from_memory_is_other_memory_each_time() -> None:
    """Check a weight of 256 KB next to a cache of 1 MB that holds x: enough others that all exceed the cache."""
    x, w = torch.rand(4, 256), torch.rand(256, 256)
    with Dry(1 << 20) as dry:
        x.mul(2.0)
        torch.mm(x, w)
    call = [*dry.calls.values()][1][0]
    assert 0 <= call.cold - w.nbytes < 2 * x.nbytes + 4 * 256 * 4
    seen = arguments(call, 40)
    xs, ws = ({tensors[i].data_ptr() for tensors in seen} for i in range(2))
    assert len(xs) == 1 and BLOCKS - 1 <= len(ws) * w.nbytes / 2**20 <= BLOCKS
    (again,) = {len({t[1].data_ptr() for t in arguments(call._replace(cold=0), 40)})}
    assert again == 1


def test_what_a_call_changes_is_its_own() -> None:
    """Check that the numbers that all calls read stay as they were."""
    a, b = torch.rand(1 << 14), torch.rand(1 << 14)
    call, operands = call_of(torch.Tensor.mul_, a, b), Operands(1 << 20)
    turn, _ = operands.turn(call)
    before = {dtype: block.clone() for dtype, block in operands.blocks.items()}
    for _ in range(3):
        turn()
    assert before and all(torch.equal(block, before[dtype]) for dtype, block in operands.blocks.items())


def test_calls_of_equal_time_have_one_key() -> None:
    """Check that contexts, dtypes and caches tell calls apart, and numbers do not."""
    with Dry() as dry:
        a, b = torch.rand(128, 64), torch.rand(128, 64)
        kept = [x.mul(2.0) for x in (a, b, a)]
    assert [number for call, number in dry.calls.values() if "mul" in call.name] == [len(kept)]
    shapes = [shape_of("decode", TINY, batch=1, tokens=tokens) for tokens in (40, 41)]
    if ops.serving("cpu") == "cpu":
        keys = [{k for k, (call, _) in counted(s).calls.items() if call.kind == "attention step"} for s in shapes]
        assert keys[0] and not keys[0] & keys[1]
    for call, _ in counted(shapes[0]).calls.values():
        assert all(t.dtype in INDEX_DTYPES for t in call.indices.values())


# --- prices

DECODE = shape_of("decode", TINY)


class Timing:
    """Seconds in place of what is timed, a file that keeps prices, and the kinds of calls that were timed."""

    def __init__(self, patch: pytest.MonkeyPatch, keep: Path) -> None:
        self.keep, self.timed = keep, list[str]()
        self.alone, self.step, self.busy, self.steady = 1e-3, 1.0, 0.0, 1.0
        patch.setattr(price, "seconds_alone", lambda call, _: (self.timed.append(call.kind), self.alone)[1])
        patch.setattr(price, "seconds_of", lambda *_: self.step)
        patch.setattr(price, "watched", lambda run: (run(), self.busy))
        patch.setattr(price, "steadiness", lambda *_: self.steady)

    def prices(self, fresh: bool = False) -> Prices:
        return Prices.under(invented_roofs(cache_bytes=1 << 20), self.keep, fresh=fresh)

    def calls(self, shape: StepShape = DECODE, fresh: bool = False) -> int:
        """Return how many calls another process would time for this forecast."""
        before = len(self.timed)
        self.prices(fresh).forecast(shape)
        return len(self.timed) - before


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Timing:
    return Timing(monkeypatch, tmp_path / "roofs.json")


def test_forecast_is_the_sum_of_calls_and_what_is_between(timing: Timing) -> None:
    shape = shape_of("training", dataclasses.replace(TINY, max_seq_len=50))
    dry, small = counted(shape), counted(dataclasses.replace(shape, config=narrow(TINY), batch=1, tokens=64))
    found = timing.prices().forecast(shape)
    between = (1.0 - 1e-3 * len(small.operations)) / (len(small.operations) + small.views)
    assert found.calls == len(dry.operations) + dry.views and found.flops == dry.flops
    assert found.by_class["calls"] == pytest.approx(found.calls * between)
    assert found.seconds == pytest.approx(1e-3 * len(dry.operations) + found.calls * between)
    assert found.seconds == pytest.approx(sum(found.by_class.values()))
    assert list(found.by_class.values()) == sorted(found.by_class.values(), reverse=True)
    assert len(timing.timed) <= len(dry.calls) + len(small.calls), "each distinct call once"
    assert len(dry.calls) < 0.7 * len(dry.operations)
    numbers = sum(p.numel() for p in Transformer(TINY).parameters())
    assert found.peak == dry.peak > 3 * 4 * numbers, "weights and moments"
    timing.alone = 1.0
    assert timing.prices(fresh=True).forecast(DECODE).by_class["calls"] == 0, "calls alone take longer than the step"


def test_nothing_is_timed_after_the_time_is_over(timing: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that what was timed before is stored, and makes the next forecast shorter."""
    monkeypatch.setattr(price.time, "perf_counter", lambda: float(len(timing.timed)))
    found = timing.prices()
    found.until = 4.0
    with pytest.raises(TimeOverError):
        found.forecast(DECODE)
    assert len(timing.timed) == len(found.known) == 4
    again = timing.prices()
    again.forecast(DECODE)
    assert len(timing.timed) == len(again.known) - 1, "all but what is between"


def test_prices_are_kept_for_a_number_of_threads(timing: Timing) -> None:
    n, prices = timing.calls(), timing.prices()
    assert n and timing.calls() == 0 and timing.calls(fresh=True) == n
    assert prices.forecast(DECODE) is prices.forecast(DECODE), "forecast once"
    with on_threads(torch.get_num_threads() + 1):
        assert timing.calls() == n
    timing.keep.write_text('{"x": 5')
    assert timing.prices().known == {}, "a damaged file has none"


@pytest.mark.parametrize(("busy", "steady", "words"), [(0.4, 1.0, "0.4 cores"), (0.0, 0.5, "at 50% of its usual rate")])
def test_prices_of_a_disturbed_machine_are_not_stored(timing: Timing, busy: float, steady: float, words: str) -> None:
    """Price one step while others have cores, or at half the rate, and another one in a quiet minute."""
    timing.busy, timing.steady = busy, steady
    prices = timing.prices()
    with pytest.warns(UserWarning, match=words):
        prices.forecast(DECODE)
    assert prices.disturbed and not timing.keep.exists()
    timing.busy, timing.steady = 0.0, 1.0
    slow = set(prices.known)
    prices.forecast(shape_of("decode", MHA))
    stored = timing.prices().known
    assert stored and not slow & set(stored), "only those of the quiet minute"
    assert timing.calls() > 0, "the disturbed ones are measured again"


def test_prices_of_other_kernels_are_not_used(timing: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSMINI_CPU_ISA", raising=False)
    n = timing.calls()
    monkeypatch.setenv("DSMINI_CPU_ISA", "avx2")
    assert timing.calls() == n
    assert price.hash_of(price.kernel_folders()) != price.hash_of([]), "it is a hash of files"
    monkeypatch.setattr(price, "hash_of", lambda folders: "other")
    assert timing.calls() == n


def test_a_long_call_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no rounds follow: a product without units for its dtype takes seconds."""
    taken = iter([9.0, 7.0])
    monkeypatch.setattr(price, "once", lambda run, device: next(taken))
    call = call_of(torch.mul, torch.rand(8), torch.rand(8))
    assert price.seconds_alone(call, Operands(1 << 16)) == 7.0


def test_a_step_by_other_code_is_priced_as_what_it_runs() -> None:
    """Price a step that multiplies once, in place of that of the shape."""
    a = torch.rand(64, 64)
    found = InventedPrices().forecast(shape_of("prefill", TINY), lambda: lambda: a @ a)
    assert found.calls == 1 and found.flops == 2 * 64**3
    assert found.by_class["product"] == pytest.approx(2 * 64**3 / 1e9, rel=0.2)


@pytest.mark.slow
@pytest.mark.memory(4)  # calls are timed in blocks of four last-level caches, which have half a GB on large servers
@pytest.mark.parametrize("work", ["training", "prefill", "decode"])
def test_forecast_is_near_what_a_step_takes(work: Work) -> None:
    """Allow a factor of two between the fastest of each, in turns and on one thread, until they agree or 12 rounds end.

    Prices are measured now: stored ones are of a quiet hour, and here tests of other processes run too.
    """
    config = dataclasses.replace(TINY, dim=512, inter_dim=1024, moe_inter_dim=256, max_seq_len=256)
    shape = shape_of(work, config, tokens=192)
    expected, taken = [], []
    with on_threads(1):
        for _ in range(12):
            expected.append(Prices.under(load_or_measure(CPU), fresh=True).forecast(shape).seconds)
            turns = in_turns({"step": shape.make(CPU)}, count=100 if work == "decode" else 8)
            taken += turns.seconds["step"]
            if min(taken) / 2 < min(expected) < 2 * min(taken):
                break
    assert min(taken) / 2 < min(expected) < 2 * min(taken)


# --- roofs of invented machines: measured within a budget of time, and stored

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


PROCESSORS = tomllib.loads(Path(__file__).with_name("processors.toml").read_text())["processors"]


@pytest.mark.parametrize(("system", "cpuinfo", "want"), PROCESSORS)
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


# --- random models and caches, their bytes, and the activations that they save


@pytest.mark.parametrize("dtype", [torch.float32, "fp8"])
@pytest.mark.parametrize("config", [TINY, ModelConfig(**V4, max_seq_len=64)], ids=["MLA", "V4"])
@torch.no_grad()
def test_random_cache_is_full_and_has_room(config: ModelConfig, dtype: torch.dtype) -> None:
    model = random_model(config, CPU, torch.float32)
    cache = random_cache(model, batch=2, context=16, room=4, dtype=dtype)
    assert cache.lengths.tolist() == [16, 16]
    for store in [*cache.stores, *index_stores(cache)]:
        rows = [part for part in getattr(store, "parts", [store]) if hasattr(part, "data")]
        assert rows and all(part.data[:, :16].any() for part in rows)
    tokens = random_tokens(config, 2, 4, CPU)
    assert torch.isfinite(model(tokens, cache)).all()
    assert cache.lengths.tolist() == [20, 20]


def test_saved_bytes_grow_with_tokens_and_refuse_a_width() -> None:
    model = random_model(dataclasses.replace(TINY, n_layers=1), CPU, torch.float32).train()
    few, many = (saved_for_backward(model, random_tokens(TINY, 1, n + 1, CPU)) for n in (20, 40))
    assert 0 < few.by_linears < few.total
    assert many.total > 1.9 * few.total
    with pytest.raises(ValueError, match="64 tokens equal the rows or columns of a matrix"):
        saved_for_backward(model, random_tokens(TINY, 1, 65, CPU))


def test_nothing_of_the_measured_graph_outlives_it() -> None:
    """Free the parameters: a graph that refers to itself would hold them."""
    model = Transformer(TINY, compute_dtype=torch.bfloat16)
    held = weakref.ref(model.embed.weight)
    saved_for_backward(model, torch.randint(0, 256, (2, 37)))
    del model
    gc.collect()
    assert held() is None


def test_the_peak_of_the_measured_gpu_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the current one, which is cuda:0 in a process that measures cuda:1."""
    reset: list[object] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    for name in ("cpu", "cuda:1"):
        reset_peak(torch.device(name))
    assert reset == [torch.device("cuda:1")]
