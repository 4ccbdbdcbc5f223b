"""Training as the work that is diagnosed: steps of a run, each the same work, and the arms that make one thing free.

    replay            Data       every step takes the same batch, which is in memory
    dense_active      Algorithm  a dense feed-forward with the same active parameters
    all_threads       Machine    products run on all cores
    fastest_dtype     Machine    products run in the dtype that this machine multiplies fastest

The gain of replay is measured, within what the plain steps of the same turn have seen: at least the time that they
waited, and at most that and the CPU time in which batches were prepared, since threads that prepare take a core from
the products. The other arms leave the wait as it is, and gain no more than what is not waited. Waiting comes in stalls,
so that its mean counts, not its median.

    T - waited - preparing  <=  T_replay  <=  T - waited

In one process all experts run on the same cores: only the sum of their tokens counts, and balance alone gains nothing.
Without routing, each mixture of experts is a dense feed-forward with the same active parameters. Both do the same
multiplications, so the difference is what routing costs: choosing, sorting, many small products. The optimizer is left
out, as it moves all experts, also those that no token has chosen.

Predictions are made before any step runs. Each operation of a step is timed alone (measure/price.py). A batch is timed
alone, without the model: its seconds, and the CPU seconds among them. A thread that prepares batches takes these from
the products, whose threads all wait for the one that shares its core:

    wait = max(CPU seconds of a batch where products use all cores, seconds of a batch / workers - computing)

and is all of the batch's seconds without workers. A plain step takes computing + wait, and the wait stays in all arms
but the one that replays a batch.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dsmini.config import ModelConfig, RunConfig
from dsmini.diagnosis.arms import Arm, Step, Work, patched
from dsmini.diagnosis.contention import Contention, watch
from dsmini.diagnosis.findings import Finding, duplicates, held_out_leak, load, padding, wrong_targets
from dsmini.machine import DTYPES, cores, memory_bytes, on_threads, once, pick_dtype
from dsmini.measure.price import Forecast, Prices
from dsmini.measure.turns import TimeOverError
from dsmini.measure.workloads import StepDtype, StepShape
from dsmini.nn import Block, FeedForward
from dsmini.nn.layers import in_precision
from dsmini.training.trainer import StepResult, Trainer

BATCHES = 4
"""Batches whose targets are looked at, and which are timed."""
FACTORS = (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)
"""Batches that are tried, in those of the run."""
MOST_MEMORY = 0.5
"""Share of memory that a step of the largest may take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainTurn:
    """Figures of the plain steps of a turn."""

    steps: Sequence[StepResult]
    """The steps that are counted."""
    contention: Contention
    preparing: float
    """CPU seconds of preparing a step's batch, by threads or by the step itself."""

    @property
    def seconds(self) -> float:
        """Mean seconds of a step."""
        return statistics.fmean(step.seconds for step in self.steps)

    @property
    def waited(self) -> float:
        """Mean seconds that a step waited for its batch."""
        return statistics.fmean(step.data_wait * step.seconds for step in self.steps)


class Subject:
    """A Trainer whose steps are taken for their time. Its schedules stand still: every step is the same work."""

    work: Work = "training"

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.at: int = trainer.steps_done
        self.rows: int = trainer.config.train.batch_size_at(self.at)
        self.prices: Prices | None = None
        self.turns: list[PlainTurn] = []
        """Turns of plain steps, the one to warm up included."""

    @property
    def config(self) -> RunConfig:
        return self.trainer.config

    @property
    def device(self) -> torch.device:
        return self.trainer.device

    @property
    def facts(self) -> dict[str, str]:
        """The subject in words."""
        return {
            "batch": f"{self.rows} x {self.config.seq_len} tokens",
            "products": f"{self.config.train.dtype}, threads: {torch.get_num_threads()}",
            "text": self.trainer.corpus.source,
            "weights": f"after step {self.at}" if self.at else "random",
        }

    def look(self) -> list[Finding]:
        """Return findings of the text and of the first batches."""
        batches = [self.trainer.loader.prepared((i * self.rows, self.rows)) for i in range(BATCHES)]
        corpus = self.trainer.corpus
        of_batches = [wrong_targets(batches), padding([targets for _, targets in batches])]
        return [duplicates(corpus), held_out_leak(corpus), *of_batches]

    def look_back(self) -> list[Finding]:
        """Return findings of the plain steps that were taken."""
        idle = load([step for turn in self.turns for step in turn.steps])
        return [] if idle is None else [idle]

    @property
    def contentions(self) -> list[Contention]:
        """Others' shares in the turns of plain steps."""
        return [turn.contention for turn in self.turns[1:] or self.turns]

    def step(self) -> StepResult:
        """Take one optimizer step, and return to the same place of the schedules."""
        result = self.trainer.step()
        self.trainer.steps_done = self.at
        return result

    def batch_sizes(self) -> list[int]:
        """Return numbers of sequences to try, those of the run first: what fits into memory, by its forecast.

        Without a forecast at most twice that number is tried.
        """

        def fits(n: int) -> bool:
            if n <= self.rows or self.prices is None:
                return n <= 2 * self.rows
            with suppress(TimeOverError):
                return self.forecast(n).peak < MOST_MEMORY * memory_bytes(self.device)
            return False

        parts = self.config.train.grad_accum
        sizes = [round(self.rows * factor) for factor in FACTORS if self.rows * factor >= parts]
        return [self.rows, *(n for n in sizes if n % parts == 0 and n != self.rows and fits(n))]

    @property
    def counted(self) -> int:
        """Plain steps of a turn that count, one for each worker: after arms that take no batches each worker has one
        ready."""
        return max(2, self.config.data.workers)

    def arms(self, prices: Prices | None) -> list[Arm]:
        """Return all arms, the plain steps first. Without prices nothing is predicted."""
        self.prices = prices
        config, fastest = self.config, fastest_dtype(self.device)
        compiled = "the model is compiled; run without --train.compile" if config.train.compile else None
        no_experts = compiled or (None if self.trainer.model.gates() else "the model has no routed experts")
        same_dtype = f"{fastest} is the fastest dtype here, and used" if config.train.dtype == fastest else None
        return [
            Arm(name="plain", apply=self.plain, counted=self.counted, predict=lambda: self.seconds() + self.wait),
            Arm(
                name="replay",
                axis="Data",
                apply=self.replay,
                is_rare=True,
                predict=self.seconds,
                words="every step takes the same batch from memory; saves at most what plain steps waited and prepared",
                advice="Prepare batches earlier or faster: raise data.workers, read plain files, tokenize once.",
            ),
            Arm(
                name="dense_active",
                axis="Algorithm",
                apply=self.dense,
                why_not=no_experts,
                predict=lambda: self.seconds() + self.wait - self.routing(),
                words="a dense feed-forward with the same number of active parameters replaces the experts",
                advice="Make fewer and wider experts, or larger batches, so that each product has more rows.",
            ),
            all_threads(self, "Leave train.threads out, so that all cores are used."),
            Arm(
                name="fastest_dtype",
                axis="Machine",
                apply=lambda: self.dtype(fastest),
                why_not=compiled or same_dtype,
                predict=lambda: self.seconds(dtype=fastest) + self.wait,
                words="products run in the dtype that this machine multiplies fastest",
                advice="Leave train.dtype at auto.",
            ),
        ]

    @contextmanager
    def plain(self) -> Iterator[Step]:
        """Yield plain steps, and add a turn of what was seen of them."""
        steps, cpu = list[StepResult](), list[float]()
        ended = watch(self.prices and self.prices.roofs, self.device)
        prepared = self.trainer.loader.prepared

        def timed(request: tuple[int, int]) -> tuple[Tensor, Tensor]:
            start = time.thread_time()
            batch = prepared(request)
            cpu.append(time.thread_time() - start)
            return batch

        def step(_base: float) -> float:
            steps.append(self.step())
            return steps[-1].seconds

        with patched(self.trainer.loader, "prepared", timed):
            yield step
        counted = steps[-self.counted :]
        self.turns.append(PlainTurn(steps=counted, contention=ended(), preparing=sum(cpu) / len(steps)))

    @contextmanager
    def batch_of(self, rows: int | None = None) -> Iterator[Step]:
        """Let every step take the same batch, which is in memory, of other rows if asked for."""
        batch = self.trainer.loader.prepared((self.trainer.sequences, rows or self.rows))
        config = self.config
        if rows is not None:
            train = dataclasses.replace(config.train, batch_size=rows, batch_start=None, batch_ramp=0.0)
            config = dataclasses.replace(config, train=train)
        loader = SimpleNamespace(take=lambda _: batch)  # all that a trainer asks for
        with patched(self.trainer, "config", config), patched(self.trainer, "loader", loader):
            yield lambda _base: self.step().seconds

    @contextmanager
    def replay(self) -> Iterator[Step]:
        """Let every step take the same batch; its seconds are within what plain steps have seen."""
        with self.batch_of() as step:
            seen = self.turns[-1]
            most = seen.seconds - seen.waited
            yield lambda base: min(max(step(base), most - seen.preparing), most)

    def changed(self, _base: float = 0.0) -> float:
        """Take a step of an arm that leaves the loader as it is; return its seconds with the wait of plain steps."""
        result = self.step()
        return self.turns[-1].waited + result.seconds * (1 - result.data_wait)

    @contextmanager
    def threads(self, number: int) -> Iterator[Step]:
        """Let products run on a number of cores."""
        with on_threads(number):
            yield self.changed

    @contextmanager
    def dtype(self, name: str) -> Iterator[Step]:
        """Let products run in a dtype. Masters stay FP32."""
        with patched(self.trainer.model, "compute_dtype", DTYPES[name]):
            yield self.changed

    @contextmanager
    def dense(self) -> Iterator[Step]:
        """Let a dense feed-forward stand in for each mixture of experts, forward and backward."""
        blocks = routed_blocks(self.trainer.model)
        routed: list[nn.Module] = [block.ffn for block in blocks]
        plain = [dense_baseline(self.config.model).to(self.device) for _ in blocks]

        def with_parts(parts: Sequence[nn.Module]) -> float:
            for block, part in zip(blocks, parts, strict=True):
                block.ffn = part
            try:
                return self.forward_backward()
            finally:
                for block, part in zip(blocks, routed, strict=True):
                    block.ffn = part

        def step(base: float) -> float:
            with_routing, without = with_parts(routed), with_parts(plain)
            # the pair may have had a slower moment than the plain step, whose computing it is a part of
            return base - min(base - self.turns[-1].waited, with_routing) * (1 - without / with_routing)

        with self.batch_of():  # neither side waits
            yield step

    def forward_backward(self) -> float:
        """Return the seconds of a forward and backward without an update."""
        seconds = once(lambda: self.trainer.forward_backward(self.rows), self.device)
        self.trainer.model.zero_grad(set_to_none=True)
        return seconds

    # --- predictions

    def forecast(self, batch: int | None = None, dtype: str | None = None) -> Forecast:
        """Return the forecast of a step that waits for nothing, with other rows or another dtype."""
        assert self.prices is not None, "without prices nothing is predicted"
        return self.prices.forecast(self.shape(batch, dtype))

    def seconds(self, batch: int | None = None, dtype: str | None = None) -> float:
        return self.forecast(batch, dtype).seconds

    def seconds_on(self, threads: int) -> float:
        """Predict the seconds of a step on a number of threads, its wait included."""
        with on_threads(threads):
            return self.seconds() + self.wait

    def routing(self) -> float:
        """Predict the seconds that routing adds to a forward and backward."""
        assert self.prices is not None, "without prices nothing is predicted"
        shape, device = self.shape(), torch.device("cpu")

        def put_dense(model: nn.Module) -> None:
            for block in routed_blocks(model):
                block.ffn = dense_baseline(shape.config)

        routed, dense = (
            self.prices.forecast(shape, partial(shape.make, device, change=change, update=False)).seconds
            for change in (lambda model: None, put_dense)
        )
        return routed - dense

    @cached_property
    def wait(self) -> float:
        """Predicted seconds that the loader adds to a step. Batches are timed: their mean counts, as a stall does."""
        start, busy = time.perf_counter(), time.thread_time()
        for i in range(BATCHES):
            self.trainer.loader.prepared((self.trainer.sequences + i * self.rows, self.rows))
        batch, cpu = (time.perf_counter() - start) / BATCHES, (time.thread_time() - busy) / BATCHES
        return waiting_seconds(batch, cpu, self.seconds(), self.config.data.workers)

    def shape(self, batch: int | None = None, dtype: str | None = None) -> StepShape:
        """Return a step of the run with other rows, or another dtype; in FP8 if that is the model's precision."""
        config = self.config
        name: StepDtype = "float32" if (dtype or config.train.dtype) == "float32" else "bfloat16"
        name = "fp8" if config.model.precision == "fp8" else name
        sizes: Any = {"batch": batch or self.rows, "tokens": config.seq_len}
        return StepShape(work="training", config=config.model, dtype=name, train=config.train, **sizes)


def routed_blocks(model: nn.Module) -> list[Block]:
    """Return all blocks with a mixture of experts, those of multi-token prediction too."""
    return [m for m in model.modules() if isinstance(m, Block) and hasattr(m.ffn, "gate")]


def dense_baseline(config: ModelConfig) -> FeedForward:
    """Make the dense feed-forward with the active parameters of a mixture of experts."""
    active = config.n_activated_experts + config.n_shared_experts
    return in_precision(config, FeedForward)(config, inter_dim=active * config.moe_inter_dim)


def fastest_dtype(device: torch.device) -> str:
    """Return the name of the dtype that a device multiplies fastest."""
    return str(pick_dtype("auto", device)).removeprefix("torch.")


def all_threads(subject: Any, advice: str) -> Arm:
    """Return the arm whose products run on all cores."""
    return Arm(
        name="all_threads",
        axis="Machine",
        apply=lambda: subject.threads(cores()),
        why_not=no_more_threads(subject.device),
        predict=lambda: subject.seconds_on(cores()),
        words="products run on all cores",
        advice=advice,
    )


def no_more_threads(device: torch.device) -> str | None:
    """Return why more threads cannot be tried; None if they can."""
    if device.type != "cpu":
        return f"products run on {device}"
    used = torch.get_num_threads()
    return f"all {used} cores are used already" if used >= cores() else None


def waiting_seconds(batch: float, cpu: float, computing: float, workers: int) -> float:
    """Return what the loader adds to a step.

    Args:
        batch, cpu: seconds to prepare a batch with nothing else at work, and CPU seconds.
        computing: seconds of a step that waits for nothing.
    """
    if workers == 0:
        return batch
    shared = torch.get_num_threads() >= cores()
    return max(cpu if shared else 0.0, batch / workers - computing)
