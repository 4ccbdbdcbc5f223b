"""Predictions, made before any step runs: the seconds of a plain step, and of one with each thing made free.

The forecast of this machine prices the operations that a step would run. A batch is timed alone, without the model: its
seconds, and the CPU seconds among them. A thread that prepares batches takes these from the products, whose threads all
wait for the one that shares its core. The loader's part follows:

    busy = computing + CPU seconds of a batch, where products use all cores; else computing
    T    = max(busy, seconds of a batch / workers),   or computing + seconds of a batch without workers
    wait = T - computing

    replay           computing
    uniform routing  T: in one process all experts run on the same cores, so that only their sum counts
    dense            T - (forward and backward with experts - forward and backward without)
    fastest dtype    the forecast in that dtype, + wait
    all threads      as in scaling.py, + wait
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from dsmini.config import RunConfig
from dsmini.diagnosis.interventions.algorithm import dense_twin
from dsmini.diagnosis.interventions.machine import cores
from dsmini.diagnosis.scaling import seconds_with_threads
from dsmini.diagnosis.subject import Subject
from dsmini.machine import pick_dtype
from dsmini.measure.dry import dry_count
from dsmini.measure.forecast import Forecast, forecast
from dsmini.measure.step_rates import Rates
from dsmini.measure.workloads import StepDtype, StepShape, random_tokens
from dsmini.nn import Block, Routing, Transformer

BATCHES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a plain step, and with each thing made free."""

    plain: float
    free: Mapping[str, float]
    forecast: Forecast
    batch: "BatchTime | None" = None
    """None where no batch is loaded."""

    def gain(self, name: str) -> float | None:
        """Return the predicted gain of an intervention; None if it was not predicted."""
        return None if name not in self.free else 1 - self.free[name] / self.plain


def predict(subject: Subject, names: list[str], rates: Rates) -> Prediction:
    """Predict a subject's steps with each of the interventions named."""
    config = subject.config
    shape = shape_of(config, subject.rows, config.train.dtype)
    computing = forecast(shape, rates)
    batch = time_batches(subject)
    wait = waiting_seconds(batch, computing.seconds, config.data.workers)
    plain = computing.seconds + wait
    free: dict[str, float] = {}
    if "replay" in names:
        free["replay"] = free["waiting"] = computing.seconds
    if "uniform_routing" in names:
        free["uniform_routing"] = plain
    if "dense_active" in names:
        free["dense_active"] = plain - _cost_of_routing(shape, rates)
    if "fastest_dtype" in names:
        fastest = str(pick_dtype("auto", subject.trainer.device)).removeprefix("torch.")
        free["fastest_dtype"] = forecast(shape_of(config, subject.rows, fastest), rates).seconds + wait
    if "all_threads" in names:
        free["all_threads"] = seconds_with_threads(computing, [cores()], rates)[0] + wait
    return Prediction(plain=plain, free=free, batch=batch, forecast=computing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTime:
    """Time to prepare a batch, with nothing else at work."""

    seconds: float
    cpu: float
    """Seconds in which it keeps a core busy."""


def time_batches(subject: Subject) -> BatchTime:
    """Return the medians of a few batches."""
    seconds, cpu = [], []
    for i in range(BATCHES):
        start, busy = time.perf_counter(), time.thread_time()
        subject.trainer.loader.prepared((subject.trainer.sequences + i * subject.rows, subject.rows))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.thread_time() - busy)
    return BatchTime(seconds=statistics.median(seconds), cpu=statistics.median(cpu))


def waiting_seconds(batch: BatchTime, computing: float, workers: int) -> float:
    """Return what the loader adds to a step of this many seconds of computing."""
    if workers == 0:
        return batch.seconds
    shared = torch.get_num_threads() >= cores()
    return max(batch.cpu if shared else 0.0, batch.seconds / workers - computing)


def shape_of(config: RunConfig, rows: int, dtype: str) -> StepShape:
    """Return the step of a run in a dtype of products; in FP8 if that is the model's precision."""
    name: StepDtype = "float32" if dtype == "float32" else "bfloat16"
    if config.model.precision == "fp8":
        name = "fp8"
    return StepShape(
        work="training", config=config.model, dtype=name, batch=rows, tokens=config.seq_len, train=config.train
    )


def _cost_of_routing(shape: StepShape, rates: Rates) -> float:
    """Return the predicted seconds of a forward and backward with experts over those of a dense twin."""
    routed, dense = (priced.seconds for priced in routed_and_dense(shape, rates))
    return routed - dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Priced:
    """A forward and backward before it runs."""

    seconds: float
    flops: int


def routed_and_dense(shape: StepShape, rates: Rates, total: bool = False) -> tuple[Priced, Priced]:
    """Price a forward and backward with experts, and with a dense feed-forward in their place.

    Args:
        total: as of dense_twin.
    """
    name = f"{shape.work} {shape.dtype}"
    found: list[Priced] = []
    for dense in (False, True):
        counted = dry_count(lambda dense=dense: _forward_backward(shape, dense, total), rates.roofs.cache_bytes)
        parts = rates.steps[name].seconds(counted.operations, counted.views, rates.roofs)
        found.append(Priced(seconds=sum(parts.values()), flops=counted.flops))
    return found[0], found[1]


def _forward_backward(shape: StepShape, dense: bool, total: bool) -> Callable[[], list[Routing]]:
    c = dataclasses.replace(shape.config, precision="fp8") if shape.dtype == "fp8" else shape.config
    model = Transformer(c, compute_dtype=torch.float32 if shape.dtype == "float32" else torch.bfloat16)
    if dense:
        for block in [m for m in model.modules() if isinstance(m, Block) and hasattr(m.ffn, "gate")]:
            block.ffn = dense_twin(c, total)
    text = random_tokens(c, shape.batch, shape.tokens + 1, torch.device("cpu"))

    def step() -> list[Routing]:
        for part in text.chunk(shape.train.grad_accum):
            model.losses(part[:, :-1], part[:, 1:], recompute=shape.train.recompute).total.backward()
        for p in model.parameters():
            p.grad = None
        return []

    return step
