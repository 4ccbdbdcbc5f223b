"""Predictions of training, made before any step runs: seconds of a plain step, and of one with each thing made free.

The forecast of this machine prices the operations that a step would run. A batch is timed alone, without the model: its
seconds, and the CPU seconds among them. A thread that prepares batches takes these from the products, whose threads all
wait for the one that shares its core. The loader's part follows:

    wait = max(CPU seconds of a batch where products use all cores, seconds of a batch / workers - computing)

and is all of the batch's seconds without workers. A plain step takes computing + wait, and the wait stays in all arms
but the one that replays a batch.

Another number of threads changes the rates of products and of memory, and both are measured. If they alone decided, a
step would change by its ideal share. It does not get that far: small operations stay on one thread, and threads wait
for each other. So a step of another model, one of those that this machine's rates come from, is timed with each too:

    share = measured change / ideal change, of that other model
    T(n)  = T(used) * (1 - share * ideal change of the step)

Worked example: 100 ms of products, 60 of memory and 40 of calls on one thread. Two threads double products and read
memory 1.2 times as fast: ideal are 50 + 50 + 40 = 140 ms, a change of 0.3. The other model changes by 0.2 where 0.4 is
ideal: a share of a half. 200 * (1 - 0.5 * 0.3) = 170 ms.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from dsmini.config import ModelConfig
from dsmini.diagnosis.contention import cores
from dsmini.machine import matmul_rate, pick_dtype
from dsmini.measure.calibration import read_bandwidth
from dsmini.measure.dry import dry_count
from dsmini.measure.forecast import Forecast, forecast
from dsmini.measure.step_rates import SHAPES, Rates
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepDtype, StepShape, random_tokens
from dsmini.nn import Block, FeedForward, Routing, Transformer

if TYPE_CHECKING:
    from dsmini.diagnosis.training import Subject

BATCHES, TURNS = 5, 4
MOVED = ("move", "copy", "pointwise", "reduce", "gather", "scatter", "softmax", "cast", "optimizer")
"""Classes of operations that memory serves."""
LEAST_CHANGE = 0.02
"""Ideal change of the other model below which its share says nothing."""


@dataclass(frozen=True, kw_only=True)
class BatchTime:
    """Time to prepare a batch, with nothing else at work."""

    seconds: float
    cpu: float
    """Seconds in which it keeps a core busy."""


class TrainingPrices:
    """Predicted seconds of a subject's steps. What several of them need is computed once."""

    def __init__(self, subject: "Subject", rates: Rates) -> None:
        self.subject, self.rates = subject, rates
        self._pairs: dict[bool, tuple[float, float]] = {}

    @cached_property
    def computing(self) -> Forecast:
        """Forecast of a step that waits for nothing."""
        return self.forecast()

    @cached_property
    def wait(self) -> float:
        """Seconds that the loader adds to a step."""
        return waiting_seconds(time_batches(self.subject), self.computing.seconds, self.subject.config.data.workers)

    # seconds of a step of each arm

    def plain(self) -> float:
        return self.computing.seconds + self.wait

    def without_waiting(self) -> float:
        return self.computing.seconds

    def dense(self) -> float:
        routed, dense = self.routed_and_dense()
        return self.plain() - (routed - dense)

    def dtype(self, name: str) -> float:
        return self.forecast(dtype=name).seconds + self.wait

    def computing_in(self, dtype: str) -> float:
        return self.forecast(dtype=dtype).seconds

    def batch(self, rows: int) -> float:
        return self.forecast(rows=rows).seconds

    def all_parameters(self, dense: bool) -> float:
        return self.routed_and_dense(total=True)[dense]

    def threads(self, number: int) -> float:
        return seconds_with_threads(self.computing, [number], self.rates)[0] + self.wait

    def forecast(self, rows: int | None = None, dtype: str | None = None) -> Forecast:
        """Return the forecast of a step of this many sequences in a dtype; None: those of the run."""
        return forecast(self.shape(rows, dtype), self.rates)

    def shape(self, rows: int | None = None, dtype: str | None = None) -> StepShape:
        """Return a step of the run with other rows, or another dtype; in FP8 if that is the model's precision."""
        config = self.subject.config
        name: StepDtype = "float32" if (dtype or config.train.dtype) == "float32" else "bfloat16"
        name = "fp8" if config.model.precision == "fp8" else name
        batch, train = self.subject.rows if rows is None else rows, config.train
        return StepShape(
            work="training", config=config.model, dtype=name, batch=batch, tokens=config.seq_len, train=train
        )

    def routed_and_dense(self, total: bool = False) -> tuple[float, float]:
        """Return the seconds of a forward and backward with experts, and without. Args: as of dense_baseline."""
        if total not in self._pairs:
            routed, dense = (self._forward_backward(dense, total) for dense in (False, True))
            self._pairs[total] = routed, dense
        return self._pairs[total]

    def _forward_backward(self, dense: bool, total: bool) -> float:
        shape, rates = self.shape(), self.rates
        counted = dry_count(lambda: _forward_backward(shape, dense, total), rates.roofs.cache_bytes)
        parts = rates.steps[f"{shape.work} {shape.dtype}"].seconds(counted.operations, counted.views, rates.roofs)
        return sum(parts.values())


def time_batches(subject: "Subject") -> BatchTime:
    """Return the means of a few batches: a stall counts."""
    seconds, cpu = [], []
    for i in range(BATCHES):
        start, busy = time.perf_counter(), time.thread_time()
        subject.trainer.loader.prepared((subject.trainer.sequences + i * subject.rows, subject.rows))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.thread_time() - busy)
    return BatchTime(seconds=statistics.fmean(seconds), cpu=statistics.fmean(cpu))


def waiting_seconds(batch: BatchTime, computing: float, workers: int) -> float:
    """Return what the loader adds to a step of this many seconds of computing."""
    if workers == 0:
        return batch.seconds
    shared = torch.get_num_threads() >= cores()
    return max(batch.cpu if shared else 0.0, batch.seconds / workers - computing)


def fastest_dtype(device: torch.device) -> str:
    """Return the name of the dtype that a device multiplies fastest."""
    return str(pick_dtype("auto", device)).removeprefix("torch.")


def dense_baseline(config: ModelConfig, total: bool = False) -> FeedForward:
    """Make the dense feed-forward that stands in for a mixture of experts.

    Args:
        total: as many parameters as all experts have, instead of those that are active for a token.
    """
    experts = config.n_routed_experts if total else config.n_activated_experts
    return FeedForward(config, inter_dim=(experts + config.n_shared_experts) * config.moe_inter_dim)


def _forward_backward(shape: StepShape, dense: bool, total: bool) -> Callable[[], list[Routing]]:
    c = replace(shape.config, precision="fp8") if shape.dtype == "fp8" else shape.config
    model = Transformer(c, compute_dtype=torch.float32 if shape.dtype == "float32" else torch.bfloat16)
    if dense:
        for block in [m for m in model.modules() if isinstance(m, Block) and hasattr(m.ffn, "gate")]:
            block.ffn = dense_baseline(c, total)
    text = random_tokens(c, shape.batch, shape.tokens + 1, torch.device("cpu"))

    def step() -> list[Routing]:
        for part in text.chunk(shape.train.grad_accum):
            model.losses(part[:, :-1], part[:, 1:], recompute=shape.train.recompute).total.backward()
        for p in model.parameters():
            p.grad = None
        return []

    return step


# --- threads


@contextmanager
def threads_put_back() -> Iterator[None]:
    """Let the number of threads be afterwards what it was before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rates_by_threads(device: torch.device, dtype: str, counts: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Return the rates of products, in FLOP/s, and of reading memory, in bytes/s, by number of threads."""
    found: dict[int, tuple[float, float]] = {}
    product = torch.float32 if dtype == "float32" else torch.bfloat16
    with threads_put_back():
        for threads in counts:
            torch.set_num_threads(threads)
            found[threads] = matmul_rate(device, product, 0.3), read_bandwidth(device, 1 << 27, 2)
    return found


def scaled(
    by_class: Mapping[str, float], cold: Mapping[str, float], now: tuple[float, float], then: tuple[float, float]
) -> float:
    """Return the seconds of classes of operations when the rates of (products, memory) change.

    Args:
        cold: share of a class that waits for memory; all other classes stay as they are.
    """

    def longer(name: str) -> float:
        return (1 - cold[name]) * now[0] / then[0] + cold[name] * now[1] / then[1]

    return sum(seconds * (longer(name) if name in cold else 1.0) for name, seconds in by_class.items())


def seconds_with_threads(now: Forecast, counts: Sequence[int], rates: Rates) -> list[float]:
    """Return the predicted seconds of a step on each number of threads. Takes about two seconds.

    Args:
        now: forecast with the threads that are in use.
    """
    device, used = torch.device("cpu"), torch.get_num_threads()
    config, batch, tokens = SHAPES[now.shape.work][-1]
    other = StepShape(work=now.shape.work, config=config, dtype=now.shape.dtype, batch=batch, tokens=tokens)
    every = sorted({used, *counts})
    found, priced, step = rates_by_threads(device, now.shape.dtype, every), forecast(other, rates), other.make(device)

    def with_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        step()

    with threads_put_back():
        measured = in_turns({str(n): lambda n=n: with_threads(n) for n in every}, device, count=TURNS)
    seconds: list[float] = []
    for threads in counts:
        ideal, of_other = (1 - _ideal(step, found[used], found[threads]) / step.seconds for step in (now, priced))
        real = 1 - measured.median(str(threads)) / measured.median(str(used))
        share = real / of_other if abs(of_other) > LEAST_CHANGE else 1.0
        seconds.append(now.seconds * (1 - share * ideal))
    return seconds


def _ideal(step: Forecast, now: tuple[float, float], then: tuple[float, float]) -> float:
    """Return the seconds of a step if rates alone decided."""
    cold = {name: float(name in MOVED) for name in step.by_class if name != "calls"}
    return scaled(step.by_class, cold, now, then)
